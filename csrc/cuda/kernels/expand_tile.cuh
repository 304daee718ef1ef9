// e = activation(BN(x W1^T)) of a window, made in shared memory on tensor cores and nowhere else.
//
// A warp makes 16 pixels x 32 channels at a time. Pixels are rows of the product, channels its columns, and which
// channel is which column, and in which order the inputs are summed, is free: both are chosen so that a lane reads 4
// neighbouring inputs of a pixel at once, reads its weights 16 bytes at a time, and stores 8 neighbouring channels, all
// without a bank conflict.
#pragma once
#include "cuda/kernels/mma.cuh"

namespace pf::cuda {

inline constexpr int lane_inputs = 4, lane_channels = 8;

__device__ inline int expand_steps(const ExpandArgs& p) { return (p.channels + mma_depth - 1) / mma_depth; }

// W1 of a chunk in the order of the lanes' reads, [step][pair of column blocks][lane][2][4 inputs], zero beyond either
// end. Column 2 t + j of block n is channel 8 t + 2 n + j of the chunk; lane 4 g + t has the inputs 4 t to 4 t + 3.
template <typename T>
__device__ inline void load_fragments(T* shared, const ExpandArgs& p, Chunk chunk) {
  const int depth = expand_steps(p) * mma_depth;
  for (int i = threadIdx.x; i < chunk_channels<T> * depth; i += blockDim.x) {
    const int c = i / depth, k = i % depth;
    const int block = c % lane_channels / 2, lane = (c / lane_channels * 2 + c % 2) * 4 + k % mma_depth / lane_inputs;
    T value;
    narrow(0.0f, value);
    if (c < chunk.valid && k < p.channels)
      value = static_cast<const T*>(p.weight)[int64_t{chunk.first + c} * p.channels + k];
    shared[(((k / mma_depth * 2 + block / 2) * warp_size + lane) * 2 + block % 2) * lane_inputs + k % lane_inputs] =
        value;
  }
}

// Mean, scale and shift of a chunk's batch norm, [3][channels].
template <typename T>
__device__ inline void load_norm(float* shared, const ExpandArgs& p, Chunk chunk, int channels) {
  const auto* norm = static_cast<const float*>(p.norm);
  constexpr int rows[] = {0, 2, 3};
#pragma unroll
  for (int i = 0; i < 3; ++i)
    load_channels<chunk_channels<T>>(shared + i * chunk_channels<T>, norm + int64_t{rows[i]} * channels, chunk);
}

// NaN goes through.
template <int N>
__device__ inline void activate(float (&z)[N], Activation activation) {
  switch (activation) {
    case Activation::relu6:
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = relu6(z[i]);
      return;
    case Activation::relu:
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = z[i] < 0.0f ? 0.0f : z[i];
      return;
    case Activation::silu:
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = z[i] / (1.0f + exponential(-z[i]));
      return;
    case Activation::hardswish:
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = z[i] * relu6(z[i] + 3.0f) * (1.0f / 6.0f);
      return;
    case Activation::identity:
      return;
  }
}

// Stores 0 in the pixels of a window that are outside the image, the convolution's padding.
template <typename T>
__device__ inline void clear_outside(T* tile, const Window& window) {
  constexpr int n = 16 / static_cast<int>(sizeof(T)), parts = chunk_channels<T> / n;
  Vector<T, n> zero;
#pragma unroll
  for (int i = 0; i < n; ++i) narrow(0.0f, zero.v[i]);
  for (int i = threadIdx.x; i < window.rows * window.columns * parts; i += blockDim.x) {
    const int y = window.y + i / parts / window.columns, x = window.x + i / parts % window.columns;
    if (y < 0 || y >= window.height || x < 0 || x >= window.width) write(tile + i * n, zero);
  }
}

// tile: [row][column][channel] of the window. fragments and norm as loaded above, after a barrier. together: groups of
// 16 pixels that a warp makes at a time; with two, twice the loads are in flight and weights are read once for both.
template <int together, typename T>
__device__ inline void expand_tile(T* tile, const T* fragments, const float* norm, const ExpandArgs& p,
                                   const Window& window) {
  constexpr int channels = chunk_channels<T>, blocks = channels / mma_columns;
  // Of the window, what is inside the image; the halo beyond its edges costs no products.
  const int top = window.y < 0 ? -window.y : 0, left = window.x < 0 ? -window.x : 0;
  const int rows = (window.rows < window.height - window.y ? window.rows : window.height - window.y) - top;
  const int columns = (window.columns < window.width - window.x ? window.columns : window.width - window.x) - left;
  const int pixels = rows * columns;
  if (pixels < window.rows * window.columns) clear_outside(tile, window);

  const int warps = static_cast<int>(blockDim.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
  const int g = lane / 4, t = lane % 4, steps = expand_steps(p);
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / warp_size * mma_rows; first < pixels;
       first += together * warps * mma_rows) {
    const T* from[together][2];
    int to[together][2];
#pragma unroll
    for (int i = 0; i < together; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int pixel = first + i * warps * mma_rows + h * 8 + g;
        const int row = top + pixel / columns, column = left + pixel % columns;
        const int64_t at = window.image + int64_t{window.y + row} * window.width + window.x + column;
        to[i][h] = pixel < pixels ? row * window.columns + column : -1;
        from[i][h] = static_cast<const T*>(p.x) + (pixel < pixels ? at : 0) * p.channels;
      }
    MmaSums sums[together][blocks];
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      const int k = step * mma_depth + t * lane_inputs;
      MmaLeft x[together];
#pragma unroll
      for (int i = 0; i < together; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Vector<uint32_t, 2> inputs{};
          const int valid = to[i][h] < 0 ? 0 : p.channels - k;
          if (!p.vectors) {
            const auto few = read<lane_inputs>(from[i][h] + k, valid, false);
            memcpy(&inputs, &few, sizeof(inputs));
          } else if (valid > 0) {
            inputs = *reinterpret_cast<const Vector<uint32_t, 2>*>(from[i][h] + k);
          }
          x[i].v[h] = inputs.v[0];
          x[i].v[h + 2] = inputs.v[1];
        }
      __syncwarp();  // the branches above may have parted the lanes
#pragma unroll
      for (int pair = 0; pair < blocks / 2; ++pair) {
        const auto w = *reinterpret_cast<const Vector<uint32_t, 4>*>(
            fragments + ((step * (blocks / 2) + pair) * warp_size + lane) * 2 * lane_inputs);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < together; ++i)
            multiply_add<T>(sums[i][2 * pair + half], x[i], {w.v[2 * half], w.v[2 * half + 1]});
      }
    }
    const auto mean = read<lane_channels>(norm + t * lane_channels);
    const auto scale = read<lane_channels>(norm + channels + t * lane_channels);
    const auto shift = read<lane_channels>(norm + 2 * channels + t * lane_channels);
#pragma unroll
    for (int i = 0; i < together; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (to[i][h] < 0) continue;
        float z[lane_channels];
#pragma unroll
        for (int c = 0; c < lane_channels; ++c)
          z[c] = (sums[i][c / 2].v[2 * h + c % 2] - mean.v[c]) * scale.v[c] + shift.v[c];
        activate(z, p.activation);
        Vector<T, lane_channels> e;
#pragma unroll
        for (int c = 0; c < lane_channels; ++c) narrow(z[c], e.v[c]);
        write(tile + to[i][h] * channels + t * lane_channels, e);
      }
  }
}

}  // namespace pf::cuda
