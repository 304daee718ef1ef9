// Rows of a depthwise convolution and of its weight gradient, for one block of 16 channels: vectors run over channels,
// registers hold several output pixels (or taps).
#pragma once
#include <type_traits>

#include "cpu/kernels/vec.h"
#include "cpu/mbconv.h"

namespace pf::cpu::PF_ISA {

// out[i] = sum over rows r and taps t of in[r][i * S + t] * taps[r][t], for N neighbouring pixels i.
template <typename T, int K, int S, int N>
PF_INLINE void depthwise_tile(T* out, int64_t out_step, const T* in, int64_t in_row, int64_t rows, const T* taps) {
  using V = Vec<T>;
  V acc[N];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) acc[i] = V::zero();
  for (int64_t r = 0; r < rows; ++r, in += in_row, taps += K * lanes) {
    V tap[K];
#pragma GCC unroll 8
    for (int t = 0; t < K; ++t) tap[t] = V::load(taps + t * lanes);
#pragma GCC unroll 64
    for (int j = 0; j < (N - 1) * S + K; ++j) {
      const V v = V::load(in + j * lanes);
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i)
        if (j - i * S >= 0 && j - i * S < K) acc[i] = fma(v, tap[j - i * S], acc[i]);
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) acc[i].store(out + i * out_step);
}

template <typename T, int K, int S>
void depthwise_row(int64_t n, T* out, int64_t out_step, const T* in, int64_t in_row, int64_t rows, const T* taps) {
  constexpr int w = Vec<T>::width;
  for (int64_t v = 0; v < lanes; v += w) {
    int64_t i = 0;
    const auto at = [&](auto count) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      for (; i + N <= n; i += N)
        depthwise_tile<T, K, S, N>(out + i * out_step + v, out_step, in + i * S * lanes + v, in_row, rows, taps + v);
    };
    if constexpr (vector_registers == 32) at(std::integral_constant<int, 14>());
    at(std::integral_constant<int, 7>());
    at(std::integral_constant<int, 3>());
    at(std::integral_constant<int, 1>());
  }
}

// grad[t] += sum over rows r and pixels i of h[r][i] * dd[r][i + t], t < K.
template <typename T, int K>
void depthwise_taps(int64_t n, int64_t rows, const T* h, int64_t h_step, int64_t h_row, const T* dd, int64_t dd_row,
                    double* grad, int64_t grad_step) {
  using V = Vec<T>;
  constexpr int w = V::width, N = 4, sets = K >= 6 ? 1 : K >= 3 ? 2 : 4;  // enough sums under way to hide the latency
  for (int64_t v = 0; v < lanes; v += w) {
    V acc[sets][K];
#pragma GCC unroll 4
    for (int s = 0; s < sets; ++s)
#pragma GCC unroll 8
      for (int t = 0; t < K; ++t) acc[s][t] = V::zero();
    for (int64_t r = 0; r < rows; ++r) {
      const T* a = h + r * h_row + v;
      const T* b = dd + r * dd_row + v;
      int64_t i = 0;
      for (; i + N <= n; i += N, a += N * h_step, b += N * lanes) {
        V hv[N];
#pragma GCC unroll 4
        for (int u = 0; u < N; ++u) hv[u] = V::load(a + u * h_step);
#pragma GCC unroll 16
        for (int j = 0; j < N + K - 1; ++j) {
          const V dv = V::load(b + j * lanes);
#pragma GCC unroll 4
          for (int u = 0; u < N; ++u)
            if (j - u >= 0 && j - u < K) acc[u % sets][j - u] = fma(hv[u], dv, acc[u % sets][j - u]);
        }
      }
      for (; i < n; ++i, a += h_step, b += lanes) {
        const V hv = V::load(a);
#pragma GCC unroll 8
        for (int t = 0; t < K; ++t) acc[0][t] = fma(hv, V::load(b + t * lanes), acc[0][t]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < K; ++t) {
      V total = acc[0][t];
#pragma GCC unroll 4
      for (int s = 1; s < sets; ++s) total = total + acc[s][t];
      for (int c = 0; c < w; ++c) grad[t * grad_step + v + c] += static_cast<double>(total.v[c]);
    }
  }
}

}  // namespace pf::cpu::PF_ISA
