// Host entries of a dense convolution with its batch norm and activation, for few inputs: the statistics follow from
// the covariance of the windows, so the convolution's own output is never written, and backward computes it again.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops/activation.h"
#include "cpu/ops/checks.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/parallel.h"

namespace pf {
namespace {

using at::Tensor;
using cpu::blocks;
using cpu::lanes;

constexpr int64_t chunks_wanted = 64;  // pieces of work, whatever the number of threads: the same bits for any

size_t index(int64_t i) { return static_cast<size_t>(i); }

void check_conv(const char* op, const Tensor& x, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
                int64_t stride, std::string_view activation, double eps) {
  require_real_image(op, "x", x);
  require_given(op, "weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == x.size(1) &&
                        weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 &&
                        weight.scalar_type() == x.scalar_type(),
                    op, ": weight must have shape (out, ", x.size(1), ", k, k) with k odd and the dtype of x, ",
                    x.scalar_type(), ", got ", weight.sizes(), " and ", weight.scalar_type());
  require(op, "weight", weight, weight.sizes(), x.scalar_type());
  require(op, "gamma", gamma, {weight.size(0)}, x.scalar_type());
  require(op, "beta", beta, {weight.size(0)}, x.scalar_type());
  require_eps(op, eps);
  TORCH_CHECK_VALUE(stride >= 1, op, ": stride must be positive, got ", stride);
  check_activation(op, activation);
}

// The convolution as the kernels want it, with the memory that it points at.
template <typename T>
class FoldedConv {
 public:
  FoldedConv(const Tensor& x_, const Tensor& weight_, const Tensor& gamma_, const Tensor& beta_, int64_t stride,
             std::string_view activation)
      : x(x_.contiguous(at::MemoryFormat::ChannelsLast)),
        weight(weight_.contiguous()),
        gamma(gamma_.contiguous()),
        beta(beta_.contiguous()) {
    f.images = x.size(0), f.ci = x.size(1), f.h = x.size(2), f.w = x.size(3);
    f.co = weight.size(0), f.kernel = weight.size(2), f.stride = stride;
    f.ho = (f.h - 1) / stride + 1, f.wo = (f.w - 1) / stride + 1;
    const auto act = bounded_activation<T>(activation);
    f.activation = act.form, f.low = act.low, f.high = act.high;
    f.x = x.template const_data_ptr<T>();
    depth = cpu::depth(f);
    center_.assign(index(blocks(depth) * lanes), T(0));
    f.center = center_.data();
  }
  // Element k of a row of weights in the order of a window: (ky, kx, c) of (c, ky, kx).
  double w(int64_t o, int64_t k) const {
    const int64_t taps = f.kernel * f.kernel;
    return static_cast<double>(weight.template const_data_ptr<T>()[o * depth + k % f.ci * taps + k / f.ci]);
  }
  void set_center(const std::vector<double>& values) {
    for (int64_t k = 0; k < depth; ++k) center_[index(k)] = static_cast<T>(values[index(k)]);
  }
  // The norm by these statistics; the center is what windows are read about.
  void fold(const double* statistics, double eps) {
    panel_.assign(index(blocks(f.co) * depth * lanes), T(0));
    bias_.assign(index(blocks(f.co) * lanes), T(0));
    inverse.resize(index(f.co)), scale.resize(index(f.co));
    for (int64_t o = 0; o < f.co; ++o) {
      inverse[index(o)] = 1 / std::sqrt(statistics[f.co + o] + eps);
      scale[index(o)] = static_cast<double>(gamma.template const_data_ptr<T>()[o]) * inverse[index(o)];
      double shift = -statistics[o];
      for (int64_t k = 0; k < depth; ++k) {
        shift += w(o, k) * static_cast<double>(center_[index(k)]);
        panel_[index((o / lanes * depth + k) * lanes + o % lanes)] = static_cast<T>(scale[index(o)] * w(o, k));
      }
      bias_[index(o)] =
          static_cast<T>(static_cast<double>(beta.template const_data_ptr<T>()[o]) + scale[index(o)] * shift);
    }
    f.weight = panel_.data(), f.bias = bias_.data();
  }
  int64_t rows() const { return f.images * f.ho; }
  int64_t pixels() const { return rows() * f.wo; }

  template <typename Body>
  void for_chunks(int64_t chunks, Body body) const {
    share_pieces(chunks, [&](const auto& take) {
      const Workspace scratch(index(cpu::conv_scratch(f)) * sizeof(T));
      for (int64_t i = take(); i >= 0; i = take())
        body(i, rows() * i / chunks, rows() * (i + 1) / chunks, scratch.as<T>());
    });
  }

  Tensor x, weight, gamma, beta;
  cpu::ConvArgs<T> f{};
  int64_t depth = 0;
  std::vector<double> inverse, scale;  // 1 / sqrt(variance + eps), and gamma times that

 private:
  std::vector<T> center_, panel_, bias_;
};

// A value near the mean of each input channel: of every 16th row of pixels.
template <typename T>
std::vector<double> near_mean(const FoldedConv<T>& conv) {
  const auto& f = conv.f;
  std::vector<double> sum(index(f.ci), 0.0), values;
  int64_t pixels = 0;
  for (int64_t row = 0; row < f.images * f.h; row += 16, pixels += f.w)
    for (int64_t i = 0; i < f.w * f.ci; ++i) sum[index(i % f.ci)] += static_cast<double>(f.x[row * f.w * f.ci + i]);
  for (int64_t k = 0; k < conv.depth; ++k) values.push_back(sum[index(k % f.ci)] / static_cast<double>(pixels));
  return values;
}

// Mean and covariance of the windows.
template <typename T>
void window_moments(FoldedConv<T>& conv, double* mean, double* cov) {
  const int64_t n = conv.depth, chunks = std::min(chunks_wanted, conv.rows()), size = n + n * n;
  const std::vector<double> pivot = near_mean(conv);
  conv.set_center(pivot);
  std::vector<double> sums(index(chunks * size), 0.0);
  conv.for_chunks(chunks, [&](int64_t i, int64_t first, int64_t last, T* scratch) {
    double* sum = sums.data() + i * size;
    cpu::kernels_for<T>().conv_gram(conv.f, first, last, sum, sum + n, scratch);
  });
  for (int64_t i = 1; i < chunks; ++i)
    for (int64_t j = 0; j < size; ++j) sums[index(j)] += sums[index(i * size + j)];
  const auto pixels = static_cast<double>(conv.pixels());
  for (int64_t a = 0; a < n; ++a) {
    mean[a] = static_cast<double>(conv.f.center[a]) + sums[index(a)] / pixels;
    for (int64_t b = a; b < n; ++b)
      cov[a * n + b] = cov[b * n + a] =
          sums[index(n + a * n + b)] / pixels - sums[index(a)] / pixels * (sums[index(b)] / pixels);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_norm_act(const Tensor& x, const Tensor& weight, const Tensor& gamma,
                                                         const Tensor& beta, at::TensorList running, int64_t stride,
                                                         std::string_view activation, bool training, double eps) {
  check_conv("conv_norm_act", x, weight, gamma, beta, stride, activation, eps);
  const int64_t co = weight.size(0), n = weight.numel() / co;
  require_moments("conv_norm_act", running, co, !training);
  const auto doubles = at::TensorOptions().dtype(at::kDouble);
  Tensor out, statistics = at::empty({2 * co}, doubles), mean = at::empty({training ? n : 0}, doubles),
              cov = at::empty({training ? n : 0, n}, doubles);
  auto* p = statistics.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_norm_act", [&] {
    FoldedConv<scalar_t> conv(x, weight, gamma, beta, stride, activation);
    const auto& f = conv.f;
    TORCH_CHECK_VALUE(!training || conv.pixels() > 1,
                      "conv_norm_act: training needs more than one value per channel, got x of shape ", x.sizes());
    out = large_empty({f.images, f.co, f.ho, f.wo}, x.options(), at::MemoryFormat::ChannelsLast);
    if (training) {
      auto *m = mean.mutable_data_ptr<double>(), *c = cov.mutable_data_ptr<double>();
      window_moments(conv, m, c);
      for (int64_t o = 0; o < co; ++o) {
        double first = 0, second = 0;
        for (int64_t a = 0; a < n; ++a) {
          double row = 0;
          for (int64_t b = 0; b < n; ++b) row += c[a * n + b] * conv.w(o, b);
          first += conv.w(o, a) * m[a];
          second += conv.w(o, a) * row;
        }
        p[o] = first;
        p[co + o] = std::max(second, 0.0);
      }
      conv.set_center({m, m + n});
    } else {
      statistics.slice(0, 0, co).copy_(running[0]);
      statistics.slice(0, co).copy_(running[1]);
      conv.set_center(near_mean(conv));
    }
    conv.fold(p, eps);
    auto* to = out.mutable_data_ptr<scalar_t>();
    conv.for_chunks(std::min(chunks_wanted, conv.rows()), [&](int64_t, int64_t first, int64_t last, scalar_t* scratch) {
      cpu::kernels_for<scalar_t>().conv_forward(f, first, last, to, scratch);
    });
  });
  return {out, statistics, mean, cov};
}

std::tuple<Tensor, Tensor, Tensor> conv_norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                          const Tensor& gamma, const Tensor& beta,
                                                          const Tensor& statistics, const Tensor& mean,
                                                          const Tensor& cov, int64_t stride,
                                                          std::string_view activation, bool training, double eps) {
  check_conv("conv_norm_act_backward", x, weight, gamma, beta, stride, activation, eps);
  const int64_t co = weight.size(0), n = weight.numel() / co;
  constexpr auto op = "conv_norm_act_backward";
  const Tensor in_use = required_statistics(op, "statistics", statistics, 2 * co);
  if (training) {
    require(op, "mean", mean, {n}, at::kDouble);
    require(op, "cov", cov, {n, n}, at::kDouble);
  }
  const Tensor dense_mean = mean.contiguous(), dense_cov = cov.contiguous();
  TORCH_CHECK_VALUE(grad.dim() == 4, op, ": grad must have the shape of the output, got ", grad.sizes());
  const auto flat = at::MemoryFormat::Contiguous;  // as it is filled, whatever the strides of the weights
  Tensor dweight = at::empty_like(weight, flat), dgamma = at::empty_like(gamma, flat),
         dbeta = at::empty_like(beta, flat);
  const Tensor g = grad.contiguous(at::MemoryFormat::ChannelsLast);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_norm_act_backward", [&] {
    FoldedConv<scalar_t> conv(x, weight, gamma, beta, stride, activation);
    const auto& f = conv.f;
    require(op, "grad", grad, {f.images, co, f.ho, f.wo}, x.scalar_type());
    const double *p = in_use.const_data_ptr<double>(), *m = nullptr, *c = nullptr;
    if (training) {
      m = dense_mean.const_data_ptr<double>(), c = dense_cov.const_data_ptr<double>();
      conv.set_center({m, m + n});
    } else {
      conv.set_center(near_mean(conv));
    }
    conv.fold(p, eps);
    const int64_t chunks = std::min(chunks_wanted / 4, conv.rows()), wide = blocks(co) * lanes, size = wide * n;
    std::vector<double> sum_q(index(chunks * wide), 0.0);
    std::vector<scalar_t> products(index(chunks * size), scalar_t(0));
    conv.for_chunks(chunks, [&](int64_t i, int64_t first, int64_t last, scalar_t* scratch) {
      cpu::kernels_for<scalar_t>().conv_backward(f, first, last, g.const_data_ptr<scalar_t>(), sum_q.data() + i * wide,
                                                 products.data() + i * size, scratch);
    });
    std::vector<double> a(index(n));  // sum q (window - center) of one output channel
    for (int64_t o = 0; o < co; ++o) {
      double sum = 0, dot = 0;
      for (int64_t i = 0; i < chunks; ++i) sum += sum_q[index(i * wide + o)];
      for (int64_t k = 0; k < n; ++k) {
        a[index(k)] = 0;
        for (int64_t i = 0; i < chunks; ++i)
          a[index(k)] += static_cast<double>(products[index(i * size + (o / lanes * n + k) * lanes + o % lanes)]);
        if (!training) a[index(k)] += sum * static_cast<double>(f.center[k]);  // given statistics take no part
        dot += a[index(k)] * conv.w(o, k);
      }
      const double gradient = conv.inverse[index(o)] * (training ? dot : dot - p[o] * sum);
      dbeta.mutable_data_ptr<scalar_t>()[o] = static_cast<scalar_t>(sum);
      dgamma.mutable_data_ptr<scalar_t>()[o] = static_cast<scalar_t>(gradient);
      for (int64_t k = 0; k < n; ++k) {
        double wc = 0;
        for (int64_t j = 0; training && j < n; ++j) wc += conv.w(o, j) * c[j * n + k];
        const double value = conv.scale[index(o)] * (a[index(k)] - gradient * conv.inverse[index(o)] * wc);
        dweight.mutable_data_ptr<scalar_t>()[o * n + k % f.ci * f.kernel * f.kernel + k / f.ci] =
            static_cast<scalar_t>(value);
      }
    }
  });
  return {dweight, dgamma, dbeta};
}

}  // namespace

TORCH_LIBRARY_IMPL(proxyless_fast, CPU, m) {
  m.impl("conv_norm_act", &conv_norm_act);
  m.impl("conv_norm_act_backward", &conv_norm_act_backward);
}

}  // namespace pf
