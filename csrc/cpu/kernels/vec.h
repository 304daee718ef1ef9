// One vector type per instruction set, written with the compiler's vector extension, so that the same source gives
// SSE2, AVX2, AVX-512 or NEON code by the flags it is compiled with.
#pragma once
#include <cstdint>
#include <cstring>

#define PF_CONCAT_(a, b) a##b

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
struct Vec {
  static constexpr int width = vector_bytes / static_cast<int>(sizeof(T));
  typedef T Native __attribute__((vector_size(vector_bytes)));
  Native v;

  static Vec zero() { return {Native{}}; }
  static Vec broadcast(T x) { return {Native{} + x}; }
  static Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(Native));
    return r;
  }
  // The first n elements; the others are zero.
  static Vec load(const T* p, int n) {
    Vec r = zero();
    std::memcpy(&r.v, p, static_cast<size_t>(n) * sizeof(T));
    return r;
  }
  void store(T* p) const { std::memcpy(p, &v, sizeof(Native)); }
  void store(T* p, int n) const { std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(T)); }
  T sum() const {
    T s = 0;
    for (int i = 0; i < width; ++i) s += v[i];
    return s;
  }
  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
};

// a * b + c, contracted to one instruction where there is one (-ffp-contract=fast).
template <typename T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}

}  // namespace pf::cpu::PF_ISA
