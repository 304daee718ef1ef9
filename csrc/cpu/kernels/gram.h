// The Gram matrix of a tile of rows that is packed in blocks.
#pragma once
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace pf::cpu::PF_ISA {

// Adds the sums of c channels and the upper triangle of their products, gram[c * c], over a tile [block][row][16];
// scratch: blocks(c) * 16 * 16.
template <typename T>
void add_gram(const T* packed, int64_t rows, int64_t c, double* sum, double* gram, T* scratch) {
  using V = Vec<T>;
  constexpr int w = V::width;
  const int64_t n = blocks(c), size = rows * lanes;
  for (int64_t i = 0; i < n * lanes; i += w) {
    V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const T* p = packed + in_block(i, size);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) s[u] = s[u] + V::load(p + (r + u) * lanes);
    for (; r < rows; ++r) s[0] = s[0] + V::load(p + r * lanes);
    const V total = (s[0] + s[1]) + (s[2] + s[3]);
    for (int j = 0; j < w && i + j < c; ++j) sum[i + j] += static_cast<double>(total.v[j]);
  }
  for (int64_t b = 0; b < n; ++b) {
    const int64_t height = c - b * lanes < lanes ? c - b * lanes : lanes;
    product<T, true>(height, n - b,
                     {packed + b * size, 0, packed + b * size, size, rows, scratch, lanes * lanes, Out::store});
    for (int64_t j = b * lanes; j < c; j += lanes) {
      const int64_t width = c - j < lanes ? c - j : lanes;
      const T* t = scratch + (j - b * lanes) * lanes;
      for (int64_t i = 0; i < height; ++i, t += lanes)
        for (int64_t l = 0; l < width; ++l) gram[(b * lanes + i) * c + j + l] += static_cast<double>(t[l]);
    }
  }
}

}  // namespace pf::cpu::PF_ISA
