#!/bin/sh
# Builds csrc/tests/kernels_test.cpp with AddressSanitizer and UndefinedBehaviorSanitizer, once for each instruction set,
# and runs it with those this machine has. Usage: csrc/tests/sanitize.sh [build folder]
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-"$here/../build/sanitize"}
mkdir -p "$build"
flags="-std=c++20 -O1 -g -Wall -Wextra -Werror -fno-math-errno -ffp-contract=fast -fsanitize=address,undefined
  -fno-sanitize-recover=all -I$here"
cxx=${CXX:-c++}
sets="baseline"
have=""
case $(uname -m) in x86_64 | amd64)
  sets="baseline avx2 avx512"
  have="-DPF_HAVE_AVX2 -DPF_HAVE_AVX512" ;;
esac
for set in $sets; do
  case $set in
    avx2) options="-mavx2 -mfma -mf16c" ;;
    avx512) options="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512" ;;
    *) options="" ;;
  esac
  compilers=""
  for source in "$here"/cpu/kernels/*.cpp; do
    $cxx $flags $options -DPF_ISA="$set" -c "$source" -o "$build/$set-$(basename "$source" .cpp).o" &
    compilers="$compilers $!"
  done
  for compiler in $compilers; do wait "$compiler"; done
done
$cxx $flags $have "$here/tests/kernels_test.cpp" "$here/cpu/dispatch.cpp" "$build"/*-*.o -o "$build/kernels_test"
"$build/kernels_test"  # the best instruction set of this machine
for set in $sets; do
  if PROXYLESS_FAST_ISA=$set "$build/kernels_test" > "$build/$set.log" 2>&1; then
    cat "$build/$set.log"
  elif grep -q "but this machine runs" "$build/$set.log"; then
    echo "$set: not on this machine"
  else
    cat "$build/$set.log"
    exit 1
  fi
done
