// The table of CPU kernels. Every kernel is a plain function over a range of work: the host entries (compiled for the
// baseline) own memory and threads, and the kernels, compiled once per instruction set, own the arithmetic.
#pragma once
#include <cstdint>

#include "cpu/batch_norm.h"
#include "cpu/conv.h"
#include "cpu/mbconv.h"

namespace pf::cpu {

constexpr int64_t gram_rows = 256;  // short enough that sums in T lose nothing, long enough to be added up in double
PF_HELPER int64_t gram_scratch(int64_t channels) { return blocks(channels) * lanes * (gram_rows + lanes); }

// A batch of images seen as pixels x channels: element (n, p, c) is at data[n * stride_n + p * stride_p + c *
// stride_c].
template <typename T>
struct Pixels {
  const T* data;
  int64_t images, pixels, channels;
  int64_t stride_n, stride_p, stride_c;
};

// Work of the first forward pass: some output rows of some blocks of expanded channels of some images.
struct ForwardUnit {
  int64_t image, images, block, blocks, row, rows;
};

// What the last backward pass sums over pixels; null where nobody asks. q is the gradient of the expanded tensor before
// its activation, u that tensor.
template <typename T>
struct ExpandSums {
  double* q;     // [blocks(ch)][16]: sum q
  double* qu;    // [blocks(ch)][16]: sum q (u - expand_bias)
  double* taps;  // [blocks(ch)][kernel * kernel][16], in the order of taps_back
  T* expand;     // [blocks(ch)][ci][16]: sum q (x - center)
};

template <typename T>
struct KernelsFor {
  // Sum of a[i] * b[i] over n contiguous elements, in double.
  double (*dot)(const T* a, const T* b, int64_t n);
  // Rows first..last-1 (row = image * pixels + pixel): adds sum(x - pivot) to sum[C] and the upper triangle of
  // sum((x - pivot)(x - pivot)^T) to gram[C * C], in double. scratch holds gram_scratch(C) elements.
  void (*gram)(const Pixels<T>& x, const T* pivot, int64_t first, int64_t last, double* sum, double* gram, T* scratch);

  // mean_out = w mean and out = w C w^T for each of the rows of w (n elements each). panel: [blocks(n)][n][16], the
  // upper triangle of C by blocks, those off the diagonal doubled; mean is padded to whole blocks; scratch: rows * 16 *
  // (blocks(n) + 2).
  void (*quadratic)(const T* w, int64_t rows, int64_t n, const double* mean, const double* panel, double* mean_out,
                    double* out, double* scratch);

  // The passes of a fused MBConv (cpu/mbconv.h). Pixels first..last-1 of the output; wide tensors are blocks d_block
  // elements apart; sums are added to what they point at.

  // d of a unit (d points at the unit's first image), and its moments if wanted; scratch: forward_scratch.
  void (*expand_depthwise)(const MBConvArgs<T>& f, const ForwardUnit& unit, T* d, int64_t d_block, Moments* moments,
                           T* scratch);
  // y = project(act(BN2(d))), and its moments if wanted; scratch: project_scratch, as for probe.
  void (*project)(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, T* y,
                  Moments* moments, T* scratch);
  // The same without writing y: moments, sum(grad) and sum(y grad) per channel.
  void (*probe)(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, Moments& moments,
                double* sum_g, double* sum_yg, T* scratch);
  // out = (y - mean) * scale + bias + add over rows of c channels; add may be null.
  void (*affine)(const T* y, int64_t pixels, int64_t c, const T* mean, const T* scale, const T* bias, const T* add,
                 T* out);
  // sum(g) and sum(g (y - mean)) per channel.
  void (*pair_sums)(const T* g, const T* y, int64_t pixels, int64_t c, const T* mean, double* sum_g, double* sum_gy);
  // dz, sum(dz), sum(dz (d - mean2)), and if dproject is not null the gradient of project, [blocks(ch)][co][16];
  // scratch: backward_project_scratch.
  void (*backward_project)(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, T* dz,
                           double* sum_dz, double* sum_dzd, T* dproject, T* scratch);
  // dx of a strip less what the first BN's statistics add (dx may be null); scratch: strip_scratch.
  void (*backward_expand)(const MBConvArgs<T>& f, const InputStrip& strip, const T* d, const T* dz, int64_t d_block,
                          T* dx, const ExpandSums<T>& sums, T* scratch);
  // dx += (x - center) * correction + bias + add over input pixels, correction given as [blocks(ci)][ci][16]; add may
  // be null; scratch: 2 * backward_pixels * 16 * blocks(ci).
  void (*finish_dx)(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* correction, const T* bias,
                    const T* add, T* dx, T* scratch);

  // A dense convolution with its batch norm and activation (cpu/conv.h) over output rows (image, y); scratch:
  // conv_scratch; sums are added to what they point at.

  // The sum of the windows less the center, and the upper triangle of their products.
  void (*conv_gram)(const ConvArgs<T>& f, int64_t first, int64_t last, double* sum, double* gram, T* scratch);
  void (*conv_forward)(const ConvArgs<T>& f, int64_t first, int64_t last, T* out, T* scratch);
  // With q the gradient before the activation: sum q, and sum q (window - center) as [blocks(co)][depth][16].
  void (*conv_backward)(const ConvArgs<T>& f, int64_t first, int64_t last, const T* grad, double* sum_q, T* dweight,
                        T* scratch);

  // A batch norm with its activation (cpu/batch_norm.h) over rows of channels; sums are added to what they point at.

  // Merges the rows into the moments; the caller adds the rows to their count.
  void (*norm_moments)(const T* x, int64_t rows, int64_t channels, const Moments& moments);
  void (*norm_forward)(const NormArgs<T>& f, const T* x, int64_t rows, T* out);
  // With g the gradient before the activation: sum(g) and sum(g (x - mean)).
  void (*norm_sums)(const NormArgs<T>& f, const T* grad, const T* x, int64_t rows, double* sum, double* sum_x);
  // dx = scale * g + slope * (x - mean) + offset; slope and offset are [blocks(channels)][16].
  void (*norm_backward)(const NormArgs<T>& f, const T* grad, const T* x, int64_t rows, const T* slope, const T* offset,
                        T* dx);
};

struct Kernels {
  const char* name;
  KernelsFor<float> f32;
  KernelsFor<double> f64;
};

// The table of the best instruction set this machine has, or of the one PROXYLESS_FAST_ISA names.
const Kernels& kernels();

template <typename T>
const KernelsFor<T>& kernels_for();

}  // namespace pf::cpu
