#include "cuda/kernels/depthwise_forward.cuh"

#include "launch.h"

namespace pf::cuda {

void launch(const ForwardArgs& p, CUstream_st*) {
  dispatch(p.shape,
           [&]<typename T, int K, int S>() { launch_tiles(p.tiling, [&] { depthwise_forward<T, K, S>(p); }); });
  finish(p);
}

}  // namespace pf::cuda
