// Type, kernel size and stride become compile-time once, here.
#pragma once
#include "cuda/kernels/tile.cuh"

namespace pf::cuda {

template <typename T, typename Run>
void dispatch_size(const KernelShape& s, const Run& run) {
  const auto stride = [&]<int K>() {
    s.stride == 1 ? run.template operator()<T, K, 1>() : run.template operator()<T, K, 2>();
  };
  switch (s.kernel) {
    case 3:
      return stride.template operator()<3>();
    case 5:
      return stride.template operator()<5>();
    default:
      return stride.template operator()<7>();
  }
}

template <typename Run>
void dispatch_half(const KernelShape& s, const Run& run) {
  s.type == ElementType::f16 ? dispatch_size<Half>(s, run) : dispatch_size<BFloat16>(s, run);
}

template <typename Run>
void dispatch(const KernelShape& s, const Run& run) {
  switch (s.type) {
    case ElementType::f16:
    case ElementType::bf16:
      return dispatch_half(s, run);
#ifdef PF_EMULATION
    case ElementType::f64:
      return dispatch_size<double>(s, run);
#endif
    default:
      return dispatch_size<float>(s, run);
  }
}

}  // namespace pf::cuda
