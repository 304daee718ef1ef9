// Host entries of the fused MBConv: schemas in schema.cpp, arguments in folded_mbconv.cpp, passes in mbconv_forward.cpp
// and mbconv_backward.cpp.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/ops/checks.h"
#include "cpu/ops/folded_mbconv.h"
#include "cpu/ops/memory.h"

namespace pf {
namespace {

using at::Tensor;

// statistics: mean and variance of each norm, one after the other, float64.
Tensor statistics_of(const std::vector<const Norm*>& norms) {
  int64_t n = 0;
  for (const Norm* norm : norms) n += 2 * static_cast<int64_t>(norm->mean.size());
  Tensor statistics = at::empty({n}, at::TensorOptions().dtype(at::kDouble));
  double* p = statistics.mutable_data_ptr<double>();
  for (const Norm* norm : norms) {
    p = std::copy(norm->mean.begin(), norm->mean.end(), p);
    p = std::copy(norm->var.begin(), norm->var.end(), p);
  }
  return statistics;
}

template <typename T>
std::vector<const Norm*> norms_of(const FoldedMBConv<T>& block) {
  if (block.f.expand) return {&block.first, &block.second, &block.third};
  return {&block.second, &block.third};
}

// Norms of a block from running statistics (six tensors, or four).
std::vector<Norm> norms_from(at::TensorList running) {
  std::vector<Norm> norms;
  for (size_t i = 0; i < running.size(); i += 2) {
    Norm norm;
    norm.mean = to_doubles(running[i]);
    norm.var = to_doubles(running[i + 1]);
    norms.push_back(std::move(norm));
  }
  return norms;
}

std::vector<Norm> norms_from(const Tensor& statistics, const MBConvInputs& a) {
  const double* p = statistics.const_data_ptr<double>();
  std::vector<Norm> norms;
  const int64_t ch = a.wd.size(0), co = a.wp.size(0);
  for (int64_t c : a.expand() ? std::vector<int64_t>{ch, ch, co} : std::vector<int64_t>{ch, co}) {
    Norm norm;
    norm.mean.assign(p, p + c);
    norm.var.assign(p + c, p + 2 * c);
    norms.push_back(std::move(norm));
    p += 2 * c;
  }
  return norms;
}

template <typename T>
void set_norms(FoldedMBConv<T>& block, std::vector<Norm> norms) {
  size_t i = 0;
  if (block.f.expand) block.set_first(std::move(norms[i++]));
  block.set_second(std::move(norms[i]));
  block.set_third(std::move(norms[i + 1]));
}

void check_shortcut(const char* op, const MBConvInputs& a, bool shortcut) {
  TORCH_CHECK_VALUE(!shortcut || (a.stride == 1 && a.x.size(1) == a.wp.size(0)), op,
                    ": a shortcut needs stride 1 and as many channels out as in, got stride ", a.stride, ", ",
                    a.x.size(1), " in and ", a.wp.size(0), " out");
}

Tensor empty_like_x(const MBConvInputs& a) {
  return at::empty({0}, a.x.options().memory_format(at::MemoryFormat::Contiguous));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mbconv(const Tensor& x, at::TensorList params, at::TensorList running,
                                                  const std::optional<Tensor>& mean, const std::optional<Tensor>& cov,
                                                  int64_t stride, std::string_view activation, bool training,
                                                  double eps, int64_t keep, bool shortcut, std::string_view group) {
  const MBConvInputs a =
      check_mbconv("mbconv", x, params, {mean, cov, true}, stride, std::string(activation), training, eps, group);
  if (!training || !running.empty()) check_running("mbconv", a, running);
  check_shortcut("mbconv", a, shortcut);
  TORCH_CHECK_VALUE(keep >= 0 && keep <= 2, "mbconv: keep must be 0 (nothing), 1 (y) or 2 (y and d), got ", keep);
  Tensor out, y = empty_like_x(a), d = empty_like_x(a), statistics;
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "mbconv", [&] {
    FoldedMBConv<scalar_t> block(a);
    const auto& f = block.f;
    const auto options = a.x.options();
    const std::vector<int64_t> shape = {f.images, f.co, f.ho, f.wo};
    out = large_empty(shape, options, at::MemoryFormat::ChannelsLast);
    auto* p_out = out.mutable_data_ptr<scalar_t>();
    if (!training && keep == 0) {
      set_norms(block, norms_from(running));
      block.infer(p_out);
      if (shortcut) out.add_(a.x);
      statistics = statistics_of(norms_of(block));
      return;
    }
    if (keep >= 1) y = large_empty(shape, options, at::MemoryFormat::ChannelsLast);
    if (keep == 2) d = large_empty({cpu::blocks(f.ch), block.pixels_out(), cpu::lanes}, options);
    const bool stream = keep != 2 && block.streams();
    const Workspace memory(keep == 2 || stream ? 0 : static_cast<size_t>(block.wide_size()) * sizeof(scalar_t));
    auto* p_d = keep == 2 ? d.mutable_data_ptr<scalar_t>() : stream ? nullptr : memory.as<scalar_t>();
    auto* p_y = keep >= 1 ? y.mutable_data_ptr<scalar_t>() : p_out;
    if (training) {
      if (f.expand) block.first_from_batch();
      block.set_second(block.depthwise(p_d, true));
      block.set_third(block.project(p_d, p_y));
    } else {
      set_norms(block, norms_from(running));
      if (!stream) block.depthwise(p_d, false);
      block.project(p_d, p_y);
    }
    block.normalise(p_y, p_out, shortcut);
    statistics = statistics_of(norms_of(block));
  });
  return {out, y, d, statistics};
}

std::tuple<Tensor, std::vector<Tensor>> mbconv_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                        const Tensor& d, const Tensor& statistics,
                                                        at::TensorList params, const std::optional<Tensor>& mean,
                                                        const std::optional<Tensor>& cov, int64_t stride,
                                                        std::string_view activation, bool training, double eps,
                                                        bool input, bool weights, bool shortcut,
                                                        std::string_view group) {
  const NoAutocast no_autocast;  // backward may be called within the context
  const MBConvInputs a = check_mbconv("mbconv_backward", x, params, {mean, cov, false}, stride, std::string(activation),
                                      training, eps, group);
  TORCH_CHECK_VALUE(grad.sizes() == y.sizes() && grad.scalar_type() == x.scalar_type(),
                    "mbconv_backward: grad must have the shape of y, ", y.sizes(), ", and the dtype of x, got ",
                    grad.sizes(), " and ", grad.scalar_type());
  const int64_t norms = 2 * (a.wp.size(0) + (a.expand() ? 2 : 1) * a.wd.size(0));
  const Tensor in_use = required_statistics("mbconv_backward", "statistics", statistics, norms);
  check_shortcut("mbconv_backward", a, shortcut);
  require_real_image("mbconv_backward", "y, what mbconv returned,", y);
  const Tensor g = channels_last(grad), narrow = channels_last(y);
  Tensor dx = empty_like_x(a);
  std::vector<Tensor> dparams;
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "mbconv_backward", [&] {
    FoldedMBConv<scalar_t> block(a);
    const auto& f = block.f;
    const auto type = a.x.scalar_type();
    require("mbconv_backward", "y, what mbconv returned,", y, {f.images, f.co, f.ho, f.wo}, type);
    require("mbconv_backward", "grad", grad, {f.images, f.co, f.ho, f.wo}, type);
    const bool kept = d.numel() != 0;
    if (kept)
      require("mbconv_backward", "d, what mbconv returned,", d, {blocks(f.ch), block.pixels_out(), cpu::lanes}, type);
    const Tensor wide = d.contiguous();
    set_norms(block, norms_from(in_use, a));
    const bool stream = !kept && block.streams();
    const Workspace memory(kept || stream ? 0 : static_cast<size_t>(block.wide_size()) * sizeof(scalar_t));
    const auto* p_d = kept ? wide.const_data_ptr<scalar_t>() : stream ? nullptr : memory.as<scalar_t>();
    if (!kept && !stream) block.depthwise(memory.as<scalar_t>(), false);
    Tensor to;
    if (input) to = dx = large_empty(a.x.sizes(), a.x.options(), at::MemoryFormat::ChannelsLast);
    dparams = block.backward(g, narrow.const_data_ptr<scalar_t>(), p_d, to, weights, shortcut);
  });
  return {dx, dparams};
}

void update(Tensor running, const double* batch, double factor, double momentum) {
  std::vector<double> values = to_doubles(running);
  for (size_t c = 0; c < values.size(); ++c) values[c] += momentum * (factor * batch[c] - values[c]);
  AT_DISPATCH_FLOATING_TYPES(running.scalar_type(), "update_running", [&] {
    auto* p = running.mutable_data_ptr<scalar_t>();
    const int64_t step = running.stride(0);
    for (size_t c = 0; c < values.size(); ++c) p[static_cast<int64_t>(c) * step] = static_cast<scalar_t>(values[c]);
  });
}

void update_running(const Tensor& statistics, at::TensorList running, int64_t pixels_in, int64_t pixels_out,
                    double momentum, std::string_view group) {
  TORCH_CHECK_VALUE(running.size() == 2 || running.size() == 4 || running.size() == 6,
                    "update_running: running must hold a mean and a variance for each of one to three norms, got ",
                    running.size(), " tensors");
  std::vector<double> pixels = {static_cast<double>(pixels_in), static_cast<double>(pixels_out)};
  add_up(pixels, std::string(group));
  TORCH_CHECK_VALUE(pixels[0] > 1 && pixels[1] > 1, "update_running: pixels_in and pixels_out must be above 1, got ",
                    pixels[0], " and ", pixels[1]);
  int64_t n = 0;
  for (size_t i = 0; i < running.size(); ++i) {
    require_running("update_running", i, running[i], running[i / 2 * 2].numel());
    require_own_values("update_running", i, running[i]);
    n += running[i].numel();
  }
  const Tensor in_use = required_statistics("update_running", "statistics", statistics, n);
  const double* batch = in_use.const_data_ptr<double>();
  for (size_t i = 0; i < running.size(); ++i) {
    const bool before_depthwise = running.size() == 6 && i < 2;
    const double n = pixels[before_depthwise ? 0 : 1];
    update(running[i], batch, i % 2 == 0 ? 1 : n / (n - 1), momentum);  // torch keeps the unbiased variance
    batch += running[i].numel();
  }
}

Tensor mbconv_probe(const Tensor& x, const Tensor& grad, at::TensorList params, at::TensorList running,
                    at::IntArrayRef sizes, const std::optional<Tensor>& mean, const std::optional<Tensor>& cov,
                    int64_t stride, std::string_view activation, bool training, double momentum, double eps,
                    std::string_view group) {
  int64_t total = 0;
  for (int64_t size : sizes) {
    TORCH_CHECK_VALUE(size == 6 || size == 9, "mbconv_probe: sizes must be 9, or 6 without an expand convolution, got ",
                      sizes);
    total += size;
  }
  TORCH_CHECK_VALUE(total == static_cast<int64_t>(params.size()),
                    "mbconv_probe: sizes must add up to the number of params, ", params.size(), ", got ", sizes);
  require_real_image("mbconv_probe", "x", x);
  require_real_image("mbconv_probe", "grad", grad);
  const Tensor narrow = channels_last(x), g = channels_last(grad);
  const Covariance covariance(mean, cov, true);
  Tensor gates =
      at::empty({static_cast<int64_t>(sizes.size())}, x.options().memory_format(at::MemoryFormat::Contiguous));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mbconv_probe", [&] {
    auto* p_gates = gates.mutable_data_ptr<scalar_t>();
    size_t at_params = 0, at_running = 0;
    for (size_t j = 0; j < sizes.size(); ++j) {
      const auto size = static_cast<size_t>(sizes[j]);
      const MBConvInputs a = check_mbconv("mbconv_probe", narrow, params.slice(at_params, size), covariance, stride,
                                          std::string(activation), training, eps, group);
      at_params += size;
      const size_t norms = a.expand() ? 6 : 4;
      const bool has_running = !running.empty();
      at::TensorList own;
      if (has_running || !training) {
        TORCH_CHECK_VALUE(running.size() >= at_running + norms,
                          "mbconv_probe: running must hold the statistics of every candidate, got ", running.size());
        own = running.slice(at_running, norms);
        at_running += norms;
        check_running("mbconv_probe", a, own);
        for (size_t i = 0; training && i < norms; ++i) require_own_values("mbconv_probe", i, own[i]);
      }
      FoldedMBConv<scalar_t> block(a);
      const auto& f = block.f;
      TORCH_CHECK_VALUE(
          grad.sizes() == at::IntArrayRef({f.images, f.co, f.ho, f.wo}) && grad.scalar_type() == x.scalar_type(),
          "mbconv_probe: grad must have the shape and dtype of the output, (", f.images, ", ", f.co, ", ", f.ho, ", ",
          f.wo, ") and ", x.scalar_type(), ", got ", grad.sizes(), " and ", grad.scalar_type());
      const bool stream = block.streams();
      const Workspace memory(stream ? 0 : static_cast<size_t>(block.wide_size()) * sizeof(scalar_t));
      auto* d = stream ? nullptr : memory.as<scalar_t>();
      if (training) {
        if (f.expand) block.first_from_batch();
        block.set_second(block.depthwise(d, true));
      } else {
        set_norms(block, norms_from(own));
        if (!stream) block.depthwise(d, false);
      }
      p_gates[j] = static_cast<scalar_t>(block.gate(d, g));
      if (training && has_running)
        update_running(statistics_of(norms_of(block)), own, block.pixels_in(), block.pixels_out(), momentum, group);
    }
  });
  return gates;
}

}  // namespace

TORCH_LIBRARY_IMPL(proxyless_fast, CPU, m) {
  m.impl("mbconv", &mbconv);
  m.impl("mbconv_backward", &mbconv_backward);
  m.impl("mbconv_probe", &mbconv_probe);
  m.impl("update_running", &update_running);
}

}  // namespace pf
