// The forward passes of a fused MBConv over all images. Work is cut by shape, not by the number of threads, and partial
// sums are merged in order: the same bits every time for one number of threads.
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/ops/folded_mbconv.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/parallel.h"

namespace pf {
namespace {

using at::Tensor;
using cpu::blocks;
using cpu::lanes;

constexpr int64_t wanted_units = 16;  // enough pieces of work for the threads of a large machine
// A wide tensor larger than this is not written where nobody keeps it, but computed twice, image by image in cache: up
// to a third slower, and scratch memory stays bounded whatever the batch.
constexpr int64_t stream_bytes = 128 << 20;
constexpr int64_t stream_images = 4;  // fewer are too few to share out

void merge(double& count, double* mean, double* m2, double n, const double* other_mean, const double* other_m2,
           int64_t channels) {
  const double share = n / (count + n);
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = other_mean[c] - mean[c];
    mean[c] += delta * share;
    m2[c] += other_m2[c] + delta * delta * count * share;
  }
  count += n;
}

}  // namespace

// Moments of every part of the work, each in memory of its own.
struct PartialMoments {
  PartialMoments(int64_t n, int64_t c) : channels(c), counts(n, 0.0), values(2 * n * c, 0.0) {}
  int64_t channels;
  std::vector<double> counts, values;
  cpu::Moments part(int64_t i) {
    double* p = values.data() + 2 * i * channels;
    return {counts[static_cast<size_t>(i)], p, p + channels};
  }
  Norm total(int64_t wanted, const std::string& group) {
    cpu::Moments sum = part(0);
    for (int64_t i = 1; i < static_cast<int64_t>(counts.size()); ++i) {
      const cpu::Moments p = part(i);
      merge(sum.count, sum.mean, sum.m2, p.count, p.mean, p.m2, channels);
    }
    Norm norm;
    norm.mean.assign(sum.mean, sum.mean + wanted);
    for (int64_t c = 0; c < wanted; ++c) norm.var.push_back(sum.m2[c] / sum.count);
    merge_moments(norm.mean, norm.var, sum.count, group);
    return norm;
  }
};

template <typename T>
bool FoldedMBConv<T>::streams() const {
  return wide_size() * static_cast<int64_t>(sizeof(T)) > stream_bytes && f.images >= stream_images;
}

template <typename T>
Norm FoldedMBConv<T>::depthwise(T* d, bool moments) const {
  // A unit is a few images; where images are few, also part of the channels, then part of the rows.
  const int64_t groups = ceil_div(blocks(f.ch), cpu::group);
  const int64_t images = std::max<int64_t>(1, std::min(256 / (f.ho * f.wo), f.images / wanted_units));
  const int64_t by_image = ceil_div(f.images, images);
  const int64_t by_block = std::min(groups, ceil_div(wanted_units, by_image));
  const int64_t by_row = std::min(std::max<int64_t>(1, f.ho / 4), ceil_div(wanted_units, by_image * by_block));
  const int64_t units = by_image * by_block * by_row, block_channels = blocks(f.ch) * lanes;
  PartialMoments partial(moments ? by_image * by_row : 0, block_channels);
  const int64_t own_block = images * f.ho * f.wo * lanes, own = d == nullptr ? blocks(f.ch) * own_block : 0;
  share_pieces(units, [&](const auto& take) {
    const Workspace scratch(static_cast<size_t>(cpu::forward_scratch(f, images) + own) * sizeof(T));
    for (int64_t u = take(); u >= 0; u = take()) {
      const int64_t i = u / (by_block * by_row), r = u / by_block % by_row, b = u % by_block;
      const int64_t block = groups * b / by_block * cpu::group, row = f.ho * r / by_row;
      const cpu::ForwardUnit unit = {
          i * images, std::min(images, f.images - i * images),
          block,      std::min(groups * (b + 1) / by_block * cpu::group, blocks(f.ch)) - block,
          row,        f.ho * (r + 1) / by_row - row};
      cpu::Moments part{};
      if (moments) part = partial.part(i * by_row + r), part.count = 0;  // another part of the channels may have set it
      T* to = d == nullptr ? scratch.as<T>() : d + unit.image * f.ho * f.wo * lanes;
      cpu::kernels_for<T>().expand_depthwise(f, unit, to, d == nullptr ? own_block : wide_block(),
                                             moments ? &part : nullptr, scratch.as<T>() + own);
      if (moments && b == 0) partial.counts[static_cast<size_t>(i * by_row + r)] = part.count;
    }
  });
  return moments ? partial.total(f.ch, a.group) : Norm{};
}

// Runs body(block, first pixel, last pixel, d, d_block, scratch, chunk) over all output pixels: tiles of d, or, where d
// is null, images whose d is computed on the spot.
template <typename T>
template <typename Body>
void FoldedMBConv<T>::for_outputs(const T* d, int64_t chunks, Body body) const {
  const int64_t pixels = f.ho * f.wo, tile = cpu::project_pixels(f);
  const int64_t pieces = d == nullptr ? f.images : ceil_div(pixels_out(), tile);
  const int64_t wide = d == nullptr ? blocks(f.ch) * pixels * lanes : 0;
  const int64_t size = std::max(d == nullptr ? cpu::forward_scratch(f, 1) : 0, cpu::project_scratch(f));
  share_pieces(chunks, [&](const auto& take) {
    const Workspace memory(static_cast<size_t>(wide + size) * sizeof(T));
    T *own = memory.as<T>(), *scratch = own + wide;
    for (int64_t i = take(); i >= 0; i = take()) {
      const int64_t c = chunks - 1 - i;  // what was written last is still in cache
      const int64_t first = pieces * c / chunks, last = pieces * (c + 1) / chunks;
      if (d != nullptr) {
        body(f, first * tile, std::min(last * tile, pixels_out()), d, wide_block(), scratch, c, int64_t{0});
        continue;
      }
      for (int64_t j = first; j < last; ++j) {
        const cpu::MBConvArgs<T> one = image(j);
        cpu::kernels_for<T>().expand_depthwise(one, {0, 1, 0, blocks(f.ch), 0, f.ho}, own, pixels * lanes, nullptr,
                                               scratch);
        body(one, int64_t{0}, pixels, static_cast<const T*>(own), pixels * lanes, scratch, c, j);
      }
    }
  });
}

template <typename T>
int64_t FoldedMBConv<T>::output_chunks(const T* d) const {
  return std::min(4 * wanted_units, d == nullptr ? f.images : ceil_div(pixels_out(), cpu::project_pixels(f)));
}

template <typename T>
Norm FoldedMBConv<T>::project(const T* d, T* y) {
  pack_project(nullptr);
  const int64_t chunks = output_chunks(d);
  PartialMoments partial(chunks, blocks(f.co) * lanes);
  for_outputs(d, chunks,
              [&](const auto& one, int64_t first, int64_t last, const T* wide, int64_t wide_block, T* scratch,
                  int64_t chunk, int64_t image) {
                cpu::Moments part = partial.part(chunk);
                cpu::kernels_for<T>().project(one, first, last, wide, wide_block, y + image * f.ho * f.wo * f.co, &part,
                                              scratch);
                partial.counts[static_cast<size_t>(chunk)] = part.count;
              });
  return partial.total(f.co, a.group);
}

template <typename T>
double FoldedMBConv<T>::gate(const T* d, const Tensor& grad) {
  const int64_t chunks = output_chunks(d), c = blocks(f.co) * lanes;
  f.grad = grad.const_data_ptr<T>();
  pack_project(nullptr);
  PartialMoments partial(chunks, c);
  std::vector<double> sums(static_cast<size_t>(2 * chunks * c), 0.0);
  for_outputs(d, chunks,
              [&](const auto& one, int64_t first, int64_t last, const T* wide, int64_t wide_block, T* scratch,
                  int64_t chunk, int64_t) {
                cpu::Moments part = partial.part(chunk);
                double* sum_g = sums.data() + 2 * chunk * c;
                cpu::kernels_for<T>().probe(one, first, last, wide, wide_block, part, sum_g, sum_g + c, scratch);
                partial.counts[static_cast<size_t>(chunk)] = part.count;
              });
  for (int64_t i = 1; i < chunks; ++i)
    for (int64_t j = 0; j < 2 * c; ++j) sums[static_cast<size_t>(j)] += sums[static_cast<size_t>(2 * i * c + j)];
  if (a.training) set_third(partial.total(f.co, a.group));
  const std::vector<double> beta = to_doubles(a.b3);
  double gate = 0;
  for (int64_t j = 0; j < f.co; ++j) {
    const double sum_g = sums[static_cast<size_t>(j)], sum_yg = sums[static_cast<size_t>(c + j)];
    gate += third.scale[j] * (sum_yg - third.mean[j] * sum_g) + beta[j] * sum_g;
  }
  return gate;
}

template <typename T>
void FoldedMBConv<T>::normalise(const T* y, T* out, bool shortcut) {
  const T *mean = per_channel(third.mean), *scale = per_channel(third.scale), *bias = per_channel(to_doubles(a.b3));
  at::parallel_for(0, pixels_out(), std::max<int64_t>(1, 16384 / f.co), [&](int64_t begin, int64_t end) {
    cpu::kernels_for<T>().affine(y + begin * f.co, end - begin, f.co, mean, scale, bias,
                                 shortcut ? f.x + begin * f.co : nullptr, out + begin * f.co);
  });
}

template <typename T>
void FoldedMBConv<T>::infer(T* out) {
  pack_project(&third.scale);
  std::vector<double> bias = to_doubles(a.b3);
  for (int64_t c = 0; c < f.co; ++c) bias[c] -= third.scale[c] * third.mean[c];
  f.project_bias = per_channel(bias);
  const bool stream = f.images >= stream_images;
  const Workspace memory(stream ? 0 : static_cast<size_t>(wide_size()) * sizeof(T));
  T* d = stream ? nullptr : memory.as<T>();
  if (!stream) depthwise(d, false);
  for_outputs(static_cast<const T*>(d), output_chunks(d),
              [&](const auto& one, int64_t first, int64_t last, const T* wide, int64_t wide_block, T* scratch, int64_t,
                  int64_t image) {
                cpu::kernels_for<T>().project(one, first, last, wide, wide_block, out + image * f.ho * f.wo * f.co,
                                              nullptr, scratch);
              });
}

#define PF_INSTANTIATE(T)                                         \
  template bool FoldedMBConv<T>::streams() const;                 \
  template Norm FoldedMBConv<T>::depthwise(T*, bool) const;       \
  template Norm FoldedMBConv<T>::project(const T*, T*);           \
  template double FoldedMBConv<T>::gate(const T*, const Tensor&); \
  template void FoldedMBConv<T>::normalise(const T*, T*, bool);   \
  template void FoldedMBConv<T>::infer(T*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)
#undef PF_INSTANTIATE

}  // namespace pf
