// The launches of csrc/cuda/kernels/*.cu on the CPU; each of them is emulated in a file of its own, to compile side by
// side.
#pragma once
#include "cuda/kernels/dispatch.cuh"
#include "cuda/kernels/reduce.cuh"
#include "emulation.h"

namespace pf::cuda {

// The first stage: every block of a tiling.
template <typename Kernel>
void launch_tiles(const Tiling& t, const Kernel& kernel) {
  pf::emulation::launch({static_cast<unsigned>(t.chunks), static_cast<unsigned>(t.groups)}, t.threads, t.shared_bytes,
                        kernel);
}

template <typename Kernel>
void launch_reduction(int items, const Kernel& kernel) {
  pf::emulation::launch({static_cast<unsigned>((items + reduce_lanes - 1) / reduce_lanes)}, reduce_threads,
                        reduce_shared, kernel);
}

// The second stage.
inline void finish(const ForwardArgs& p) {
  launch_reduction(p.shape.channels, [&] {
    p.shape.type == ElementType::f64 ? finish_statistics<double>(p) : finish_statistics<float>(p);
  });
}

inline void finish(const BackwardArgs& p) {
  if (p.partial == nullptr) return;
  launch_reduction(p.shape.kernel * p.shape.kernel * p.shape.channels,
                   [&] { p.shape.type == ElementType::f64 ? finish_weight<double>(p) : finish_weight<float>(p); });
}

}  // namespace pf::cuda
