// What the passes of a batch norm with its activation share: out = act((x - mean) * scale + bias) over rows of
// channels.
#pragma once
#include "cpu/mbconv.h"

namespace pf::cpu {

template <typename T>
struct NormArgs {
  int64_t channels;
  ActivationForm activation;
  T low, high;
  const T *mean, *scale, *bias;  // [blocks(channels)][16]
};

}  // namespace pf::cpu
