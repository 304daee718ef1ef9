// One vector type per instruction set, written with the compiler's vector extension, so that the same source gives
// SSE2, AVX2, AVX-512 or NEON code by the flags it is compiled with.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PF_INLINE inline __attribute__((always_inline))

namespace pf::cpu::PF_ISA {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
inline constexpr int vector_registers = 32;
#elif defined(__AVX2__)
inline constexpr int vector_bytes = 32;
inline constexpr int vector_registers = 16;
#else
inline constexpr int vector_bytes = 16;
#if defined(__aarch64__)
inline constexpr int vector_registers = 32;
#else
inline constexpr int vector_registers = 16;
#endif
#endif

template <typename T>
struct MaskElement;
template <>
struct MaskElement<float> {
  using Int = int32_t;
};
template <>
struct MaskElement<double> {
  using Int = int64_t;
};

template <typename T>
struct Vec {
  static constexpr int width = vector_bytes / static_cast<int>(sizeof(T));
  using Int = typename MaskElement<T>::Int;
  typedef T Native __attribute__((vector_size(vector_bytes)));
  typedef Int Mask __attribute__((vector_size(vector_bytes)));
  Native v;

  static PF_INLINE Vec zero() { return {Native{}}; }
  static PF_INLINE Vec broadcast(T x) { return {x - Native{}}; }  // x - 0 is x, to the sign of zero: no instruction
  static PF_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(Native));
    return r;
  }
  PF_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(Native)); }

  // The first n elements (0 <= n <= width); the others are zero, and not touched in memory.
  static PF_INLINE Vec load(const T* p, int n) {
    Vec r = zero();
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      r.v = (Native)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
    else
      r.v = (Native)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      r.v = (Native)_mm256_maskload_ps(reinterpret_cast<const float*>(p), first(n));
    else
      r.v = (Native)_mm256_maskload_pd(reinterpret_cast<const double*>(p), first(n));
#else
    for (int i = 0; i < width; ++i)
      if (i < n) r.v[i] = p[i];
#endif
    return r;
  }
  PF_INLINE void store(T* p, int n) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    else
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      _mm256_maskstore_ps(reinterpret_cast<float*>(p), first(n), (__m256)v);
    else
      _mm256_maskstore_pd(reinterpret_cast<double*>(p), first(n), (__m256d)v);
#else
    for (int i = 0; i < width; ++i)
      if (i < n) p[i] = v[i];
#endif
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  static PF_INLINE __m256i first(int n) {
    Mask m;
    for (int i = 0; i < width; ++i) m[i] = i < n ? -1 : 0;
    return (__m256i)m;
  }
#endif

  PF_INLINE T sum() const {
    T s = 0;
    for (int i = 0; i < width; ++i) s += v[i];
    return s;
  }
  friend PF_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend PF_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend PF_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend PF_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend PF_INLINE Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  friend PF_INLINE Mask operator<(Vec a, Vec b) { return a.v < b.v; }
};

// a * b + c, contracted to one instruction where there is one (-ffp-contract=fast).
template <typename T>
PF_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}

template <typename T>
PF_INLINE Vec<T> select(typename Vec<T>::Mask m, Vec<T> yes, Vec<T> no) {
  return {m ? yes.v : no.v};
}

// A NaN passes through, as in torch.clamp.
template <typename T>
PF_INLINE Vec<T> clamp(Vec<T> x, Vec<T> low, Vec<T> high) {
  x = select<T>(low > x, low, x);
  return select<T>(high < x, high, x);
}

}  // namespace pf::cpu::PF_ISA
