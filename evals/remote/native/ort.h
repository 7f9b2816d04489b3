// onnxruntime as the runner uses it: sessions, values over memory of ours, runs. Failure is an Error.
//
// Not here: which tensors there are (onnx_runner.cpp), the table itself (ort_api.h).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ort_api.h"
#include "plan.h"

namespace ort {

using pocketvlm::Error;

inline const void* const* table() {
    static const auto* found = static_cast<const void* const*>(api_base()->api(API_VERSION));
    if (!found) throw Error("onnxruntime: is older than 1.16");
    return found;
}

/// Calls the entry at a place that returns a status. The types of `arguments` must be the C API's own.
template <typename... Arguments>
void call(Place place, Arguments... arguments) {
    using Entry = OrtStatus* (*)(Arguments...);
    OrtStatus* status = reinterpret_cast<Entry>(const_cast<void*>(table()[place]))(arguments...);
    if (!status) return;
    using Message = const char* (*)(const OrtStatus*);
    using Release = void (*)(OrtStatus*);
    const std::string said = reinterpret_cast<Message>(const_cast<void*>(table()[GET_ERROR_MESSAGE]))(status);
    reinterpret_cast<Release>(const_cast<void*>(table()[RELEASE_STATUS]))(status);
    throw Error("onnxruntime: " + said.substr(0, said.find('\n')));
}

template <typename Thing, Place PLACE>
struct Released {
    void operator()(Thing* thing) const {
        reinterpret_cast<void (*)(Thing*)>(const_cast<void*>(table()[PLACE]))(thing);
    }
};

template <typename Thing, Place PLACE>
using Owned = std::unique_ptr<Thing, Released<Thing, PLACE>>;

using Value = Owned<OrtValue, RELEASE_VALUE>;
using Session = Owned<OrtSession, RELEASE_SESSION>;

inline int type_of(const std::string& name) {
    static const std::map<std::string, int> types = {{"float32", FLOAT32}, {"float16", FLOAT16}, {"int64", INT64},
                                                     {"int32", INT32},     {"int8", INT8},       {"uint8", UINT8},
                                                     {"bool", BOOL}};
    return types.at(name);
}

/// A tensor over memory that the caller keeps for as long.
inline Value tensor(void* data, const std::string& type, const std::vector<int64_t>& shape) {
    static OrtMemoryInfo* cpu = [] {
        OrtMemoryInfo* made = nullptr;
        call(CREATE_CPU_MEMORY_INFO, ARENA_ALLOCATOR, DEFAULT_MEMORY, &made);
        return made;
    }();
    const size_t bytes = static_cast<size_t>(pocketvlm::count_of(shape)) * pocketvlm::width_of(type);
    OrtValue* made = nullptr;
    call(CREATE_TENSOR, static_cast<const OrtMemoryInfo*>(cpu), data, bytes, shape.data(), shape.size(),
         type_of(type), &made);
    return Value(made);
}

/// A tensor's numbers and how many; an Error when they are not float32.
inline std::pair<float*, size_t> floats(OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    call(TYPE_AND_SHAPE, static_cast<const OrtValue*>(value), &info);
    const Owned<OrtTensorTypeAndShapeInfo, RELEASE_TYPE_AND_SHAPE> kept(info);
    int type = 0;
    size_t count = 0;
    call(ELEMENT_TYPE, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &type);
    call(ELEMENT_COUNT, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &count);
    if (type != FLOAT32) throw Error("onnxruntime: gave numbers that are not float32");
    void* data = nullptr;
    call(TENSOR_DATA, value, &data);
    return {static_cast<float*>(data), count};
}

/// The library's environment, one for the whole process.
class Environment {
  public:
    Environment() {
        OrtEnv* made = nullptr;
        call(CREATE_ENV, LOG_FATAL, "pocketvlm", &made);
        environment_.reset(made);
    }

    /// Settings as runtime/providers.py makes them for the CPU (threads that wait spin, as is onnxruntime's default).
    Session open(const std::string& path, int threads) const {
        OrtSessionOptions* options = nullptr;
        call(CREATE_SESSION_OPTIONS, &options);
        const Owned<OrtSessionOptions, RELEASE_SESSION_OPTIONS> kept(options);
        call(SET_INTRA_THREADS, options, threads);
        call(SET_INTER_THREADS, options, 1);
        call(SET_LOG_SEVERITY, options, LOG_FATAL);
        OrtSession* made = nullptr;
        call(CREATE_SESSION, static_cast<const OrtEnv*>(environment_.get()), path.c_str(),
             static_cast<const OrtSessionOptions*>(options), &made);
        return Session(made);
    }

  private:
    Owned<OrtEnv, RELEASE_ENV> environment_;
};

/// Names and values of one run. An output without a value is made by onnxruntime.
class Run {
  public:
    void input(const std::string& name, const OrtValue* value) {
        input_names_.push_back(name.c_str());
        inputs_.push_back(value);
    }

    void output(const std::string& name, OrtValue* value = nullptr) {
        output_names_.push_back(name.c_str());
        outputs_.push_back(value);
    }

    /// The outputs that onnxruntime made, in their order. Names must still be where they were.
    std::vector<Value> run(OrtSession* session) {
        std::vector<OrtValue*> found = outputs_;
        call(RUN, session, static_cast<const OrtRunOptions*>(nullptr), input_names_.data(), inputs_.data(),
             inputs_.size(), output_names_.data(), output_names_.size(), found.data());
        std::vector<Value> made;
        for (size_t i = 0; i < found.size(); ++i) {
            if (!outputs_[i]) made.emplace_back(found[i]);
        }
        return made;
    }

  private:
    std::vector<const char*> input_names_, output_names_;
    std::vector<const OrtValue*> inputs_;
    std::vector<OrtValue*> outputs_;
};

}  // namespace ort
