#!/bin/sh
# Compiles the kernels for aarch64 (NEON) and runs kernels_test.cpp under emulation. Needs aarch64-linux-gnu-g++ and
# qemu-aarch64-static (Debian: g++-aarch64-linux-gnu, qemu-user-static). Usage: csrc/tests/aarch64.sh [build folder]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-"$here/../build/aarch64"}
mkdir -p "$build"
aarch64-linux-gnu-g++ -std=c++20 -O2 -Wall -Wextra -Werror -fno-math-errno -ffp-contract=fast -static -DPF_ISA=baseline \
  -I"$here" "$here"/cpu/kernels/*.cpp "$here/cpu/dispatch.cpp" "$here/tests/kernels_test.cpp" \
  -o "$build/kernels_test"
qemu-aarch64-static "$build/kernels_test"
