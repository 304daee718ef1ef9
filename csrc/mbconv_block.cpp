// Arguments of a fused MBConv, folded; and its forward passes over all images. Work is cut by shape, not by the number of
// threads, and partial sums are merged in order: the same bits for any number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "activation.h"
#include "mbconv.h"
#include "workspace.h"

namespace pf {
namespace {

using at::Tensor;
using cpu::blocks;
using cpu::lanes;

constexpr int64_t wanted_units = 16;  // enough pieces of work for the threads of a large machine

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& x) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == n, op, ": ", name, " must have shape (", n, ",), got ", t.sizes());
  TORCH_CHECK_VALUE(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x, ", x.scalar_type(),
                    ", got ", t.scalar_type());
}

void check_weight(const char* op, const char* name, const Tensor& t, at::IntArrayRef sizes, const Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x, ", x.scalar_type(),
                    ", got ", t.scalar_type());
}

// [block][k][16] from element(row, k): rows become columns of the panel, padded with zeros.
template <typename T, typename Element>
void pack_panel(T* panel, int64_t rows, int64_t depth, int64_t panel_depth, Element element) {
  at::parallel_for(0, blocks(rows), std::max<int64_t>(1, 16384 / (depth * lanes)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t l = 0; l < std::min(lanes, rows - b * lanes); ++l)
          panel[(b * panel_depth + k) * lanes + l] = static_cast<T>(element(b * lanes + l, k));
  });
}

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

// Moments of every part of the work, each in memory of its own.
struct PartialMoments {
  PartialMoments(int64_t n, int64_t c) : channels(c), counts(n, 0.0), values(2 * n * c, 0.0) {}
  int64_t channels;
  std::vector<double> counts, values;
  cpu::Moments part(int64_t i) {
    double* p = values.data() + 2 * i * channels;
    return {counts[static_cast<size_t>(i)], p, p + channels};
  }
  Norm total(int64_t wanted) {
    cpu::Moments sum = part(0);
    for (int64_t i = 1; i < static_cast<int64_t>(counts.size()); ++i) {
      const cpu::Moments p = part(i);
      merge(sum.count, sum.mean, sum.m2, p.count, p.mean, p.m2, channels);
    }
    Norm norm;
    norm.mean.assign(sum.mean, sum.mean + wanted);
    for (int64_t c = 0; c < wanted; ++c) norm.var.push_back(sum.m2[c] / sum.count);
    return norm;
  }
};

}  // namespace

Tensor channels_last(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

std::vector<double> to_doubles(const Tensor& t) {
  const Tensor d = t.to(at::kDouble).contiguous();
  const double* p = d.const_data_ptr<double>();
  return {p, p + d.numel()};
}

void Norm::fold(const Tensor& gamma, double eps) {
  scale = to_doubles(gamma);
  inverse.resize(var.size());
  for (size_t c = 0; c < var.size(); ++c) {
    inverse[c] = 1 / std::sqrt(var[c] + eps);
    scale[c] *= inverse[c];
  }
}

Arguments check(const char* op, const Tensor& x, at::TensorList params, const std::optional<Tensor>& mean,
                const std::optional<Tensor>& cov, int64_t stride, const std::string& activation, bool training,
                double eps) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, op,
                    ": x must have shape (batch, channels, height, width) and not be empty, got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op,
                    ": x must be float32 or float64, got ", x.scalar_type());
  TORCH_CHECK_VALUE(params.size() == 6 || params.size() == 9, op,
                    ": params must hold 9 tensors, or 6 without an expand convolution, got ", params.size());
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
  Arguments a;
  size_t i = 0;
  if (params.size() == 9) {
    a.w1 = params[0].contiguous(), a.g1 = params[1], a.b1 = params[2];
    i = 3;
  }
  a.wd = params[i].contiguous(), a.g2 = params[i + 1], a.b2 = params[i + 2];
  a.wp = params[i + 3].contiguous(), a.g3 = params[i + 4], a.b3 = params[i + 5];
  TORCH_CHECK_VALUE(a.wd.dim() == 4, op, ": the depthwise weight must have 4 dimensions, got ", a.wd.sizes());
  const int64_t ci = x.size(1), ch = a.wd.size(0), k = a.wd.size(2);
  TORCH_CHECK_VALUE(k == 3 || k == 5 || k == 7, op, ": the kernel size must be 3, 5 or 7, got ", k);
  check_weight(op, "the depthwise weight", a.wd, {a.expand() ? ch : ci, 1, k, k}, x);
  TORCH_CHECK_VALUE(a.wp.dim() == 4, op, ": the project weight must have 4 dimensions, got ", a.wp.sizes());
  check_weight(op, "the project weight", a.wp, {a.wp.size(0), ch, 1, 1}, x);
  if (a.expand()) {
    check_weight(op, "the expand weight", a.w1, {ch, ci, 1, 1}, x);
    check_vector(op, "the first gamma", a.g1, ch, x);
    check_vector(op, "the first beta", a.b1, ch, x);
  }
  check_vector(op, "the second gamma", a.g2, ch, x);
  check_vector(op, "the second beta", a.b2, ch, x);
  check_vector(op, "the third gamma", a.g3, a.wp.size(0), x);
  check_vector(op, "the third beta", a.b3, a.wp.size(0), x);
  check_activation(op, activation);
  TORCH_CHECK_VALUE(eps >= 0, op, ": eps must not be negative, got ", eps);
  if (training) {
    const int64_t out = x.size(0) * ((x.size(2) - 1) / stride + 1) * ((x.size(3) - 1) / stride + 1);
    TORCH_CHECK_VALUE(out > 1, op, ": training needs more than one value per channel, got x of shape ", x.sizes());
    if (a.expand()) {
      TORCH_CHECK_VALUE(mean.has_value() && cov.has_value(), op,
                        ": training with an expand convolution needs mean and cov, as proxyless_fast::gram gives them");
      TORCH_CHECK_VALUE(mean->sizes() == at::IntArrayRef({ci}), op, ": mean must have shape (", ci, ",), got ",
                        mean->sizes());
      TORCH_CHECK_VALUE(cov->sizes() == at::IntArrayRef({ci, ci}), op, ": cov must have shape (", ci, ", ", ci,
                        "), got ", cov->sizes());
      a.mean = mean->to(at::kDouble).contiguous();
      a.cov = cov->to(at::kDouble).contiguous();
    }
  }
  a.x = channels_last(x);
  a.stride = stride;
  a.activation = activation;
  a.training = training;
  a.eps = eps;
  return a;
}

void check_running(const char* op, const Arguments& a, at::TensorList running) {
  const size_t wanted = a.expand() ? 6 : 4;
  TORCH_CHECK_VALUE(running.size() == wanted, op, ": running must hold a mean and a variance for each batch norm, ",
                    wanted, " tensors, got ", running.size());
  for (size_t i = 0; i < wanted; ++i) {
    const int64_t c = i + 2 < wanted ? a.wd.size(0) : a.wp.size(0);
    TORCH_CHECK_VALUE(running[i].sizes() == at::IntArrayRef({c}), op, ": running[", i, "] must have shape (", c,
                      ",), got ", running[i].sizes());
  }
}

template <typename T>
Block<T>::Block(const Arguments& arguments) : a(arguments) {
  const Tensor& x = a.x;
  f.images = x.size(0), f.ci = x.size(1), f.h = x.size(2), f.w = x.size(3);
  f.ch = a.wd.size(0), f.co = a.wp.size(0), f.kernel = a.wd.size(2), f.stride = a.stride;
  f.ho = (f.h - 1) / f.stride + 1, f.wo = (f.w - 1) / f.stride + 1;
  f.expand = a.expand();
  const auto act = activation_of<T>(a.activation);
  f.activation = act.kind, f.low = act.low, f.high = act.high;
  f.x = x.const_data_ptr<T>();
  f.center = a.mean.defined() ? per_channel(to_doubles(a.mean)) : take(blocks(f.ci) * lanes);
  T* taps = take(blocks(f.ch) * lanes * f.kernel * f.kernel);
  const int64_t k2 = f.kernel * f.kernel;
  const T* wd = a.wd.const_data_ptr<T>();
  pack_panel(taps, f.ch, k2, k2, [&](int64_t c, int64_t k) { return wd[c * k2 + k]; });
  f.taps = taps;
}

template <typename T>
T* Block<T>::take(int64_t n) {
  owned_.push_back(at::zeros({n}, a.x.options().memory_format(at::MemoryFormat::Contiguous)));
  return owned_.back().template mutable_data_ptr<T>();
}

template <typename T>
const T* Block<T>::per_channel(const std::vector<double>& v) {
  const auto n = static_cast<int64_t>(v.size());
  T* p = take(blocks(n) * lanes);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<T>(v[static_cast<size_t>(i)]);
  return p;
}

template <typename T>
void Block<T>::first_from_batch() {
  const Tensor w = a.w1.view({f.ch, f.ci}).to(at::kDouble);
  const Tensor wc = at::matmul(w, a.cov);
  Norm norm;
  norm.mean = to_doubles(at::matmul(w, a.mean));
  norm.var.resize(static_cast<size_t>(f.ch));
  const double *pw = w.const_data_ptr<double>(), *pc = wc.const_data_ptr<double>();
  for (int64_t c = 0; c < f.ch; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < f.ci; ++i) sum += pw[c * f.ci + i] * pc[c * f.ci + i];
    norm.var[static_cast<size_t>(c)] = std::max(sum, 0.0);
  }
  set_first(std::move(norm));
}

template <typename T>
void Block<T>::set_first(Norm norm) {
  first = std::move(norm);
  first.fold(a.g1, a.eps);
  const T* w = a.w1.const_data_ptr<T>();
  T* panel = take(blocks(f.ch) * lanes * f.ci);
  pack_panel(panel, f.ch, f.ci, f.ci,
             [&](int64_t c, int64_t k) { return static_cast<double>(w[c * f.ci + k]) * first.scale[c]; });
  f.expand_in = panel;
  std::vector<double> bias = to_doubles(a.b1);
  for (int64_t c = 0; c < f.ch; ++c) {
    double at_center = 0;
    for (int64_t i = 0; i < f.ci; ++i) at_center += static_cast<double>(w[c * f.ci + i]) * static_cast<double>(f.center[i]);
    bias[c] += first.scale[c] * (at_center - first.mean[c]);
  }
  f.expand_bias = per_channel(bias);
}

template <typename T>
void Block<T>::set_second(Norm norm) {
  second = std::move(norm);
  second.fold(a.g2, a.eps);
  f.mean2 = per_channel(second.mean);
  f.scale2 = per_channel(second.scale);
  f.bias2 = per_channel(to_doubles(a.b2));
  pack_project(nullptr);
}

template <typename T>
void Block<T>::pack_project(const std::vector<double>* scale) {
  const T* w = a.wp.const_data_ptr<T>();
  T* panel = take(blocks(f.co) * lanes * f.ch);
  if (scale == nullptr)
    pack_panel(panel, f.co, f.ch, f.ch, [&](int64_t c, int64_t k) { return w[c * f.ch + k]; });
  else
    pack_panel(panel, f.co, f.ch, f.ch,
               [&](int64_t c, int64_t k) { return static_cast<double>(w[c * f.ch + k]) * (*scale)[c]; });
  f.project_in = panel;
}

template <typename T>
Norm Block<T>::depthwise(T* d, bool moments) const {
  // A unit is a few images; where images are few, also part of the channels, then part of the rows.
  const int64_t groups = ceil_div(blocks(f.ch), cpu::group);
  const int64_t images = std::max<int64_t>(1, std::min(256 / (f.ho * f.wo), f.images / wanted_units));
  const int64_t by_image = ceil_div(f.images, images);
  const int64_t by_block = std::min(groups, ceil_div(wanted_units, by_image));
  const int64_t by_row = std::min(std::max<int64_t>(1, f.ho / 4), ceil_div(wanted_units, by_image * by_block));
  const int64_t units = by_image * by_block * by_row, block_channels = blocks(f.ch) * lanes;
  PartialMoments partial(moments ? by_image * by_row : 0, block_channels);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    const Workspace scratch(static_cast<size_t>(cpu::forward_scratch(f, images)) * sizeof(T));
    for (int64_t u = begin; u < end; ++u) {
      const int64_t i = u / (by_block * by_row), r = u / by_block % by_row, b = u % by_block;
      const int64_t block = groups * b / by_block * cpu::group, row = f.ho * r / by_row;
      const cpu::ForwardUnit unit = {i * images,
                                     std::min(images, f.images - i * images),
                                     block,
                                     std::min(groups * (b + 1) / by_block * cpu::group, blocks(f.ch)) - block,
                                     row,
                                     f.ho * (r + 1) / by_row - row};
      cpu::Moments part{};
      if (moments) part = partial.part(i * by_row + r), part.count = 0;  // another part of the channels may have set it
      cpu::kernels_for<T>().expand_depthwise(f, unit, d + unit.image * f.ho * f.wo * lanes, wide_block(),
                                             moments ? &part : nullptr, scratch.as<T>());
      if (moments && b == 0) partial.counts[static_cast<size_t>(i * by_row + r)] = part.count;
    }
  });
  return moments ? partial.total(f.ch) : Norm{};
}

template <typename T>
Norm Block<T>::project(const T* d, T* y) const {
  const int64_t tile = cpu::project_pixels(f), tiles = ceil_div(pixels_out(), tile);
  const int64_t chunks = std::min<int64_t>(tiles, 4 * wanted_units);
  PartialMoments partial(chunks, blocks(f.co) * lanes);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Workspace scratch(static_cast<size_t>(cpu::project_scratch(f)) * sizeof(T));
    for (int64_t i = begin; i < end; ++i) {
      cpu::Moments part = partial.part(i);
      cpu::kernels_for<T>().project(f, tiles * i / chunks * tile, std::min(tiles * (i + 1) / chunks * tile, pixels_out()),
                                    d, wide_block(), y, &part, scratch.as<T>());
      partial.counts[static_cast<size_t>(i)] = part.count;
    }
  });
  return partial.total(f.co);
}

template <typename T>
double Block<T>::gate(const T* d, const Tensor& grad) {
  const int64_t tile = cpu::project_pixels(f), tiles = ceil_div(pixels_out(), tile);
  const int64_t chunks = std::min<int64_t>(tiles, 4 * wanted_units), c = blocks(f.co) * lanes;
  f.grad = grad.const_data_ptr<T>();
  PartialMoments partial(chunks, c);
  std::vector<double> sums(static_cast<size_t>(2 * chunks * c), 0.0);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const Workspace scratch(static_cast<size_t>(cpu::project_scratch(f)) * sizeof(T));
    for (int64_t i = begin; i < end; ++i) {
      cpu::Moments part = partial.part(i);
      double* sum_g = sums.data() + 2 * i * c;
      cpu::kernels_for<T>().probe(f, tiles * i / chunks * tile, std::min(tiles * (i + 1) / chunks * tile, pixels_out()), d,
                                  wide_block(), part, sum_g, sum_g + c, scratch.as<T>());
      partial.counts[static_cast<size_t>(i)] = part.count;
    }
  });
  for (int64_t i = 1; i < chunks; ++i)
    for (int64_t j = 0; j < 2 * c; ++j) sums[static_cast<size_t>(j)] += sums[static_cast<size_t>(2 * i * c + j)];
  Norm batch = partial.total(f.co);
  if (a.training) set_third(std::move(batch));
  const std::vector<double> beta = to_doubles(a.b3);
  double gate = 0;
  for (int64_t j = 0; j < f.co; ++j) {
    const double sum_g = sums[static_cast<size_t>(j)], sum_yg = sums[static_cast<size_t>(c + j)];
    gate += third.scale[j] * (sum_yg - third.mean[j] * sum_g) + beta[j] * sum_g;
  }
  return gate;
}

template <typename T>
void Block<T>::normalise(const T* y, T* out) {
  const T *mean = per_channel(third.mean), *scale = per_channel(third.scale), *bias = per_channel(to_doubles(a.b3));
  at::parallel_for(0, pixels_out(), std::max<int64_t>(1, 16384 / f.co), [&](int64_t begin, int64_t end) {
    cpu::kernels_for<T>().affine(y + begin * f.co, end - begin, f.co, mean, scale, bias, out + begin * f.co);
  });
}

template <typename T>
void Block<T>::infer(T* out) {
  pack_project(&third.scale);
  std::vector<double> bias = to_doubles(a.b3);
  for (int64_t c = 0; c < f.co; ++c) bias[c] -= third.scale[c] * third.mean[c];
  f.project_bias = per_channel(bias);
  if (f.images < wanted_units / 4) {  // too few to share out: all threads in each pass
    const Workspace d(static_cast<size_t>(wide_size()) * sizeof(T));
    depthwise(d.as<T>(), false);
    const int64_t tile = cpu::project_pixels(f), tiles = ceil_div(pixels_out(), tile);
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      const Workspace scratch(static_cast<size_t>(cpu::project_scratch(f)) * sizeof(T));
      cpu::kernels_for<T>().project(f, begin * tile, std::min(end * tile, pixels_out()), d.as<T>(), wide_block(), out,
                                    nullptr, scratch.as<T>());
    });
    return;
  }
  const int64_t pixels = f.ho * f.wo, wide = blocks(f.ch) * pixels * lanes;
  const int64_t scratch_size = std::max(cpu::forward_scratch(f, 1), cpu::project_scratch(f));
  at::parallel_for(0, f.images, 1, [&](int64_t begin, int64_t end) {
    const Workspace memory(static_cast<size_t>(wide + scratch_size) * sizeof(T));
    T *d = memory.as<T>(), *scratch = d + wide;
    for (int64_t i = begin; i < end; ++i) {
      cpu::kernels_for<T>().expand_depthwise(f, {i, 1, 0, blocks(f.ch), 0, f.ho}, d, pixels * lanes, nullptr, scratch);
      cpu::kernels_for<T>().project(f, 0, pixels, d, pixels * lanes, out + i * pixels * f.co, nullptr, scratch);
    }
  });
}

template class Block<float>;
template class Block<double>;

}  // namespace pf
