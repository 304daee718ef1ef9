// The second stage: sums over groups of what the blocks left, in double and in a fixed order.
#pragma once
#include "cuda/kernels/tile.cuh"

namespace pf::cuda {

inline constexpr int reduce_lanes = 32, reduce_slices = 8;
inline constexpr int reduce_threads = reduce_lanes * reduce_slices;
inline constexpr int reduce_shared = 3 * reduce_threads * static_cast<int>(sizeof(double));

// Grid: channels / 32. Mean and biased variance from (groups, 3, channels) counts, means and squares about them; the
// first group's mean is the pivot.
template <typename A>
__global__ void __launch_bounds__(reduce_threads) finish_statistics(const ForwardArgs p) {
  PF_SHARED(shared);
  auto* parts = reinterpret_cast<double*>(shared);  // [3][slices][lanes]
  const int lane = static_cast<int>(threadIdx.x) % reduce_lanes, slice = static_cast<int>(threadIdx.x) / reduce_lanes;
  const int c = static_cast<int>(blockIdx.x) * reduce_lanes + lane, channels = p.shape.channels;
  const A* partial = static_cast<const A*>(p.partial) + c;
  double count = 0, sum = 0, squares = 0, pivot = 0;
  if (c < channels) {
    pivot = static_cast<double>(partial[channels]);
    for (int g = slice; g < p.tiling.groups; g += reduce_slices) {
      const A* row = partial + int64_t{3} * g * channels;
      const double n = static_cast<double>(row[0]), x = static_cast<double>(row[channels]) - pivot;
      count += n;
      sum += n * x;
      squares += static_cast<double>(row[2 * channels]) + n * x * x;
    }
  }
  parts[threadIdx.x] = count;
  parts[reduce_threads + threadIdx.x] = sum;
  parts[2 * reduce_threads + threadIdx.x] = squares;
  __syncthreads();
  if (slice != 0 || c >= channels) return;
  for (int i = 1; i < reduce_slices; ++i) {
    count += parts[i * reduce_lanes + lane];
    sum += parts[reduce_threads + i * reduce_lanes + lane];
    squares += parts[2 * reduce_threads + i * reduce_lanes + lane];
  }
  const double mean = sum / count, variance = squares / count - mean * mean;
  static_cast<A*>(p.mean)[c] = static_cast<A>(pivot + mean);
  static_cast<A*>(p.var)[c] = static_cast<A>(variance > 0 ? variance : 0);
}

// Grid: taps * channels / 32. dw (channels, taps) from (groups, taps, channels).
template <typename A>
__global__ void __launch_bounds__(reduce_threads) finish_weight(const BackwardArgs p) {
  PF_SHARED(shared);
  auto* parts = reinterpret_cast<double*>(shared);  // [slices][lanes]
  const int lane = static_cast<int>(threadIdx.x) % reduce_lanes, slice = static_cast<int>(threadIdx.x) / reduce_lanes;
  const int taps = p.shape.kernel * p.shape.kernel, size = taps * p.shape.channels;
  const int at = static_cast<int>(blockIdx.x) * reduce_lanes + lane;
  double sum = 0;
  if (at < size)
    for (int g = slice; g < p.tiling.groups; g += reduce_slices)
      sum += static_cast<double>(static_cast<const A*>(p.partial)[int64_t{g} * size + at]);
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || at >= size) return;
  for (int i = 1; i < reduce_slices; ++i) sum += parts[i * reduce_lanes + lane];
  static_cast<A*>(p.dw)[at % p.shape.channels * taps + at / p.shape.channels] = static_cast<A>(sum);
}

#ifdef __CUDACC__
// The second stage of a pass, behind its first on the stream.
inline void finish(const ForwardArgs& p, CUstream_st* stream) {
  const int blocks = (p.shape.channels + reduce_lanes - 1) / reduce_lanes;
  finish_statistics<float><<<blocks, reduce_threads, reduce_shared, stream>>>(p);
}

inline void finish(const BackwardArgs& p, CUstream_st* stream) {
  if (p.partial == nullptr) return;
  const int blocks = (p.shape.kernel * p.shape.kernel * p.shape.channels + reduce_lanes - 1) / reduce_lanes;
  finish_weight<float><<<blocks, reduce_threads, reduce_shared, stream>>>(p);
}
#endif

}  // namespace pf::cuda
