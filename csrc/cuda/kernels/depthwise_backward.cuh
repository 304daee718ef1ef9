// Both gradients of the depthwise convolution in one pass over dz, d and x.
//
// Tiles are tiles of the input: with e and dd in shared memory, a pixel (iy, ix) of the input meets, for each tap, the
// pixel ((iy + P - ky) / S, (ix + P - kx) / S) of the output where that divides. q sums dd * w over the taps, dw sums
// dd * e over the pixels, and neither e nor dd is ever written to memory.
#pragma once
#include "cuda/kernels/tile.cuh"

namespace pf::cuda {

// Which of a strip's columns the m-th pixel of dd reaches through column kx of the weights (maybe one outside).
template <int K, int S>
__device__ constexpr int reached(int m, int kx) {
  return S * (m - K / 2 / S) - K / 2 + kx;
}

// A thread's strip of a tile, and its channels within the chunk.
struct ThreadStrip {
  int row, column, mine;
};

// Every tile of this block: dd from dz and d, e from fill(inputs, window, chunk, strip), which stores [row][column]
// [channel] without a halo and returns a bit for each of the strip's values whose q is to be written (not 0).
// For q each thread has 4 channels of a strip of one input row; for dw, 4 channels of one row of the weights and every
// n-th strip, through all tiles of its block. shared starts with room for weights and affine; tile is where the rest is
// free.
template <typename T, int K, int S, typename Fill>
__device__ inline void gradient_tiles(unsigned char* shared, T* tile, const BackwardArgs& p, const Fill& fill) {
  using A = Wide<T>;
  constexpr int channels = chunk_channels<T>, quads = channels / quad, strip = backward_strip(S);
  constexpr int pad = K / 2, before = pad / S, span = (strip - 1 + pad) / S + before + 1;
  const KernelShape& s = p.shape;
  const Tiling& tiling = p.tiling;
  const int rows = (tiling.height - 1 + pad) / S + before + 1, columns = (tiling.width - 1 + pad) / S + before + 1;
  auto* weights = reinterpret_cast<A*>(shared);     // [K * K][channels]
  auto* affines = weights + K * K * channels;       // [4][channels]
  auto* inputs = tile + rows * columns * channels;  // e, [tiling.height][tiling.width][channels], behind dd

  const Chunk chunk = chunk_of<T>(s);
  const int first = chunk.first;
  load_weights<T, K>(weights, p.weight, p.wide_weight, chunk);
  for (int i = 0; i < 4; ++i) {
    const void* affine = p.affine == nullptr ? nullptr : static_cast<const A*>(p.affine) + int64_t{i} * s.channels;
    load_channels<channels>(affines + i * channels, affine, chunk);
  }

  const int mine = static_cast<int>(threadIdx.x) % quads * quad, slot = static_cast<int>(threadIdx.x) / quads;
  const int strips = tiling.width / strip, row = slot / strips, column = slot % strips * strip;
  const int tap_row = slot % K, share = slot / K, shares = static_cast<int>(blockDim.x) / quads / K;
  const int per_image = tiling.down * tiling.across;
  const int64_t tiles = tiling.tiles(s);
  A dw[K][quad] = {};
  for (int64_t index = blockIdx.y; index < tiles; index += gridDim.y) {
    const int image = static_cast<int>(index / per_image), place = static_cast<int>(index % per_image);
    const int y0 = place / tiling.across * tiling.height, x0 = place % tiling.across * tiling.width;
    const int y = y0 + row, x = x0 + column;
    const int64_t at = ((int64_t{image} * s.height + y) * s.width + x) * s.channels + first + mine;
    const Window window{y0 / S - before,
                        x0 / S - before,
                        rows,
                        columns,
                        s.out_height,
                        s.out_width,
                        int64_t{image} * s.out_height * s.out_width};
    __syncthreads();
    {
      constexpr int n = 16 / static_cast<int>(sizeof(T));
      const int part = static_cast<int>(threadIdx.x) % (channels / n) * n;
      const A* affine = affines + part;
      const T *dz = static_cast<const T*>(p.dz), *d = static_cast<const T*>(p.d);
      if (d == nullptr)
        load_tile<1>(tile, {dz}, window, s.channels, chunk, p.vectors,
                     [&](const Vector<T, n>(&g)[1], int c) { return widen(g[0].v[c]); });
      else
        load_tile<2>(tile, {dz, d}, window, s.channels, chunk, p.vectors, [&](const Vector<T, n>(&g)[2], int c) {
          return affine[c] * widen(g[0].v[c]) + affine[channels + c] * (widen(g[1].v[c]) - affine[2 * channels + c]) +
                 affine[3 * channels + c];
        });
    }
    uint32_t open = ~0u;
    if (p.mask || p.partial != nullptr) {
      const Window here{y0, x0, tiling.height, tiling.width, s.height, s.width, int64_t{image} * s.height * s.width};
      open = fill(inputs, here, chunk, ThreadStrip{row, column, mine});
    }
    __syncthreads();
    if (p.q != nullptr && row < tiling.height && y < s.height && mine < chunk.valid) {
      A sums[strip][quad] = {};
#pragma unroll 1
      for (int ky = (row + pad) % S; ky < K; ky += S) {
        A w[K][quad];
#pragma unroll
        for (int kx = 0; kx < K; ++kx) widen(read<quad>(weights + (ky * K + kx) * channels + mine), w[kx]);
        const T* pixels = tile + (((row + pad - ky) / S + before) * columns + column / S) * channels + mine;
#pragma unroll
        for (int m = 0; m < span; ++m) {
          A dd[quad];
          widen(read<quad>(pixels + m * channels), dd);
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
            const int r = reached<K, S>(m, kx);
            if (r < 0 || r >= strip) continue;
#pragma unroll
            for (int i = 0; i < quad; ++i) sums[r][i] += dd[i] * w[kx][i];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < strip; ++r) {
        if (x + r >= s.width) break;
        Vector<T, quad> q;
#pragma unroll
        for (int i = 0; i < quad; ++i) narrow((open >> (r * quad + i) & 1u) != 0 ? sums[r][i] : A(0), q.v[i]);
        write(static_cast<T*>(p.q) + at + int64_t{r} * s.channels, q, chunk.valid - mine, p.vectors);
      }
    }
    if (p.partial != nullptr && share < shares) {
      // Of the input rows, those that this row of the weights reaches.
      for (int i = share; i < tiling.height / S * strips; i += shares) {
        const int iy = i / strips * S + (tap_row + pad) % S, ix = i % strips * strip;
        const T* pixels = tile + (((iy + pad - tap_row) / S + before) * columns + ix / S) * channels + mine;
        A e[strip][quad];
#pragma unroll
        for (int r = 0; r < strip; ++r)
          widen(read<quad>(inputs + (iy * tiling.width + ix + r) * channels + mine), e[r]);
#pragma unroll
        for (int m = 0; m < span; ++m) {
          A dd[quad];
          widen(read<quad>(pixels + m * channels), dd);
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
            const int r = reached<K, S>(m, kx);
            if (r < 0 || r >= strip) continue;
#pragma unroll
            for (int c = 0; c < quad; ++c) dw[kx][c] += dd[c] * e[r][c];
          }
        }
      }
    }
  }
  if (p.partial == nullptr) return;
  auto* sums = reinterpret_cast<A*>(shared);  // [shares][K * K][channels]
  __syncthreads();
  if (share < shares) {
#pragma unroll
    for (int kx = 0; kx < K; ++kx)
#pragma unroll
      for (int i = 0; i < quad; ++i) sums[((share * K + tap_row) * K + kx) * channels + mine + i] = dw[kx][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < K * K * channels; i += blockDim.x) {
    if (i % channels >= chunk.valid) continue;
    A sum = 0;
    for (int n = 0; n < shares; ++n) sum += sums[n * K * K * channels + i];
    static_cast<A*>(p.partial)[(int64_t{K * K} * blockIdx.y + i / channels) * s.channels + first + i % channels] = sum;
  }
}

// Grid: (chunks, groups).
template <typename T, int K, int S>
__global__ void __launch_bounds__(max_threads, 2) depthwise_backward(const BackwardArgs p) {
  using A = Wide<T>;
  constexpr int channels = chunk_channels<T>;
  PF_SHARED(shared);
  auto* prologue = reinterpret_cast<A*>(shared) + (K * K + 4) * channels;  // [2][channels]: scale, shift
  load_channels<channels>(prologue, p.scale, chunk_of<T>(p.shape));
  load_channels<channels>(prologue + channels, p.shift, chunk_of<T>(p.shape));
  auto* tile = reinterpret_cast<T*>(prologue + 2 * channels);
  // e of this thread's strip goes to shared memory; of u only the mask is kept. All loads at once would spill.
  gradient_tiles<T, K, S>(shared, tile, p, [&](T* inputs, const Window& window, Chunk chunk, const ThreadStrip& strip) {
    const auto [row, column, mine] = strip;
    const int y = window.y + row, x = window.x + column;
    const int64_t at = (window.image + int64_t{y} * window.width + x) * p.shape.channels + chunk.first + mine;
    uint32_t open = p.mask ? 0u : ~0u;
    if (row >= window.rows) return open;
#pragma unroll 2
    for (int r = 0; r < backward_strip(S); ++r) {
      Vector<T, quad> e;
#pragma unroll
      for (int i = 0; i < quad; ++i) narrow(A(0), e.v[i]);
      if (y < window.height && x + r < window.width && mine < chunk.valid) {
        e = read<quad>(static_cast<const T*>(p.x) + at + int64_t{r} * p.shape.channels, chunk.valid - mine, p.vectors);
#pragma unroll
        for (int i = 0; i < quad; ++i) {
          A u = widen(e.v[i]);
          if (p.scale != nullptr && mine + i < chunk.valid) {
            u = prologue[mine + i] * u + prologue[channels + mine + i];
            narrow(relu6(u), e.v[i]);
          }
          if (u > A(0) && u < A(6)) open |= 1u << (r * quad + i);
        }
      }
      write(inputs + (row * window.columns + column + r) * channels + mine, e);
    }
    return open;
  });
}

}  // namespace pf::cuda
