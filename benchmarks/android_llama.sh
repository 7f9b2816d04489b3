#!/bin/sh
# llama.cpp's llama-mtmd-cli as one static aarch64 program, for `pocketvlm bench --on adb://... --on-runner`.
#   sh benchmarks/android_llama.sh FOLDER      the program's path is the last line that it prints
# The sources are those in the archive of llama-cpp-python, so that the program is as old as the library here.
# Static against Debian's glibc: it needs no NDK, and neither GPU nor NPU is used.
# Needs: apt-get install cmake g++-aarch64-linux-gnu; pip
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
version=${LLAMA_CPP_PYTHON:-0.3.36}
architecture=${ARCHITECTURE:-armv8.2-a+dotprod} # phones since about 2018

cd "$folder"
[ -d "llama_cpp_python-$version" ] || {
  python3 -m pip download --no-deps --no-binary :all: "llama-cpp-python==$version"
  tar -xf "llama_cpp_python-$version.tar.gz"
}
cat > toolchain.cmake <<'END'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
END
cmake -S "llama_cpp_python-$version/vendor/llama.cpp" -B build \
  -DCMAKE_TOOLCHAIN_FILE="$folder/toolchain.cmake" -DCMAKE_BUILD_TYPE=Release \
  -DBUILD_SHARED_LIBS=OFF -DCMAKE_EXE_LINKER_FLAGS=-static \
  -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_CPU_ARM_ARCH="$architecture" \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build build --target llama-mtmd-cli -j "$(nproc)"
aarch64-linux-gnu-strip build/bin/llama-mtmd-cli
echo "$folder/build/bin/llama-mtmd-cli"
