// What the passes of a fused MBConv share. A block of the network is expand (1x1) -> BN -> activation -> depthwise
// (k x k) -> BN -> activation -> project (1x1) -> BN; docs/performance.md tells which pass does what.
//
// Narrow tensors (x, y and their gradients) are channels-last: rows of pixels. Wide tensors, tiles and packed weights
// are in blocks of 16 channels, [block][row][16]: a pixel of a block is one cache line of float32, every kernel
// addresses it by constant offsets, and the layout is the same for every instruction set.
#pragma once
#include <cstdint>

namespace pf::cpu {

constexpr int64_t lanes = 16;
constexpr int64_t group = 2;  // blocks of expanded channels that go through the passes together

#define PF_HELPER \
  [[maybe_unused]] static inline __attribute__((always_inline))  // never one shared copy, see CMakeLists

PF_HELPER int64_t blocks(int64_t channels) { return (channels + lanes - 1) / lanes; }

enum class ActivationForm : int { clamp, silu, hardswish };  // clamp(low, high): ReLU6, ReLU and identity

template <typename T>
struct MBConvArgs {
  int64_t images, ci, ch, co;  // channels in, expanded, out
  int64_t h, w, ho, wo;
  int64_t kernel, stride;
  bool expand;  // false: no expand convolution, ch == ci
  ActivationForm activation;
  T low, high;

  const T* x;            // (images, h, w, ci)
  const T* center;       // [blocks(ci)][16]: subtracted from x wherever it is read, to save the digits of a large mean
  const T* expand_in;    // [blocks(ch)][ci][16]: expand weights times the scale of the first BN
  const T* expand_bias;  // [blocks(ch)][16]
  const T* taps;         // [blocks(ch)][kernel * kernel][16]
  const T *mean2, *scale2, *bias2;  // [blocks(ch)][16]: z = (d - mean2) * scale2 + bias2
  const T* project_in;              // [blocks(co)][ch][16]
  const T* project_bias;            // [blocks(co)][16], or null; inference only

  // Backward.
  const T* taps_back;    // [blocks(ch)][kernel * kernel][16]: by phase of the stride, each phase turned round
  const T* project_out;  // [blocks(ch)][co][16]
  const T* expand_out;   // [blocks(ci)][16 * blocks(ch)][16]: expand weights times the scale of the first BN
  const T* y;            // (pixels out, co)
  const T* grad;         // (pixels out, co)
  const T *mean3, *dy_grad, *dy_y, *dy_bias;  // [blocks(co)][16]: dY = dy_grad * G + dy_y * (y - mean3) + dy_bias
  const T *dd_dz, *dd_d, *dd_bias;            // [blocks(ch)][16]: dD = dd_dz * dz + dd_d * (d - mean2) + dd_bias
};

// Count, mean and sum of squares about the mean of each channel, so that partial ones can be merged without loss.
struct Moments {
  double count;
  double* mean;
  double* m2;
};

// Sizes of tiles and scratch, in elements.

constexpr int64_t tile_elements = 1 << 17;  // half a MiB of float32: half of a common second-level cache

// Output rows of one depthwise strip: what fits beside the packed input.
template <typename T>
PF_HELPER int64_t forward_rows(const MBConvArgs<T>& f) {
  const int64_t row = group * lanes * (f.w + f.kernel), rows = (tile_elements / 2 / row - f.kernel) / f.stride;
  return rows < 1 ? 1 : rows > f.ho ? f.ho : rows;
}
template <typename T>
PF_HELPER int64_t forward_buffer(const MBConvArgs<T>& f) {  // one block of expanded rows with its halo
  return ((forward_rows(f) - 1) * f.stride + f.kernel) * (f.w + 2 * (f.kernel / 2)) * lanes;
}
template <typename T>
PF_HELPER int64_t forward_scratch(const MBConvArgs<T>& f, int64_t images) {
  return blocks(f.ci) * lanes * images * f.h * f.w + group * forward_buffer(f);
}

// Pixels of one tile of the project pass.
template <typename T>
PF_HELPER int64_t project_pixels(const MBConvArgs<T>& f) {
  const int64_t n = tile_elements / 2 / (blocks(f.ch) * lanes) / 28 * 28;
  return n < 28 ? 28 : n > 252 ? 252 : n;
}
template <typename T>
PF_HELPER int64_t project_scratch(const MBConvArgs<T>& f) {
  return project_pixels(f) * lanes * (blocks(f.ch) + blocks(f.co));
}

constexpr int64_t backward_pixels = 252;
template <typename T>
PF_HELPER int64_t backward_project_scratch(const MBConvArgs<T>& f) {
  return backward_pixels * lanes * (blocks(f.co) + group);
}

// A strip of the input: whole images, or some rows of one.
struct InputStrip {
  int64_t image, images, row, rows;
};
template <typename T>
PF_HELPER int64_t strip_pixels(const MBConvArgs<T>& f) {
  return tile_elements / (2 * blocks(f.ci) * lanes + 3 * group * lanes);
}
// Columns and rows of the padded dD: every output pixel that some input pixel of the strip reaches.
template <typename T>
PF_HELPER int64_t dd_columns(const MBConvArgs<T>& f) {
  return f.wo + 2 * (f.kernel / 2) + 1;
}
template <typename T>
PF_HELPER int64_t strip_scratch(const MBConvArgs<T>& f, int64_t images, int64_t rows) {
  const int64_t pixels = images * rows * f.w;
  const int64_t dd = ((rows + f.kernel) / f.stride + 2) * dd_columns(f);
  return lanes * (2 * blocks(f.ci) * pixels + group * (3 * pixels + dd));
}

}  // namespace pf::cpu
