#!/bin/sh
# The ONNX runner for Android on Arm, for `pocketvlm bench --on adb://... --on-runner FOLDER/onnx-runner`.
#   sh build_onnx.sh FOLDER                       Debian's cross compiler; its C library goes with the program
#   NDK=DIR AAR=FILE sh build_onnx.sh FOLDER      Android's own: an NDK, and onnxruntime-android-VERSION.aar of
#                                                 Maven Central (com.microsoft.onnxruntime)
# The program's path is the last line that it prints; what lies beside it is pushed with it.
# No header of onnxruntime is needed. The first way takes libonnxruntime.so out of the arm64 wheel.
# Needs: the first way g++-aarch64-linux-gnu and pip; both python3.
set -eu
sources=$(cd "$(dirname "$0")" && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
version=${ONNXRUNTIME:-1.31.1}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ -n "${NDK:-}" ]; then
  python3 -m zipfile -e "$AAR" "$scratch"
  cp "$scratch/jni/arm64-v8a/libonnxruntime.so" "$folder/"
  compiler=$(ls "$NDK"/toolchains/llvm/prebuilt/*/bin/aarch64-linux-android26-clang++)
  "$compiler" -std=c++17 -O2 -Wall -static-libstdc++ -s -o "$folder/onnx-runner" "$sources/onnx_runner.cpp" \
    "$folder/libonnxruntime.so"
else
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --dest "$scratch" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 "onnxruntime==$version"
  python3 -m zipfile -e "$scratch"/onnxruntime-*.whl "$scratch"
  library=$(ls "$scratch"/onnxruntime/capi/libonnxruntime.so.*)
  name=$(aarch64-linux-gnu-readelf -d "$library" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')
  cp "$library" "$folder/$name"
  aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -s -o "$folder/onnx-runner" "$sources/onnx_runner.cpp" "$folder/$name"
  for name in ld-linux-aarch64.so.1 libc.so.6 libm.so.6 libdl.so.2 librt.so.1 libpthread.so.0 libgcc_s.so.1 \
    libstdc++.so.6; do
    cp -L "$(aarch64-linux-gnu-g++ -print-file-name="$name")" "$folder/"
  done
fi
echo "$folder/onnx-runner"
