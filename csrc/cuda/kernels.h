// What the host entries hand to the depthwise kernels. No torch and no CUDA header: the kernels, the host entries and
// the emulation of the tests all include it.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace pf::cuda {

enum class ElementType { f16, bf16, f32, f64 };  // f64 exists in the emulation only

struct KernelShape {
  ElementType type;
  int batch, channels, height, width, out_height, out_width, kernel, stride;
};

// A thread block walks the tiles group, group + groups, ... of one chunk of channels: tiles of the output (forward) or
// of the input (backward).
struct Tiling {
  int height, width;  // of a tile, in pixels
  int down, across;   // tiles per image
  int groups, chunks;
  int threads, shared_bytes;
  constexpr int64_t tiles(const KernelShape& s) const { return int64_t{s.batch} * down * across; }
};

inline constexpr int chunk_bytes = 64;  // of channels per pixel in a tile: two sectors of memory
inline constexpr int quad = 4;          // channels a thread works on
// Of a block: with two blocks a multiprocessor, 144 registers a thread. Fewer than the least would load tiles too
// slowly.
inline constexpr int least_threads = 128, max_threads = 224;
// Columns a thread works on. Every width of the 224 x 224 and 28 x 28 spaces is a multiple of 7; the backward of stride
// 2 needs an even number.
inline constexpr int forward_strip = 7;
constexpr int backward_strip(int stride) { return stride == 1 ? 7 : 8; }

// expand: channels of x where e is made from it (below), else 0. No threads: nothing fits into shared memory.
Tiling forward_tiling(const KernelShape& shape, int expand = 0);
Tiling backward_tiling(const KernelShape& shape, int expand = 0);

// Of the accumulation type (float; double for f64): scale, shift, affine, partial, mean, var, dw. weight is of that
// type too where wide_weight says so. vectors: every pointer and every pixel starts on 16 bytes.
struct ForwardArgs {
  KernelShape shape;
  Tiling tiling;
  const void *x, *weight, *scale, *shift;
  void *d, *partial, *mean, *var;  // partial: (groups, 3, channels), count, mean and squares about it
  bool wide_weight, vectors;
};

struct BackwardArgs {
  KernelShape shape;
  Tiling tiling;
  const void *dz, *d, *affine, *x, *scale, *shift, *weight;
  void *q, *partial, *dw;           // q or partial and dw may be null; partial: (groups, kernel * kernel, channels)
  bool mask, wide_weight, vectors;  // x is read for mask and for dw only
};

enum class Activation { relu6, relu, silu, hardswish, identity };

// e = activation((x W1^T - mean) * scale + shift) in x's type, made where it is used: half precision only.
// vectors: every pixel of x starts on 8 bytes.
struct ExpandArgs {
  const void *x, *weight, *norm;  // pixels of `channels`; (all of e's channels, channels); float (4, e's channels):
  int channels;                   // mean, inverse standard deviation (not read here), scale, shift
  Activation activation;
  bool vectors;
};

// x, scale and shift of the pass are not read.
struct ExpandForwardArgs {
  ForwardArgs pass;
  ExpandArgs expand;
};

struct ExpandBackwardArgs {
  BackwardArgs pass;  // without the mask, with partial
  ExpandArgs expand;
};

// Both passes of each; errors stay in cudaGetLastError.
void launch(const ForwardArgs& arguments, CUstream_st* stream);
void launch(const BackwardArgs& arguments, CUstream_st* stream);
void launch(const ExpandForwardArgs& arguments, CUstream_st* stream);
void launch(const ExpandBackwardArgs& arguments, CUstream_st* stream);

}  // namespace pf::cuda
