// What the passes of a dense convolution with its batch norm and activation share: out = act(W (window - center) +
// bias), where a window is the kernel * kernel * ci values under an output pixel, in the order (ky, kx, c), with zeros
// outside of the image. For few inputs (a stem on RGB), where all windows' covariance is cheaper than writing the
// convolution's output to read its statistics.
#pragma once
#include "cpu/mbconv.h"

namespace pf::cpu {

template <typename T>
struct ConvArgs {
  int64_t images, ci, co, h, w, ho, wo, kernel, stride;
  ActivationForm activation;
  T low, high;
  const T* x;       // (images, h, w, ci)
  const T* center;  // [blocks(depth)][16]
  const T* weight;  // [blocks(co)][depth][16]
  const T* bias;    // [blocks(co)][16]
};

template <typename T>
PF_HELPER int64_t depth(const ConvArgs<T>& f) {
  return f.kernel * f.kernel * f.ci;
}
// Output rows that go through a pass together.
template <typename T>
PF_HELPER int64_t conv_rows(const ConvArgs<T>& f) {
  return f.wo >= 256 ? 1 : 256 / f.wo;
}
template <typename T>
PF_HELPER int64_t
conv_scratch(const ConvArgs<T>& f) {  // a row of windows as they lie in x, tiles of windows and of out
  const int64_t wide = blocks(depth(f)) * lanes, pixels = conv_rows(f) * f.wo;
  return f.wo * wide + pixels * (wide + blocks(f.co) * lanes) + (wide + lanes) * lanes;
}

}  // namespace pf::cpu
