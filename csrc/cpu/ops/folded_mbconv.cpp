// Arguments of a fused MBConv: checked, and folded into what the kernels take.
#include "cpu/ops/folded_mbconv.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "cpu/ops/activation.h"
#include "cpu/ops/checks.h"

namespace pf {
namespace {

using at::Tensor;
using cpu::blocks;
using cpu::lanes;

void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& x) {
  require(op, name, t, {n}, x.scalar_type());
}

// [block][k][16] from element(row, k): rows become columns of the panel, padded with zeros.
template <typename T, typename Element>
void pack_panel(T* panel, int64_t rows, int64_t depth, Element element) {
  at::parallel_for(0, blocks(rows), std::max<int64_t>(1, 16384 / (depth * lanes)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t l = 0; l < std::min(lanes, rows - b * lanes); ++l)
        for (int64_t k = 0; k < depth; ++k) panel[(b * depth + k) * lanes + l] = element(b * lanes + l, k);
  });
}

}  // namespace

Tensor channels_last(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

std::vector<double> to_doubles(const Tensor& t) {
  const Tensor dense = t.contiguous();
  std::vector<double> values(static_cast<size_t>(dense.numel()));
  AT_DISPATCH_FLOATING_TYPES(dense.scalar_type(), "to_doubles",
                             [&] { std::copy_n(dense.const_data_ptr<scalar_t>(), values.size(), values.begin()); });
  return values;
}

void Norm::fold(const Tensor& gamma, double eps) {
  scale = to_doubles(gamma);
  inverse.resize(var.size());
  for (size_t c = 0; c < var.size(); ++c) {
    inverse[c] = 1 / std::sqrt(var[c] + eps);
    scale[c] *= inverse[c];
  }
}

Covariance::Covariance(const std::optional<Tensor>& given_mean, const std::optional<Tensor>& given_cov, bool forward) {
  if (given_mean.has_value()) mean = given_mean->to(at::kDouble).contiguous();
  if (!given_cov.has_value() || !given_cov->device().is_cpu()) return;
  cov = given_cov->to(at::kDouble).contiguous();
  if (!forward || cov.dim() != 2 || cov.size(0) != cov.size(1)) return;  // `check_mbconv` says what is wrong
  // The upper triangle by blocks, those off the diagonal doubled: [blocks(n)][n][16].
  const int64_t n = cov.size(0);
  panel = at::zeros({blocks(n), n, lanes}, cov.options());
  const double* c = cov.const_data_ptr<double>();
  double* p = panel.mutable_data_ptr<double>();
  for (int64_t b = 0; b < blocks(n); ++b)
    for (int64_t k = 0; k < std::min(n, (b + 1) * lanes); ++k)
      for (int64_t l = 0; l < std::min(lanes, n - b * lanes); ++l)
        p[(b * n + k) * lanes + l] = c[k * n + b * lanes + l] * (k < b * lanes ? 2 : 1);
}

MBConvInputs check_mbconv(const char* op, const Tensor& x, at::TensorList params, const Covariance& given,
                          int64_t stride, const std::string& activation, bool training, double eps,
                          std::string_view group) {
  require_real_image(op, "x", x);
  TORCH_CHECK_VALUE(params.size() == 6 || params.size() == 9, op,
                    ": params must hold 9 tensors, or 6 without an expand convolution, got ", params.size());
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, op, ": stride must be 1 or 2, got ", stride);
  for (const Tensor& t : params)
    TORCH_CHECK_VALUE(t.numel() > 0, op, ": params must not be empty, got one of shape ", t.sizes());
  MBConvInputs a;
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
  require(op, "the depthwise weight", a.wd, {a.expand() ? ch : ci, 1, k, k}, x.scalar_type());
  TORCH_CHECK_VALUE(a.wp.dim() == 4, op, ": the project weight must have 4 dimensions, got ", a.wp.sizes());
  require(op, "the project weight", a.wp, {a.wp.size(0), ch, 1, 1}, x.scalar_type());
  if (a.expand()) {
    require(op, "the expand weight", a.w1, {ch, ci, 1, 1}, x.scalar_type());
    check_vector(op, "the first gamma", a.g1, ch, x);
    check_vector(op, "the first beta", a.b1, ch, x);
  }
  check_vector(op, "the second gamma", a.g2, ch, x);
  check_vector(op, "the second beta", a.b2, ch, x);
  check_vector(op, "the third gamma", a.g3, a.wp.size(0), x);
  check_vector(op, "the third beta", a.b3, a.wp.size(0), x);
  check_activation(op, activation);
  require_eps(op, eps);
  if (training) {
    const int64_t out = x.size(0) * ((x.size(2) - 1) / stride + 1) * ((x.size(3) - 1) / stride + 1);
    TORCH_CHECK_VALUE(out > 1 || !group.empty(), op,
                      ": training needs more than one value per channel, got x of shape ", x.sizes());
    if (a.expand()) {
      TORCH_CHECK_VALUE(given.mean.defined() && given.cov.defined(), op,
                        ": training with an expand convolution needs mean and cov, as proxyless_fast::gram gives them");
      require(op, "mean", given.mean, {ci}, at::kDouble);
      require(op, "cov", given.cov, {ci, ci}, at::kDouble);
      a.mean = given.mean, a.cov = given.cov, a.panel = given.panel;
    }
  }
  a.x = channels_last(x);
  a.stride = stride;
  a.activation = activation;
  a.training = training;
  a.eps = eps;
  if (training) a.group = group;
  return a;
}

void check_running(const char* op, const MBConvInputs& a, at::TensorList running) {
  const size_t wanted = a.expand() ? 6 : 4;
  TORCH_CHECK_VALUE(running.size() == wanted, op, ": running must hold a mean and a variance for each batch norm, ",
                    wanted, " tensors, got ", running.size());
  for (size_t i = 0; i < wanted; ++i) {
    const int64_t c = i + 2 < wanted ? a.wd.size(0) : a.wp.size(0);
    require_running(op, i, running[i], c);
  }
}

template <typename T>
FoldedMBConv<T>::FoldedMBConv(const MBConvInputs& arguments) : a(arguments) {
  const Tensor& x = a.x;
  f.images = x.size(0), f.ci = x.size(1), f.h = x.size(2), f.w = x.size(3);
  f.ch = a.wd.size(0), f.co = a.wp.size(0), f.kernel = a.wd.size(2), f.stride = a.stride;
  f.ho = (f.h - 1) / f.stride + 1, f.wo = (f.w - 1) / f.stride + 1;
  f.expand = a.expand();
  const auto act = bounded_activation<T>(a.activation);
  f.activation = act.form, f.low = act.low, f.high = act.high;
  f.x = x.const_data_ptr<T>();
  f.center = a.mean.defined() ? per_channel(to_doubles(a.mean)) : take(blocks(f.ci) * lanes);
  T* taps = take(blocks(f.ch) * lanes * f.kernel * f.kernel);
  const int64_t k2 = f.kernel * f.kernel;
  const T* wd = a.wd.const_data_ptr<T>();
  pack_panel(taps, f.ch, k2, [&](int64_t c, int64_t k) { return wd[c * k2 + k]; });
  f.taps = taps;
}

template <typename T>
T* FoldedMBConv<T>::take(int64_t n) {
  n = ceil_div(n, lanes) * lanes;
  if (left_ < n) {
    left_ = std::max<int64_t>(n, 1 << 14);
    owned_.push_back(at::empty({left_}, a.x.options().memory_format(at::MemoryFormat::Contiguous)));
    next_ = owned_.back().template mutable_data_ptr<T>();
  }
  T* p = next_;
  next_ += n;
  left_ -= n;
  std::fill_n(p, n, T(0));
  return p;
}

template <typename T>
const T* FoldedMBConv<T>::per_channel(const std::vector<double>& v) {
  const auto n = static_cast<int64_t>(v.size());
  T* p = take(blocks(n) * lanes);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<T>(v[static_cast<size_t>(i)]);
  return p;
}

template <typename T>
void FoldedMBConv<T>::first_from_batch() {
  const int64_t n = f.ci, rows = 28;  // rows of W at a time
  std::vector<double> mean(static_cast<size_t>(blocks(n) * lanes));
  std::copy_n(a.mean.const_data_ptr<double>(), n, mean.begin());
  Norm norm;
  norm.mean.resize(static_cast<size_t>(f.ch));
  norm.var.resize(static_cast<size_t>(f.ch));
  const T* w = a.w1.const_data_ptr<T>();
  at::parallel_for(0, ceil_div(f.ch, rows), 1 + 200000 / (rows * n * n), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(static_cast<size_t>(rows * lanes * (blocks(n) + 2)));
    for (int64_t i = begin * rows; i < std::min(end * rows, f.ch); i += rows)
      cpu::kernels_for<T>().quadratic(w + i * n, std::min(rows, f.ch - i), n, mean.data(),
                                      a.panel.const_data_ptr<double>(), norm.mean.data() + i, norm.var.data() + i,
                                      scratch.data());
  });
  for (double& v : norm.var) v = std::max(v, 0.0);
  set_first(std::move(norm));
}

template <typename T>
void FoldedMBConv<T>::set_first(Norm norm) {
  first = std::move(norm);
  first.fold(a.g1, a.eps);
  const T* w = a.w1.const_data_ptr<T>();
  T* panel = take(blocks(f.ch) * lanes * f.ci);
  pack_panel(panel, f.ch, f.ci, [&](int64_t c, int64_t k) {
    return static_cast<T>(static_cast<double>(w[c * f.ci + k]) * first.scale[c]);
  });
  f.expand_in = panel;
  // Where x is centred on the batch's mean, so is W x.
  std::vector<double> bias = to_doubles(a.b1);
  if (!a.training)
    for (int64_t c = 0; c < f.ch; ++c) bias[c] -= first.scale[c] * first.mean[c];
  f.expand_bias = per_channel(bias);
}

template <typename T>
void FoldedMBConv<T>::set_second(Norm norm) {
  second = std::move(norm);
  second.fold(a.g2, a.eps);
  f.mean2 = per_channel(second.mean);
  f.scale2 = per_channel(second.scale);
  f.bias2 = per_channel(to_doubles(a.b2));
}

template <typename T>
void FoldedMBConv<T>::pack_project(const std::vector<double>* scale) {
  const T* w = a.wp.const_data_ptr<T>();
  T* panel = take(blocks(f.co) * lanes * f.ch);
  if (scale == nullptr)
    pack_panel(panel, f.co, f.ch, [&](int64_t c, int64_t k) { return w[c * f.ch + k]; });
  else
    pack_panel(panel, f.co, f.ch, [&](int64_t c, int64_t k) {
      return static_cast<T>(static_cast<double>(w[c * f.ch + k]) * (*scale)[c]);
    });
  f.project_in = panel;
}

// The block as one image sees it: what runs on an image whose wide tensors are in a buffer of their own.
template <typename T>
cpu::MBConvArgs<T> FoldedMBConv<T>::image(int64_t i) const {
  cpu::MBConvArgs<T> one = f;
  one.images = 1;
  one.x += i * f.h * f.w * f.ci;
  if (one.y != nullptr) one.y += i * f.ho * f.wo * f.co;
  if (one.grad != nullptr) one.grad += i * f.ho * f.wo * f.co;
  return one;
}

#define PF_INSTANTIATE(T)                                                     \
  template FoldedMBConv<T>::FoldedMBConv(const MBConvInputs&);                \
  template T* FoldedMBConv<T>::take(int64_t);                                 \
  template const T* FoldedMBConv<T>::per_channel(const std::vector<double>&); \
  template cpu::MBConvArgs<T> FoldedMBConv<T>::image(int64_t) const;          \
  template void FoldedMBConv<T>::first_from_batch();                          \
  template void FoldedMBConv<T>::set_first(Norm);                             \
  template void FoldedMBConv<T>::set_second(Norm);                            \
  template void FoldedMBConv<T>::pack_project(const std::vector<double>*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)
#undef PF_INSTANTIATE

}  // namespace pf
