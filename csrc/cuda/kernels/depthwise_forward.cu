#include "cuda/kernels/depthwise_forward.cuh"
#include "cuda/kernels/dispatch.cuh"
#include "cuda/kernels/reduce.cuh"

namespace pf::cuda {

void launch(const ForwardArgs& p, CUstream_st* stream) {
  const Tiling& t = p.tiling;
  const dim3 grid(static_cast<unsigned>(t.chunks), static_cast<unsigned>(t.groups));
  dispatch(p.shape, [&]<typename T, int K, int S>() {
    depthwise_forward<T, K, S><<<grid, t.threads, t.shared_bytes, stream>>>(p);
  });
  finish(p, stream);
}

}  // namespace pf::cuda
