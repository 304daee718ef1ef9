// d = depthwise(clamp(scale * x + shift, 0, 6)) and the statistics of d.
#pragma once
#include "cuda/kernels/tile.cuh"

namespace pf::cuda {

// Count, mean and sum of squares about it, for 4 channels. A thread's first value is its pivot, so that squares of a
// far mean are never summed.
template <typename A>
struct ThreadMoments {
  A pivot[quad] = {}, sum[quad] = {}, squares[quad] = {};
  int count = 0;

  __device__ void add(const A (&value)[quad]) {
#pragma unroll
    for (int i = 0; i < quad; ++i) {
      if (count == 0) pivot[i] = value[i];
      const A x = value[i] - pivot[i];
      sum[i] += x;
      squares[i] += x * x;
    }
    ++count;
  }
  __device__ A mean(int i) const { return count == 0 ? A(0) : pivot[i] + sum[i] / A(count); }
  __device__ A about_mean(int i) const { return count == 0 ? A(0) : squares[i] - sum[i] * sum[i] / A(count); }
};

// The threads' statistics become the block's: (count, mean, squares) per channel, added in a fixed order.
template <typename T>
__device__ inline void write_partial(unsigned char* shared, const ThreadMoments<Wide<T>>& mine, const ForwardArgs& p,
                                     Chunk chunk, int group) {
  using A = Wide<T>;
  constexpr int channels = chunk_channels<T>, quads = channels / quad;
  const int slots = static_cast<int>(blockDim.x) / quads, slot = static_cast<int>(threadIdx.x) / quads;
  auto* means = reinterpret_cast<A*>(shared);  // [slots][channels]
  auto* squares = means + slots * channels;
  auto* counts = reinterpret_cast<int*>(squares + slots * channels);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < quad; ++i) {
    const int at = slot * channels + static_cast<int>(threadIdx.x) % quads * quad + i;
    means[at] = mine.mean(i);
    squares[at] = mine.about_mean(i);
  }
  if (threadIdx.x % quads == 0) counts[slot] = mine.count;
  __syncthreads();
  for (int c = threadIdx.x; c < chunk.valid && c < channels; c += blockDim.x) {
    A count = 0, mean = 0, square = 0;
    for (int s = 0; s < slots; ++s) {
      count += A(counts[s]);
      mean += A(counts[s]) * means[s * channels + c];
    }
    mean /= count;
    for (int s = 0; s < slots; ++s) {
      const A x = means[s * channels + c] - mean;
      square += squares[s * channels + c] + A(counts[s]) * x * x;
    }
    A* out = static_cast<A*>(p.partial) + int64_t{3} * group * p.shape.channels + chunk.first + c;
    out[0] = count;
    out[p.shape.channels] = mean;
    out[2 * p.shape.channels] = square;
  }
}

// Every tile of this block, from fill(tile, window, chunk), which stores [row][column][channel] in shared memory, to d
// and its statistics. Each thread: 4 channels of a strip of one output row. shared starts with room for the weights.
template <typename T, int K, int S, typename Fill>
__device__ inline void convolve_tiles(unsigned char* shared, T* tile, const ForwardArgs& p, const Fill& fill) {
  using A = Wide<T>;
  constexpr int channels = chunk_channels<T>, quads = channels / quad, strip = forward_strip;
  const KernelShape& s = p.shape;
  const Tiling& tiling = p.tiling;
  auto* weights = reinterpret_cast<A*>(shared);  // [K * K][channels]
  const Chunk chunk = chunk_of<T>(s);
  load_weights<T, K>(weights, p.weight, p.wide_weight, chunk);

  const int mine = static_cast<int>(threadIdx.x) % quads * quad, slot = static_cast<int>(threadIdx.x) / quads;
  const int strips = tiling.width / strip, row = slot / strips, column = slot % strips * strip;
  const int columns = (tiling.width - 1) * S + K, per_image = tiling.down * tiling.across;
  const int64_t tiles = tiling.tiles(s);
  ThreadMoments<A> statistics;
  for (int64_t index = blockIdx.y; index < tiles; index += gridDim.y) {
    const int image = static_cast<int>(index / per_image), place = static_cast<int>(index % per_image);
    const int y0 = place / tiling.across * tiling.height, x0 = place % tiling.across * tiling.width;
    const Window window{y0 * S - K / 2, x0 * S - K / 2, (tiling.height - 1) * S + K,        columns,
                        s.height,       s.width,        int64_t{image} * s.height * s.width};
    __syncthreads();
    fill(tile, window, chunk);
    __syncthreads();
    const int y = y0 + row, x = x0 + column;
    if (row >= tiling.height || y >= s.out_height || mine >= chunk.valid) continue;
    A sums[strip][quad] = {};
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
      A w[K][quad];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) widen(read<quad>(weights + (ky * K + kx) * channels + mine), w[kx]);
      const T* pixels = tile + ((row * S + ky) * columns + column * S) * channels + mine;
#pragma unroll
      for (int j = 0; j < (strip - 1) * S + K; ++j) {
        A e[quad];
        widen(read<quad>(pixels + j * channels), e);
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
          if (j < kx || (j - kx) % S != 0 || (j - kx) / S >= strip) continue;
#pragma unroll
          for (int i = 0; i < quad; ++i) sums[(j - kx) / S][i] += e[i] * w[kx][i];
        }
      }
    }
    T* out = static_cast<T*>(p.d) + ((int64_t{image} * s.out_height + y) * s.out_width + x) * s.channels + chunk.first +
             mine;
#pragma unroll
    for (int r = 0; r < strip; ++r) {
      if (x + r >= s.out_width) break;
      Vector<T, quad> stored;
      A value[quad];
#pragma unroll
      for (int i = 0; i < quad; ++i) narrow(sums[r][i], stored.v[i]);
      widen(stored, value);  // statistics of what is stored
      statistics.add(value);
      write(out + int64_t{r} * s.channels, stored, chunk.valid - mine, p.vectors);
    }
  }
  write_partial<T>(shared, statistics, p, chunk, static_cast<int>(blockIdx.y));
}

// Grid: (chunks, groups).
template <typename T, int K, int S>
__global__ void __launch_bounds__(max_threads, 2) depthwise_forward(const ForwardArgs p) {
  using A = Wide<T>;
  constexpr int channels = chunk_channels<T>, n = 16 / static_cast<int>(sizeof(T));
  PF_SHARED(shared);
  auto* prologue = reinterpret_cast<A*>(shared) + K * K * channels;  // [2][channels]: scale, shift
  load_channels<channels>(prologue, p.scale, chunk_of<T>(p.shape));
  load_channels<channels>(prologue + channels, p.shift, chunk_of<T>(p.shape));
  auto* tile = reinterpret_cast<T*>(prologue + 2 * channels);
  convolve_tiles<T, K, S>(shared, tile, p, [&](T* to, const Window& window, Chunk chunk) {
    const int part = static_cast<int>(threadIdx.x) % (channels / n) * n;
    const auto scale = read<n>(prologue + part), shift = read<n>(prologue + channels + part);
    const T* const from[] = {static_cast<const T*>(p.x)};
    load_tile<1>(to, from, window, p.shape.channels, chunk, p.vectors, [&](const Vector<T, n>(&x)[1], int c) {
      const A u = widen(x[0].v[c]);
      return p.scale == nullptr ? u : relu6(scale.v[c] * u + shift.v[c]);
    });
  });
}

}  // namespace pf::cuda
