// Host entries of batch norm with its activation. The kernels keep x alone for backward, where eager PyTorch keeps the
// input of each of the two ops.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops/activation.h"
#include "cpu/ops/checks.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/parallel.h"
#include "shared.h"

namespace pf {
namespace {

using at::Tensor;

void check_norm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, std::string_view activation,
                double eps) {
  require_real_image(op, "x", x);
  require(op, "weight", weight, {x.size(1)}, x.scalar_type());
  require(op, "bias", bias, {x.size(1)}, x.scalar_type());
  check_activation(op, activation);
  require_eps(op, eps);
}

int64_t padded(int64_t channels) { return cpu::blocks(channels) * cpu::lanes; }

// Rows of one piece of work: fixed, so that sums have the same bits for any number of threads.
int64_t chunk_rows(int64_t channels) { return std::max<int64_t>(64, (1 << 18) / channels); }

template <typename Body>
void for_chunks(int64_t rows, int64_t channels, Body body) {
  const int64_t chunk = chunk_rows(channels), chunks = (rows + chunk - 1) / chunk;
  share_pieces(chunks, [&](const auto& take) {
    for (int64_t i = take(); i >= 0; i = take()) body(i, i * chunk, std::min(chunk, rows - i * chunk));
  });
}

// The norm as the kernels want it, with the memory that it points at.
template <typename T>
struct FoldedNorm {
  FoldedNorm(const Tensor& weight, const Tensor& bias, const double* statistics, std::string_view activation,
             double eps)
      : channels(weight.size(0)), values(static_cast<size_t>(3 * padded(channels)), T(0)) {
    const Tensor w = weight.contiguous(), b = bias.contiguous();
    T* p = values.data();
    for (int64_t c = 0; c < channels; ++c) {
      inverse.push_back(1 / std::sqrt(statistics[channels + c] + eps));
      p[c] = static_cast<T>(statistics[c]);
      p[padded(channels) + c] = static_cast<T>(w.const_data_ptr<T>()[c] * inverse.back());
      p[2 * padded(channels) + c] = b.const_data_ptr<T>()[c];
    }
    const auto act = bounded_activation<T>(activation);
    f = {channels, act.form, act.low, act.high, p, p + padded(channels), p + 2 * padded(channels)};
  }
  int64_t channels;
  std::vector<T> values;
  std::vector<double> inverse;  // 1 / sqrt(variance + eps)
  cpu::NormArgs<T> f{};
};

template <typename T>
void batch_moments(const T* x, int64_t rows, int64_t channels, double* statistics, const std::string& group) {
  const int64_t chunks = (rows + chunk_rows(channels) - 1) / chunk_rows(channels), size = 2 * channels;
  std::vector<double> partial(static_cast<size_t>(chunks * size), 0.0), counts(static_cast<size_t>(chunks), 0.0);
  for_chunks(rows, channels, [&](int64_t i, int64_t first, int64_t n) {
    double* mean = partial.data() + i * size;
    cpu::kernels_for<T>().norm_moments(x + first * channels, n, channels, {0, mean, mean + channels});
    counts[static_cast<size_t>(i)] = static_cast<double>(n);
  });
  double count = counts[0];
  for (int64_t i = 1; i < chunks; ++i) {  // Chan, Golub, LeVeque 1979
    const double n = counts[static_cast<size_t>(i)], share = n / (count + n);
    for (int64_t c = 0; c < channels; ++c) {
      const double* other = partial.data() + i * size + c;
      const double delta = other[0] - partial[static_cast<size_t>(c)];
      partial[static_cast<size_t>(c)] += delta * share;
      partial[static_cast<size_t>(channels + c)] += other[channels] + delta * delta * count * share;
    }
    count += n;
  }
  std::vector<double> mean(partial.begin(), partial.begin() + channels), var;
  for (int64_t c = 0; c < channels; ++c) var.push_back(partial[static_cast<size_t>(channels + c)] / count);
  merge_moments(mean, var, count, group);
  std::copy(var.begin(), var.end(), std::copy(mean.begin(), mean.end(), statistics));
}

std::tuple<Tensor, Tensor> batch_norm_act(const Tensor& input, const Tensor& weight, const Tensor& bias,
                                          at::TensorList running, std::string_view activation, bool training,
                                          double eps, std::string_view group) {
  check_norm("batch_norm_act", input, weight, bias, activation, eps);
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  TORCH_CHECK_VALUE(!training || rows > 1 || !group.empty(),
                    "batch_norm_act: training needs more than one value per channel, got x of shape ", x.sizes());
  require_moments("batch_norm_act", running, channels, !training);
  Tensor out = large_empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  Tensor statistics = at::empty({2 * channels}, at::TensorOptions().dtype(at::kDouble));
  auto* p_statistics = statistics.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "batch_norm_act", [&] {
    const auto* p = x.const_data_ptr<scalar_t>();
    auto* p_out = out.mutable_data_ptr<scalar_t>();
    if (training) {
      batch_moments(p, rows, channels, p_statistics, std::string(group));
    } else {
      statistics.slice(0, 0, channels).copy_(running[0]);
      statistics.slice(0, channels).copy_(running[1]);
    }
    const FoldedNorm<scalar_t> norm(weight, bias, p_statistics, activation, eps);
    for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t n) {
      cpu::kernels_for<scalar_t>().norm_forward(norm.f, p + first * channels, n, p_out + first * channels);
    });
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(const Tensor& grad, const Tensor& input,
                                                           const Tensor& weight, const Tensor& bias,
                                                           const Tensor& statistics, std::string_view activation,
                                                           bool training, double eps, std::string_view group) {
  check_norm("batch_norm_act_backward", input, weight, bias, activation, eps);
  require("batch_norm_act_backward", "grad", grad, input.sizes(), input.scalar_type());
  const Tensor in_use = required_statistics("batch_norm_act_backward", "statistics", statistics, 2 * input.size(1));
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor g = grad.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  const int64_t chunks = (rows + chunk_rows(channels) - 1) / chunk_rows(channels), size = 2 * channels;
  Tensor dx = large_empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  const auto flat = at::MemoryFormat::Contiguous;  // as it is filled, whatever the strides of the weights
  Tensor dweight = at::empty_like(weight, flat), dbias = at::empty_like(bias, flat);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "batch_norm_act_backward", [&] {
    const auto* p = x.const_data_ptr<scalar_t>();
    const auto* pg = g.const_data_ptr<scalar_t>();
    auto* p_dx = dx.mutable_data_ptr<scalar_t>();
    const FoldedNorm<scalar_t> norm(weight, bias, in_use.const_data_ptr<double>(), activation, eps);
    std::vector<double> sums(static_cast<size_t>(chunks * size), 0.0);
    for_chunks(rows, channels, [&](int64_t i, int64_t first, int64_t n) {
      double* sum = sums.data() + i * size;
      cpu::kernels_for<scalar_t>().norm_sums(norm.f, pg + first * channels, p + first * channels, n, sum,
                                             sum + channels);
    });
    for (int64_t i = 1; i < chunks; ++i)
      for (int64_t j = 0; j < size; ++j) sums[static_cast<size_t>(j)] += sums[static_cast<size_t>(i * size + j)];
    std::vector<double> all(sums.begin(), sums.begin() + size);  // of all images that the statistics were made of
    all.push_back(static_cast<double>(rows));
    if (training) add_up(all, std::string(group));
    std::vector<scalar_t> affine(static_cast<size_t>(2 * padded(channels)), scalar_t(0));
    for (int64_t c = 0; c < channels; ++c) {
      const double inverse = norm.inverse[static_cast<size_t>(c)], scale = norm.f.scale[c];
      const double sum = sums[static_cast<size_t>(c)], sum_x = sums[static_cast<size_t>(channels + c)];
      dbias.mutable_data_ptr<scalar_t>()[c] = static_cast<scalar_t>(sum);
      dweight.mutable_data_ptr<scalar_t>()[c] = static_cast<scalar_t>(sum_x * inverse);
      if (!training) continue;
      affine[static_cast<size_t>(c)] =
          static_cast<scalar_t>(-scale * inverse * inverse * all[static_cast<size_t>(channels + c)] / all.back());
      affine[static_cast<size_t>(padded(channels) + c)] =
          static_cast<scalar_t>(-scale * all[static_cast<size_t>(c)] / all.back());
    }
    for_chunks(rows, channels, [&](int64_t, int64_t first, int64_t n) {
      cpu::kernels_for<scalar_t>().norm_backward(norm.f, pg + first * channels, p + first * channels, n, affine.data(),
                                                 affine.data() + padded(channels), p_dx + first * channels);
    });
  });
  return {dx, dweight, dbias};
}

Tensor norm_dot(const Tensor& grad, const Tensor& input, const Tensor& statistics, const Tensor& gamma,
                const Tensor& beta, double eps) {
  check_norm("norm_dot", input, gamma, beta, "identity", eps);
  const int64_t channels = input.size(1), rows = input.numel() / channels;
  require("norm_dot", "grad", grad, input.sizes(), input.scalar_type());
  TORCH_CHECK_VALUE(statistics.dim() == 1 && statistics.numel() >= 2 * channels, "norm_dot: statistics must end in ",
                    2 * channels, " values, got shape ", statistics.sizes());
  const Tensor in_use = required_statistics("norm_dot", "statistics", statistics.slice(0, -2 * channels), 2 * channels);
  const Tensor y = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor g = grad.contiguous(at::MemoryFormat::ChannelsLast);
  double total = 0;
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "norm_dot", [&] {
    const FoldedNorm<scalar_t> norm(gamma, beta, in_use.const_data_ptr<double>(), "identity", eps);
    const int64_t chunks = (rows + chunk_rows(channels) - 1) / chunk_rows(channels), size = 2 * channels;
    std::vector<double> sums(static_cast<size_t>(chunks * size), 0.0);
    for_chunks(rows, channels, [&](int64_t i, int64_t first, int64_t n) {
      double* sum = sums.data() + i * size;
      cpu::kernels_for<scalar_t>().pair_sums(g.const_data_ptr<scalar_t>() + first * channels,
                                             y.const_data_ptr<scalar_t>() + first * channels, n, channels, norm.f.mean,
                                             sum, sum + channels);
    });
    const Tensor w = gamma.contiguous();
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < channels; ++c)
        total += sums[static_cast<size_t>(i * size + c)] * static_cast<double>(norm.f.bias[c]) +
                 sums[static_cast<size_t>(i * size + channels + c)] * norm.inverse[static_cast<size_t>(c)] *
                     static_cast<double>(w.const_data_ptr<scalar_t>()[c]);
  });
  return at::scalar_tensor(total, y.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(proxyless_fast, CPU, m) {
  m.impl("batch_norm_act", &batch_norm_act);
  m.impl("batch_norm_act_backward", &batch_norm_act_backward);
  m.impl("norm_dot", &norm_dot);
}

}  // namespace pf
