// The depthwise convolution, forward and backward, of an e that is made in shared memory from x and never in memory.
#pragma once
#include "cuda/kernels/depthwise_backward.cuh"
#include "cuda/kernels/depthwise_forward.cuh"
#include "cuda/kernels/expand_tile.cuh"

namespace pf::cuda {

// Where in shared memory the expansion has its own, between what the stencil put first and the tile.
template <typename T>
struct ExpandShared {
  float* norm;   // [3][channels]
  T* fragments;  // [steps][16][channels], in the lanes' order
  T* tile;

  __device__ ExpandShared(unsigned char* after, const ExpandArgs& p, int all_channels, Chunk chunk)
      : norm(reinterpret_cast<float*>(after)),
        fragments(reinterpret_cast<T*>(norm + 3 * chunk_channels<T>)),
        tile(fragments + expand_steps(p) * mma_depth * chunk_channels<T>) {
    load_norm<T>(norm, p, chunk, all_channels);
    load_fragments(fragments, p, chunk);
  }
};

// Grid: (chunks, groups).
template <typename T, int K, int S>
__global__ void __launch_bounds__(max_threads, 2) expand_depthwise_forward(const ExpandForwardArgs p) {
  constexpr int first = K * K * chunk_channels<T> * static_cast<int>(sizeof(float));
  PF_SHARED(shared);
  const ExpandShared<T> own(shared + first, p.expand, p.pass.shape.channels, chunk_of<T>(p.pass.shape));
  convolve_tiles<T, K, S>(shared, own.tile, p.pass, [&](T* tile, const Window& window, Chunk) {
    expand_tile<2>(tile, own.fragments, own.norm, p.expand, window);
  });
}

// Grid: (chunks, groups). The mask is the identity: q is the gradient to e. The sums of dw stay in registers throughout
// and leave room for one group of pixels.
template <typename T, int K, int S>
__global__ void __launch_bounds__(max_threads, 2) expand_depthwise_backward(const ExpandBackwardArgs p) {
  constexpr int first = (K * K + 4) * chunk_channels<T> * static_cast<int>(sizeof(float));
  PF_SHARED(shared);
  const ExpandShared<T> own(shared + first, p.expand, p.pass.shape.channels, chunk_of<T>(p.pass.shape));
  gradient_tiles<T, K, S>(shared, own.tile, p.pass, [&](T* inputs, const Window& window, Chunk, const ThreadStrip&) {
    expand_tile<1>(inputs, own.fragments, own.norm, p.expand, window);
    return ~0u;
  });
}

}  // namespace pf::cuda
