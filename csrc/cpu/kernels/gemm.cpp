// The register tile that every matrix product here is made of: up to `rows` rows by `blocks` blocks of 16 columns, rows
// of A broadcast against vectors of B, all addresses of a step constant offsets from one pointer.
#include "cpu/kernels/gemm.h"

#include <utility>

namespace pf::cpu::PF_ISA {

namespace {

template <typename T>
struct RegisterTile {
  static constexpr int vectors = static_cast<int>(lanes) / Vec<T>::width;  // of a block
  static constexpr int blocks = vectors == 1 ? 2 : 1;
  static constexpr int spare = vector_registers == 32 ? 28 : 12;  // accumulators; the rest hold A and B
  static constexpr int rows = spare / (vectors * blocks) > 0 ? spare / (vectors * blocks) : 1;
};

template <typename T, int R, int B, bool Transposed>
void product_tile(const ProductArgs<T>& p) {
  using V = Vec<T>;
  constexpr int w = V::width, vectors = RegisterTile<T>::vectors, n = B * vectors;
  constexpr int64_t step = Transposed ? 1 : lanes;
  V acc[R][n];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) acc[r][j] = V::zero();
  const T* b = p.b;
  const auto rank_one = [&](const T* a) __attribute__((always_inline)) {
    V bv[n];
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) bv[j] = V::load(b + j / vectors * p.b_block + j % vectors * w);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const V av = V::broadcast(a[r * step]);
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) acc[r][j] = fma(av, bv[j], acc[r][j]);
    }
    b += lanes;
  };
  if constexpr (Transposed) {
    const T* a = p.a;
    for (int64_t k = 0; k < p.k; ++k, a += lanes) rank_one(a);
  } else {
    const T* a = p.a;
    int64_t k = p.k;
    for (; k >= lanes; k -= lanes, a += p.a_block)
#pragma GCC unroll 4
      for (int i = 0; i < lanes; ++i) {
        rank_one(a + i);
        if (p.ahead != nullptr) p.ahead->one();
      }
    for (int i = 0; i < k; ++i) {
      rank_one(a + i);
      if (p.ahead != nullptr) p.ahead->one();
    }
  }
  const V low = V::broadcast(p.low), high = V::broadcast(p.high);
#pragma GCC unroll 16
  for (int j = 0; j < n; ++j) {
    T* c = p.c + j / vectors * p.c_block + j % vectors * w;
    if (p.out == Out::clamp) {
      const V bias = V::load(p.bias + j * w);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) clamp(acc[r][j] + bias, low, high).store(c + r * lanes);
    } else if (p.out == Out::add) {
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) (acc[r][j] + V::load(c + r * lanes)).store(c + r * lanes);
    } else {
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) acc[r][j].store(c + r * lanes);
    }
  }
}

template <typename T, int B, bool Transposed, int... R>
void product_rows(int rows, const ProductArgs<T>& p, std::integer_sequence<int, R...>) {
  static constexpr void (*tiles[])(const ProductArgs<T>&) = {product_tile<T, R + 1, B, Transposed>...};
  tiles[rows - 1](p);
}

}  // namespace

template <typename T, bool Transposed>
void product(int64_t rows, int64_t columns, const ProductArgs<T>& all) {
  constexpr int most = RegisterTile<T>::rows < lanes ? RegisterTile<T>::rows : static_cast<int>(lanes);
  const int64_t tiles = (rows + most - 1) / most;
  for (int64_t j = 0; j < columns; j += RegisterTile<T>::blocks) {
    ProductArgs<T> p = all;
    p.b += j * all.b_block;
    if (all.bias != nullptr) p.bias += j * lanes;
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t next = rows * (i + 1) / tiles;  // tiles of nearly equal height: none is too low to hide latency
      p.a = all.a + row * (Transposed ? 1 : lanes);
      p.c = all.c + j * all.c_block + row * lanes;
      const auto heights = std::make_integer_sequence<int, most>();
      if (RegisterTile<T>::blocks == 2 && j + 1 < columns)
        product_rows<T, RegisterTile<T>::blocks, Transposed>(static_cast<int>(next - row), p, heights);
      else
        product_rows<T, 1, Transposed>(static_cast<int>(next - row), p, heights);
      row = next;
    }
  }
}

template void product<float, false>(int64_t, int64_t, const ProductArgs<float>&);
template void product<float, true>(int64_t, int64_t, const ProductArgs<float>&);
template void product<double, false>(int64_t, int64_t, const ProductArgs<double>&);
template void product<double, true>(int64_t, int64_t, const ProductArgs<double>&);

}  // namespace pf::cpu::PF_ISA
