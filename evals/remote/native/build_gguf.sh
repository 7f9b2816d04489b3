#!/bin/sh
# The GGUF runner for Android on Arm, one static program, for
# `pocketvlm bench --on adb://... --on-runner FOLDER/gguf-runner`.
#   sh build_gguf.sh FOLDER      the program's path is the last line that it prints
# llama.cpp's sources are those in the archive of llama-cpp-python, so that it is as old as the library here.
# Static against Debian's glibc: it needs no NDK, and neither GPU nor NPU is used.
# Needs: apt-get install cmake g++-aarch64-linux-gnu; pip
set -eu
sources=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
version=${LLAMA_CPP_PYTHON:-0.3.36}
architecture=${ARCHITECTURE:-armv8.2-a+dotprod} # phones since about 2018
llama=$folder/llama_cpp_python-$version/vendor/llama.cpp

[ -d "$llama" ] || {
  python3 -m pip download --no-deps --no-binary :all: --dest "$folder" "llama-cpp-python==$version"
  tar -xf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
}
cat > "$folder/toolchain.cmake" <<'END'
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
END
cmake -S "$llama" -B "$folder/build" \
  -DCMAKE_TOOLCHAIN_FILE="$folder/toolchain.cmake" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_CPU_ARM_ARCH="$architecture" \
  -DLLAMA_BUILD_MTMD=ON -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_APP=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build "$folder/build" --target llama mtmd -j "${JOBS:-$(nproc)}"
cd "$folder/build"
aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -s -static -DBACKEND_VERSION="\"llama-cpp-python $version\"" \
  -I "$llama/include" -I "$llama/ggml/include" -I "$llama/tools/mtmd" \
  -o "$folder/gguf-runner" "$sources/gguf_runner.cpp" \
  tools/mtmd/libmtmd.a src/libllama.a ggml/src/libggml.a ggml/src/libggml-cpu.a ggml/src/libggml-base.a
echo "$folder/gguf-runner"
