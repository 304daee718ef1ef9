// Activations and their derivatives on vectors. clamp covers ReLU6, ReLU and identity, and its derivative can be read
// off its value; the others need the pre-activation.
#pragma once
#include "cpu/kernels/vec.h"
#include "cpu/mbconv.h"

namespace pf::cpu::PF_ISA {

// exp by 2^n * Taylor of the rest, |rest| <= log(2)/2: to rounding in both precisions.
template <typename T>
PF_INLINE Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  constexpr bool single = sizeof(T) == 4;
  constexpr int bits = single ? 23 : 52, bias = single ? 127 : 1023, terms = single ? 7 : 13;
  const T limit = single ? T(87) : T(708);
  x = clamp(x, V::broadcast(-limit), V::broadcast(limit));
  const V shift = V::broadcast(single ? T(12582912.0) : T(6755399441055744.0));  // 1.5 * 2^bits: adding it rounds
  const V n = fma(x, V::broadcast(T(1.4426950408889634)), shift) - shift;
  V r = fma(n, V::broadcast(single ? T(-0.693359375) : T(-0.6931471803691238)), x);
  r = fma(n, V::broadcast(single ? T(2.12194440e-4) : T(-1.9082149292705877e-10)), r);
  V p = V::broadcast(1);
  for (int i = terms; i > 0; --i) p = fma(p, r * V::broadcast(T(1) / T(i)), V::broadcast(1));
  const typename V::Mask exponent = (__builtin_convertvector(n.v, typename V::Mask) + bias) << bits;
  return p * V{reinterpret_cast<typename V::Native>(exponent)};
}

template <typename T, ActivationForm A>
struct VectorActivation {
  using V = Vec<T>;
  V low, high;
  template <typename Params>
  explicit PF_INLINE VectorActivation(const Params& f) : low(V::broadcast(f.low)), high(V::broadcast(f.high)) {}

  PF_INLINE V value(V u) const {
    if constexpr (A == ActivationForm::clamp) return clamp(u, low, high);
    if constexpr (A == ActivationForm::silu) return u / (V::broadcast(1) + exp(V::zero() - u));
    if constexpr (A == ActivationForm::hardswish) return u * gate(u);
  }
  // g * derivative at u; for clamp, u may be the value itself.
  PF_INLINE V back(V u, V g) const {
    if constexpr (A == ActivationForm::clamp) return select<T>((u > low) & (u < high), g, V::zero());
    if constexpr (A == ActivationForm::silu) {
      const V one = V::broadcast(1), s = one / (one + exp(V::zero() - u));
      return g * s * fma(u, one - s, one);
    }
    if constexpr (A == ActivationForm::hardswish) {
      const V three = V::broadcast(3), inside = fma(u, V::broadcast(T(1) / 3), V::broadcast(T(0.5)));
      const V slope = select<T>(u > three, V::broadcast(1), select<T>(u < V::zero() - three, V::zero(), inside));
      return g * slope;
    }
  }

 private:
  static PF_INLINE V gate(V u) {
    return clamp(u + V::broadcast(3), V::zero(), V::broadcast(6)) * V::broadcast(T(1) / 6);
  }
};

// Calls body(VectorActivation) with the activation of f as a compile-time choice.
template <typename T, typename Params, typename Body>
PF_INLINE void with_activation(const Params& f, Body body) {
  if (f.activation == ActivationForm::silu)
    body(VectorActivation<T, ActivationForm::silu>(f));
  else if (f.activation == ActivationForm::hardswish)
    body(VectorActivation<T, ActivationForm::hardswish>(f));
  else
    body(VectorActivation<T, ActivationForm::clamp>(f));
}

}  // namespace pf::cpu::PF_ISA
