#include "cuda/kernels/depthwise_backward.cuh"

#include "launch.h"

namespace pf::cuda {

void launch(const BackwardArgs& p, CUstream_st*) {
  dispatch(p.shape,
           [&]<typename T, int K, int S>() { launch_tiles(p.tiling, [&] { depthwise_backward<T, K, S>(p); }); });
  finish(p);
}

}  // namespace pf::cuda
