#include "cuda/kernels/expand_depthwise.cuh"

#include "launch.h"

namespace pf::cuda {

void launch(const ExpandForwardArgs& p, CUstream_st*) {
  dispatch_half(p.pass.shape, [&]<typename T, int K, int S>() {
    launch_tiles(p.pass.tiling, [&] { expand_depthwise_forward<T, K, S>(p); });
  });
  finish(p.pass);
}

void launch(const ExpandBackwardArgs& p, CUstream_st*) {
  dispatch_half(p.pass.shape, [&]<typename T, int K, int S>() {
    launch_tiles(p.pass.tiling, [&] { expand_depthwise_backward<T, K, S>(p); });
  });
  finish(p.pass);
}

}  // namespace pf::cuda
