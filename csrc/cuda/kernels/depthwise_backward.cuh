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

// What a thread works on in every tile. dd lies in shared memory as [rows][columns][channels], with what its tile of
// the input reaches around it.
template <typename T, int K, int S>
struct GradientShare {
  static constexpr int channels = chunk_channels<T>, quads = channels / quad, width = backward_strip(S);
  static constexpr int pad = K / 2, before = pad / S;
  static constexpr int span = (width - 1 + pad) / S + before + 1;  // pixels of dd in a row that a strip reaches
  int rows, columns;
  int strips;                  // per row of the tile
  ThreadStrip strip;           // of q: 4 channels of a strip of one input row
  int tap_row, first, shares;  // of dw: 4 channels of one row of the weights, strips first, first + shares, ...

  __device__ explicit GradientShare(const Tiling& tiling)
      : rows((tiling.height - 1 + pad) / S + before + 1),
        columns((tiling.width - 1 + pad) / S + before + 1),
        strips(tiling.width / width) {
    const int slot = static_cast<int>(threadIdx.x) / quads;
    strip = {slot / strips, slot % strips * width, static_cast<int>(threadIdx.x) % quads * quad};
    tap_row = slot % K;
    first = slot / K;
    shares = static_cast<int>(blockDim.x) / quads / K;
  }

  // Where the thread's channels of dd start for one row of the weights at a pixel of the tile.
  __device__ const T* reach(const T* dd, int row, int column, int ky) const {
    return dd + (((row + pad - ky) / S + before) * columns + column / S) * channels + strip.mine;
  }
};

// Calls body(r, kx, value) for the pixels of dd that a strip reaches, r the strip's column that column kx of the
// weights takes the pixel to.
template <typename T, int K, int S, typename Body>
__device__ inline void for_reached(const T* pixels, const Body& body) {
  using Share = GradientShare<T, K, S>;
#pragma unroll
  for (int m = 0; m < Share::span; ++m) {
    Wide<T> dd[quad];
    widen(read<quad>(pixels + m * Share::channels), dd);
#pragma unroll
    for (int kx = 0; kx < K; ++kx) {
      const int r = reached<K, S>(m, kx);
      if (r >= 0 && r < Share::width) body(r, kx, dd);
    }
  }
}

// dd = dz where there is no affine, else affine[0] dz + affine[1] (d - affine[2]) + affine[3].
template <typename T>
__device__ inline void load_dd(T* tile, const BackwardArgs& p, const Wide<T>* affines, const Window& window,
                               Chunk chunk) {
  constexpr int n = 16 / static_cast<int>(sizeof(T)), channels = chunk_channels<T>;
  const Wide<T>* affine = affines + static_cast<int>(threadIdx.x) % (channels / n) * n;
  const T *dz = static_cast<const T*>(p.dz), *d = static_cast<const T*>(p.d);
  if (d == nullptr)
    load_tile<1>(tile, {dz}, window, p.shape.channels, chunk, p.vectors,
                 [&](const Vector<T, n>(&g)[1], int c) { return widen(g[0].v[c]); });
  else
    load_tile<2>(tile, {dz, d}, window, p.shape.channels, chunk, p.vectors, [&](const Vector<T, n>(&g)[2], int c) {
      return affine[c] * widen(g[0].v[c]) + affine[channels + c] * (widen(g[1].v[c]) - affine[2 * channels + c]) +
             affine[3 * channels + c];
    });
}

// q of this thread's strip, from column x of the image: written to p.q + at, 0 where a bit of `open` is not set.
template <typename T, int K, int S>
__device__ inline void input_gradient(int64_t at, const T* dd, const Wide<T>* weights,
                                      const GradientShare<T, K, S>& share, uint32_t open, int x, const BackwardArgs& p,
                                      Chunk chunk) {
  using A = Wide<T>;
  constexpr int width = GradientShare<T, K, S>::width, channels = chunk_channels<T>;
  A sums[width][quad] = {};
#pragma unroll 1
  for (int ky = (share.strip.row + share.pad) % S; ky < K; ky += S) {
    A w[K][quad];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) widen(read<quad>(weights + (ky * K + kx) * channels + share.strip.mine), w[kx]);
    for_reached<T, K, S>(share.reach(dd, share.strip.row, share.strip.column, ky),
                         [&](int r, int kx, const A(&value)[quad]) {
#pragma unroll
                           for (int i = 0; i < quad; ++i) sums[r][i] += value[i] * w[kx][i];
                         });
  }
#pragma unroll
  for (int r = 0; r < width; ++r) {
    if (x + r >= p.shape.width) break;
    Vector<T, quad> q;
#pragma unroll
    for (int i = 0; i < quad; ++i) narrow((open >> (r * quad + i) & 1u) != 0 ? sums[r][i] : A(0), q.v[i]);
    write(static_cast<T*>(p.q) + at + int64_t{r} * p.shape.channels, q, chunk.valid - share.strip.mine, p.vectors);
  }
}

// Adds to dw what this thread's strips of one tile give; of the input rows, those that its row of the weights reaches.
template <typename T, int K, int S>
__device__ inline void weight_gradient(Wide<T> (&dw)[K][quad], const T* dd, const T* inputs,
                                       const GradientShare<T, K, S>& share, const Tiling& tiling) {
  using A = Wide<T>;
  constexpr int width = GradientShare<T, K, S>::width, channels = chunk_channels<T>;
  for (int i = share.first; i < tiling.height / S * share.strips; i += share.shares) {
    const int row = i / share.strips * S + (share.tap_row + share.pad) % S, column = i % share.strips * width;
    A e[width][quad];
#pragma unroll
    for (int r = 0; r < width; ++r)
      widen(read<quad>(inputs + (row * tiling.width + column + r) * channels + share.strip.mine), e[r]);
    for_reached<T, K, S>(share.reach(dd, row, column, share.tap_row), [&](int r, int kx, const A(&value)[quad]) {
#pragma unroll
      for (int c = 0; c < quad; ++c) dw[kx][c] += value[c] * e[r][c];
    });
  }
}

// The threads' dw become the block's, added in a fixed order.
template <typename T, int K, int S>
__device__ inline void write_weight_partial(unsigned char* shared, const Wide<T> (&dw)[K][quad],
                                            const GradientShare<T, K, S>& share, const BackwardArgs& p, Chunk chunk) {
  using A = Wide<T>;
  constexpr int channels = chunk_channels<T>;
  auto* sums = reinterpret_cast<A*>(shared);  // [shares][K * K][channels]
  __syncthreads();
  if (share.first < share.shares) {
#pragma unroll
    for (int kx = 0; kx < K; ++kx)
#pragma unroll
      for (int i = 0; i < quad; ++i)
        sums[((share.first * K + share.tap_row) * K + kx) * channels + share.strip.mine + i] = dw[kx][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < K * K * channels; i += blockDim.x) {
    if (i % channels >= chunk.valid) continue;
    A sum = 0;
    for (int n = 0; n < share.shares; ++n) sum += sums[n * K * K * channels + i];
    static_cast<A*>(
        p.partial)[(int64_t{K * K} * blockIdx.y + i / channels) * p.shape.channels + chunk.first + i % channels] = sum;
  }
}

// Every tile of this block: dd from dz and d, e from fill(inputs, window, chunk, strip), which stores [row][column]
// [channel] without a halo and returns a bit for each of the strip's values whose q is to be written (not 0); then q
// and this block's share of dw. shared starts with room for weights and affine; tile is where the rest is free.
template <typename T, int K, int S, typename Fill>
__device__ inline void gradient_tiles(unsigned char* shared, T* tile, const BackwardArgs& p, const Fill& fill) {
  using A = Wide<T>;
  constexpr int channels = chunk_channels<T>;
  const KernelShape& s = p.shape;
  const Tiling& tiling = p.tiling;
  const GradientShare<T, K, S> share(tiling);
  auto* weights = reinterpret_cast<A*>(shared);                 // [K * K][channels]
  auto* affines = weights + K * K * channels;                   // [4][channels]
  auto* inputs = tile + share.rows * share.columns * channels;  // e, [tiling.height][tiling.width][channels]
  const Chunk chunk = chunk_of<T>(s);
  load_weights<T, K>(weights, p.weight, p.wide_weight, chunk);
  for (int i = 0; i < 4; ++i) {
    const void* affine = p.affine == nullptr ? nullptr : static_cast<const A*>(p.affine) + int64_t{i} * s.channels;
    load_channels<channels>(affines + i * channels, affine, chunk);
  }

  const auto [row, column, mine] = share.strip;
  const int per_image = tiling.down * tiling.across;
  const int64_t tiles = tiling.tiles(s);
  A dw[K][quad] = {};
  for (int64_t index = blockIdx.y; index < tiles; index += gridDim.y) {
    const int image = static_cast<int>(index / per_image), place = static_cast<int>(index % per_image);
    const int y0 = place / tiling.across * tiling.height, x0 = place % tiling.across * tiling.width;
    __syncthreads();
    load_dd(tile, p, affines,
            Window{y0 / S - share.before, x0 / S - share.before, share.rows, share.columns, s.out_height, s.out_width,
                   int64_t{image} * s.out_height * s.out_width},
            chunk);
    uint32_t open = ~0u;
    if (p.mask || p.partial != nullptr) {
      const Window here{y0, x0, tiling.height, tiling.width, s.height, s.width, int64_t{image} * s.height * s.width};
      open = fill(inputs, here, chunk, share.strip);
    }
    __syncthreads();
    const int y = y0 + row, x = x0 + column;
    if (p.q != nullptr && row < tiling.height && y < s.height && mine < chunk.valid) {
      const int64_t at = ((int64_t{image} * s.height + y) * s.width + x) * s.channels + chunk.first + mine;
      input_gradient(at, tile, weights, share, open, x, p, chunk);
    }
    if (p.partial != nullptr && share.first < share.shares) weight_gradient(dw, tile, inputs, share, tiling);
  }
  if (p.partial != nullptr) write_weight_partial<T, K, S>(shared, dw, share, p, chunk);
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
