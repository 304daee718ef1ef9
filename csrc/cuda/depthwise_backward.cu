#include "cuda/depthwise_backward.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/reduce.cuh"

namespace pf::cuda {

void launch(const Backward& p, CUstream_st* stream) {
  const Tiling& t = p.tiling;
  const dim3 grid(static_cast<unsigned>(t.chunks), static_cast<unsigned>(t.groups));
  dispatch(p.shape, [&]<typename T, int K, int S>() {
    depthwise_backward<T, K, S><<<grid, t.threads, t.shared_bytes, stream>>>(p);
  });
  finish(p, stream);
}

}  // namespace pf::cuda
