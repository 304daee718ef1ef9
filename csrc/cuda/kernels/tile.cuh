// What the depthwise kernels share: types, vectors of channels, and tiles of pixels in shared memory.
#pragma once
#include "cuda/kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PF_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "emulation.h"
#endif

namespace pf::cuda {

#ifdef __CUDACC__
using Half = __half;
using BFloat16 = __nv_bfloat16;
__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, Half& y) { y = __float2half_rn(x); }
__device__ inline void narrow(float x, BFloat16& y) { y = __float2bfloat16_rn(x); }
#endif
template <typename A>
__device__ inline A widen(A x) {
  return x;
}
template <typename A>
__device__ inline void narrow(A x, A& y) {
  y = x;
}

template <typename T>
using Wide = decltype(widen(T{}));

template <typename T>
inline constexpr int chunk_channels = chunk_bytes / static_cast<int>(sizeof(T));

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T v[N];
};

template <int N, typename T>
__device__ inline Vector<T, N> read(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}

template <typename T, int N>
__device__ inline void write(T* p, const Vector<T, N>& value) {
  *reinterpret_cast<Vector<T, N>*>(p) = value;
}

// N channels of a pixel, of which `valid` exist (any number); the others are zero.
template <int N, typename T>
__device__ inline Vector<T, N> read(const T* p, int valid, bool vectors) {
  if (vectors && valid >= N) return read<N>(p);
  Vector<T, N> value;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < valid)
      value.v[i] = p[i];
    else
      narrow(Wide<T>(0), value.v[i]);
  }
  return value;
}

template <typename T, int N>
__device__ inline void write(T* p, const Vector<T, N>& value, int valid, bool vectors) {
  if (vectors && valid >= N) return write(p, value);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < valid) p[i] = value.v[i];
}

template <typename A, typename T>
__device__ inline void widen(const Vector<T, quad>& from, A (&to)[quad]) {
#pragma unroll
  for (int i = 0; i < quad; ++i) to[i] = widen(from.v[i]);
}

template <typename A>
__device__ inline A relu6(A u) {
  return u < A(0) ? A(0) : u > A(6) ? A(6) : u;
}

// The first channel of a block, and how many it has.
struct Chunk {
  int first, valid;
};

// Of the first grid dimension.
template <typename T>
__device__ inline Chunk chunk_of(const KernelShape& s) {
  const int first = static_cast<int>(blockIdx.x) * chunk_channels<T>;
  return {first, s.channels - first};
}

// Per-channel values of a chunk, zero beyond the last channel.
template <int Channels, typename A>
__device__ inline void load_channels(A* shared, const void* values, Chunk chunk) {
  for (int c = threadIdx.x; c < Channels; c += blockDim.x)
    shared[c] = values != nullptr && c < chunk.valid ? static_cast<const A*>(values)[chunk.first + c] : A(0);
}

// Weights (C, 1, K, K) of a chunk as [tap][channel].
template <typename T, int K>
__device__ inline void load_weights(Wide<T>* shared, const void* weight, bool wide, Chunk chunk) {
  constexpr int channels = chunk_channels<T>, taps = K * K;
  const int64_t first = int64_t{chunk.first} * taps;
  for (int i = threadIdx.x; i < channels * taps; i += blockDim.x) {
    Wide<T> w = 0;
    if (i < chunk.valid * taps)
      w = wide ? static_cast<const Wide<T>*>(weight)[first + i] : widen(static_cast<const T*>(weight)[first + i]);
    shared[i % taps * channels + i / taps] = w;
  }
}

// A rectangle of an image's pixels, which may reach over its edges.
struct Window {
  int y, x, rows, columns;  // where it starts, and its size
  int height, width;        // of the image
  int64_t image;            // pixels before the image's first
};

// Reads a window of one or two tensors, their pixels pixel_size elements apart, and stores transform(values) as
// [row][column][channel]; zero outside the image, which is the convolution's padding. With vectors, 16 bytes at a time
// and several in flight. Each thread meets the same channels throughout (a pixel is 4 vectors, and the number of
// threads a multiple of 4).
template <int Tensors, typename T, typename Transform>
__device__ inline void load_tile(T* tile, const T* const (&tensors)[Tensors], const Window& window, int pixel_size,
                                 Chunk chunk, bool vectors, const Transform& transform) {
  constexpr int n = 16 / static_cast<int>(sizeof(T)), parts = chunk_channels<T> / n, in_flight = 4 / Tensors;
  const int part = static_cast<int>(threadIdx.x) % parts * n, step = static_cast<int>(blockDim.x) / parts;
  const int pixels = window.rows * window.columns, valid = chunk.valid - part;
  // Where a pixel of the window is in memory, or -1.
  const auto place = [&](int pixel) {
    const int y = window.y + pixel / window.columns, x = window.x + pixel % window.columns;
    const bool inside = pixel < pixels && y >= 0 && y < window.height && x >= 0 && x < window.width && valid > 0;
    return inside ? (window.image + int64_t{y} * window.width + x) * pixel_size + chunk.first + part : -1;
  };
  const auto store = [&](int pixel, const Vector<T, n>(&values)[Tensors], int existing) {
    Vector<T, n> result;
#pragma unroll
    for (int c = 0; c < n; ++c) narrow(c < existing ? transform(values, c) : Wide<T>(0), result.v[c]);
    write(tile + pixel * chunk_channels<T> + part, result);
  };
  if (!vectors) {
#pragma unroll 1
    for (int pixel = static_cast<int>(threadIdx.x) / parts; pixel < pixels; pixel += step) {
      const int64_t at = place(pixel);
      Vector<T, n> values[Tensors];
#pragma unroll
      for (int t = 0; t < Tensors; ++t) values[t] = read<n>(tensors[t] + (at < 0 ? 0 : at), at < 0 ? 0 : valid, false);
      store(pixel, values, at < 0 ? 0 : valid);
    }
    return;
  }
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / parts; first < pixels; first += in_flight * step) {
    Vector<T, n> values[in_flight][Tensors];
    int64_t at[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      at[i] = place(first + i * step);
#pragma unroll
      for (int t = 0; t < Tensors; ++t) values[i][t] = read<n>(tensors[t] + (at[i] < 0 ? 0 : at[i]));
    }
#pragma unroll
    for (int i = 0; i < in_flight; ++i)
      if (first + i * step < pixels) store(first + i * step, values[i], at[i] < 0 ? 0 : n);
  }
}

}  // namespace pf::cuda
