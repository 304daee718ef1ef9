// Between channels-last rows and blocks of 16 channels, and the moments of a block.
#pragma once
#include "cpu/kernels/vec.h"
#include "cpu/mbconv.h"

namespace pf::cpu::PF_ISA {

// Calls body(offset, n) for the vectors of one row of c channels: n = width but for the last.
template <typename T, typename Body>
PF_INLINE void for_vectors(int64_t c, Body body) {
  constexpr int w = Vec<T>::width;
  int64_t i = 0;
  for (; i + w <= c; i += w) body(i, w);
  if (i < c) body(i, static_cast<int>(c - i));
}

template <typename T>
PF_INLINE Vec<T> load_some(const T* p, int n) {
  return n == Vec<T>::width ? Vec<T>::load(p) : Vec<T>::load(p, n);
}
template <typename T>
PF_INLINE void store_some(Vec<T> v, T* p, int n) {
  if (n == Vec<T>::width)
    v.store(p);
  else
    v.store(p, n);
}

template <typename T>
PF_INLINE void zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// Where channel i of a pixel lies in blocks `block_size` elements apart.
PF_HELPER int64_t in_block(int64_t i, int64_t block_size) { return i / lanes * block_size + i % lanes; }

// blocks[c / 16][pixel][c % 16] = x[pixel][c] - center[c], and zeros up to the end of the last block.
template <typename T>
void pack(const T* x, int64_t pixels, int64_t c, const T* center, T* out, int64_t block_size) {
  using V = Vec<T>;
  constexpr int w = V::width;
  const int64_t end = blocks(c) * lanes;
  for (int64_t p = 0; p < pixels; ++p, x += c, out += lanes) {
    for_vectors<T>(c, [&](int64_t i, int n) __attribute__((always_inline)) {
      (load_some(x + i, n) - V::load(center + i)).store(out + in_block(i, block_size));
    });
    for (int64_t i = (c + w - 1) / w * w; i < end; i += w) V::zero().store(out + in_block(i, block_size));
  }
}

// x[pixel][c] = blocks[c / 16][pixel][c % 16] (+ bias[c])
template <typename T>
void unpack(const T* in, int64_t block_size, int64_t pixels, int64_t c, const T* bias, T* x) {
  using V = Vec<T>;
  for (int64_t p = 0; p < pixels; ++p, x += c, in += lanes)
    for_vectors<T>(c, [&](int64_t i, int n) __attribute__((always_inline)) {
      V v = V::load(in + in_block(i, block_size));
      if (bias != nullptr) v = v + V::load(bias + i);
      store_some(v, x + i, n);
    });
}

// Merges the pixels of one block into its moments. Sums run about the first pixel of a short run, in T, and runs are
// merged in double (Chan, Golub, LeVeque 1979).
template <typename T>
void add_moments(const T* x, int64_t pixels, double count, double* mean, double* m2) {
  using V = Vec<T>;
  constexpr int w = V::width;
  constexpr int64_t run = 256;
  for (int64_t start = 0; start < pixels; start += run) {
    const int64_t n = start + run < pixels ? run : pixels - start;
    for (int64_t v = 0; v < lanes; v += w) {
      const T* p = x + start * lanes + v;
      const V pivot = V::load(p);
      V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()}, ss[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      int64_t i = 0;
      for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
          const V t = V::load(p + (i + u) * lanes) - pivot;
          s[u] = s[u] + t;
          ss[u] = fma(t, t, ss[u]);
        }
      for (; i < n; ++i) {
        const V t = V::load(p + i * lanes) - pivot;
        s[0] = s[0] + t;
        ss[0] = fma(t, t, ss[0]);
      }
      const V sum = (s[0] + s[1]) + (s[2] + s[3]), square = (ss[0] + ss[1]) + (ss[2] + ss[3]);
      const double a = count, b = static_cast<double>(n), share = b / (a + b);
      for (int c = 0; c < w; ++c) {
        const double offset = static_cast<double>(sum.v[c]) / b;
        const double delta = static_cast<double>(pivot.v[c]) + offset - mean[v + c];
        m2[v + c] += static_cast<double>(square.v[c]) - offset * offset * b + delta * delta * a * share;
        mean[v + c] += delta * share;
      }
    }
    count += static_cast<double>(n);
  }
}

}  // namespace pf::cpu::PF_ISA
