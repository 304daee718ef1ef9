// The tensor-core instruction of the expansion: 16 x 8 products over 16, float32 sums.
#pragma once
#include <type_traits>

#include "cuda/kernels/tile.cuh"

namespace pf::cuda {

// Of mma.m16n8k16: which of the 32 lanes holds which elements. Lane 4 g + t has rows g and g + 8 of the product and its
// columns 2 t and 2 t + 1; of the left factor the same rows, of the right factor column g, and of both the elements
// 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 along the sum.
inline constexpr int mma_rows = 16, mma_columns = 8, mma_depth = 16, warp_size = 32;

// Two neighbours along the sum in a register, the first in the low half.
struct MmaLeft {
  uint32_t v[4];  // row g; row g + 8; row g, 8 further along; row g + 8, 8 further along
};
struct MmaRight {
  uint32_t v[2];  // column g; column g, 8 further along
};
struct MmaSums {
  float v[4] = {};  // row g: two columns; row g + 8: the same two
};

// The instruction is there from sm_80 on; the host entry sends nothing older here.
#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define PF_MMA(type) __trap()
#else
#define PF_MMA(type)                                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum.v[0]), "+f"(sum.v[1]), "+f"(sum.v[2]), "+f"(sum.v[3])       \
               : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]))
#endif

// sum += a * b, by all lanes of a warp together.
template <typename T>
__device__ inline void multiply_add(MmaSums& sum, const MmaLeft& a, const MmaRight& b) {
  if constexpr (std::is_same_v<T, Half>)
    PF_MMA("f16");
  else
    PF_MMA("bf16");
}
#undef PF_MMA
__device__ inline float exponential(float x) { return __expf(x); }
#else
template <typename T>
inline void multiply_add(MmaSums& sum, const MmaLeft& a, const MmaRight& b) {
  emulation::multiply_add<T>(sum.v, a.v, b.v);
}
inline float exponential(float x) { return std::exp(x); }
#endif

}  // namespace pf::cuda
