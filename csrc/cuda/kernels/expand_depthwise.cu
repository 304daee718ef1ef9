#include "cuda/kernels/dispatch.cuh"
#include "cuda/kernels/expand_depthwise.cuh"
#include "cuda/kernels/reduce.cuh"

namespace pf::cuda {

void launch(const ExpandForwardArgs& p, CUstream_st* stream) {
  const Tiling& t = p.pass.tiling;
  const dim3 grid(static_cast<unsigned>(t.chunks), static_cast<unsigned>(t.groups));
  dispatch_half(p.pass.shape, [&]<typename T, int K, int S>() {
    expand_depthwise_forward<T, K, S><<<grid, t.threads, t.shared_bytes, stream>>>(p);
  });
  finish(p.pass, stream);
}

void launch(const ExpandBackwardArgs& p, CUstream_st* stream) {
  const Tiling& t = p.pass.tiling;
  const dim3 grid(static_cast<unsigned>(t.chunks), static_cast<unsigned>(t.groups));
  dispatch_half(p.pass.shape, [&]<typename T, int K, int S>() {
    expand_depthwise_backward<T, K, S><<<grid, t.threads, t.shared_bytes, stream>>>(p);
  });
  finish(p.pass, stream);
}

}  // namespace pf::cuda
