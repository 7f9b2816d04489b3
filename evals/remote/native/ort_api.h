// The entries of onnxruntime's C API that the runner calls.
//
// The API is one table of functions whose order never changes: a version only adds at its end
// (onnxruntime's docs/Versioning.md; its core/session/onnxruntime_c_api.cc asserts the places). So a runner needs the
// library alone, which every package of onnxruntime has, and not its headers, which most lack. With
// -DORT_HEADER='"onnxruntime_c_api.h"' the compiler holds this file against the real header.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtEnv;
struct OrtStatus;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtTensorTypeAndShapeInfo;

namespace ort {

constexpr uint32_t API_VERSION = 16;  // of late 2023; each later library has its table, too

enum Place : size_t {
    GET_ERROR_MESSAGE = 2,
    CREATE_ENV = 3,
    CREATE_SESSION = 7,
    RUN = 9,
    CREATE_SESSION_OPTIONS = 10,
    SET_LOG_SEVERITY = 22,
    SET_INTRA_THREADS = 24,
    SET_INTER_THREADS = 25,
    CREATE_TENSOR = 49,
    TENSOR_DATA = 51,
    ELEMENT_TYPE = 60,
    ELEMENT_COUNT = 64,
    TYPE_AND_SHAPE = 65,
    CREATE_CPU_MEMORY_INFO = 69,
    RELEASE_ENV = 92,
    RELEASE_STATUS = 93,
    RELEASE_MEMORY_INFO = 94,
    RELEASE_SESSION = 95,
    RELEASE_VALUE = 96,
    RELEASE_TYPE_AND_SHAPE = 99,
    RELEASE_SESSION_OPTIONS = 100,
};

constexpr int LOG_FATAL = 4, ARENA_ALLOCATOR = 1, DEFAULT_MEMORY = 0;
constexpr int FLOAT32 = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7, BOOL = 9, FLOAT16 = 10;  // of elements

struct ApiBase {
    const void* (*api)(uint32_t version);
    const char* (*version)();
};

}  // namespace ort

#ifdef ORT_HEADER
#include ORT_HEADER
#define SAME(place, entry) \
    static_assert(offsetof(OrtApi, entry) == ort::place * sizeof(void*), "onnxruntime has " #entry " elsewhere")
SAME(GET_ERROR_MESSAGE, GetErrorMessage);
SAME(CREATE_ENV, CreateEnv);
SAME(CREATE_SESSION, CreateSession);
SAME(RUN, Run);
SAME(CREATE_SESSION_OPTIONS, CreateSessionOptions);
SAME(SET_LOG_SEVERITY, SetSessionLogSeverityLevel);
SAME(SET_INTRA_THREADS, SetIntraOpNumThreads);
SAME(SET_INTER_THREADS, SetInterOpNumThreads);
SAME(CREATE_TENSOR, CreateTensorWithDataAsOrtValue);
SAME(TENSOR_DATA, GetTensorMutableData);
SAME(ELEMENT_TYPE, GetTensorElementType);
SAME(ELEMENT_COUNT, GetTensorShapeElementCount);
SAME(TYPE_AND_SHAPE, GetTensorTypeAndShape);
SAME(CREATE_CPU_MEMORY_INFO, CreateCpuMemoryInfo);
SAME(RELEASE_ENV, ReleaseEnv);
SAME(RELEASE_STATUS, ReleaseStatus);
SAME(RELEASE_MEMORY_INFO, ReleaseMemoryInfo);
SAME(RELEASE_SESSION, ReleaseSession);
SAME(RELEASE_VALUE, ReleaseValue);
SAME(RELEASE_TYPE_AND_SHAPE, ReleaseTensorTypeAndShapeInfo);
SAME(RELEASE_SESSION_OPTIONS, ReleaseSessionOptions);
static_assert(ort::LOG_FATAL == ORT_LOGGING_LEVEL_FATAL && ort::ARENA_ALLOCATOR == OrtArenaAllocator &&
                  ort::DEFAULT_MEMORY == OrtMemTypeDefault && ort::FLOAT32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT &&
                  ort::UINT8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 && ort::INT8 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 &&
                  ort::INT32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 &&
                  ort::INT64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 && ort::BOOL == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL &&
                  ort::FLOAT16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
              "onnxruntime has other constants");
#undef SAME
inline const ort::ApiBase* api_base() { return reinterpret_cast<const ort::ApiBase*>(OrtGetApiBase()); }
#else
extern "C" const ort::ApiBase* OrtGetApiBase();
inline const ort::ApiBase* api_base() { return OrtGetApiBase(); }
#endif
