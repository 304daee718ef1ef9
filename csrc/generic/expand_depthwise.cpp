// Depthwise convolution of an expansion that is never stored, in ATen calls: for any device without kernels of ours
// (csrc/cuda), where it is stored after all.
#include "generic/expand_depthwise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include "generic/activation.h"

namespace pf {

using at::Tensor;
namespace {

// e's shape and dtype without its memory: what the checks of the depthwise ops look at.
Tensor like_e(const ExpandInput& in) {
  const std::array<int64_t, 4> sizes = {in.x.size(0), in.w1.size(0), in.x.size(2), in.x.size(3)};
  return in.x.new_empty({1}).expand(sizes);
}

void check_own(const char* op, const ExpandInput& in) {
  const Tensor &x = in.x, &w1 = in.w1, &norm = in.norm1;
  require_given(op, "x", x);
  require_given(op, "w1", w1);
  require_given(op, "norm1", norm);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0 && x.layout() == at::kStrided, op,
                    ": x must have shape (batch, channels, height, width), be dense and not be empty, got a ",
                    x.layout(), " tensor of shape ", x.sizes());
  TORCH_CHECK_VALUE(w1.dim() == 2 && w1.size(0) > 0 && w1.size(1) == x.size(1) && w1.scalar_type() == x.scalar_type() &&
                        dense_on(w1, x),
                    op, ": w1 must be ", x.scalar_type(), " of shape (channels, ", x.size(1), ") on ", x.device(),
                    ", got ", w1.scalar_type(), " of shape ", w1.sizes(), " on ", w1.device(), ", ", w1.layout());
  const std::array<int64_t, 2> rows = {4, w1.size(0)};
  TORCH_CHECK_VALUE(
      norm.sizes() == at::IntArrayRef(rows) && norm.scalar_type() == accumulate_type(x) && dense_on(norm, x), op,
      ": norm1 must be ", accumulate_type(x), " of shape ", at::IntArrayRef(rows), " on ", x.device(), ", got ",
      norm.scalar_type(), " of shape ", norm.sizes(), " on ", norm.device(), ", ", norm.layout());
  check_activation(op, in.activation);
}

Tensor activate(const Tensor& z, std::string_view activation) {
  if (activation == "relu6") return z.clamp(0, 6);
  if (activation == "relu") return at::relu(z);
  if (activation == "silu") return at::silu(z);
  if (activation == "hardswish") return at::hardswish(z);
  return z;
}

Tensor expanded(const ExpandInput& in) {
  const auto type = accumulate_type(in.x);
  const auto row = [&](int64_t i) { return in.norm1.select(0, i).view({-1, 1, 1}); };
  // A matrix product and no convolution: torch rounds the inputs of float32 convolutions to tf32 unless told not to.
  const Tensor pixels = in.x.permute({0, 2, 3, 1}).to(type);
  const Tensor product = at::linear(pixels, in.w1.to(type)).permute({0, 3, 1, 2});
  return activate((product - row(0)) * row(2) + row(3), in.activation).to(in.x.scalar_type());
}

}  // namespace

DepthwiseShape check_expand(const char* op, const ExpandInput& in, const Tensor& weight, int64_t stride) {
  check_own(op, in);
  return check_depthwise(op, {like_e(in), {}, {}, weight, stride});
}

DepthwiseShape check_expand_gradient(const char* op, const ExpandInput& in, const Tensor& weight, int64_t stride,
                                     const DepthwiseGradient& gradient) {
  check_own(op, in);
  return check_depthwise_gradient(op, {like_e(in), {}, {}, weight, stride}, gradient);
}

namespace generic {

std::tuple<Tensor, Tensor, Tensor> expand_depthwise_forward(const Tensor& x, const Tensor& w1, const Tensor& norm1,
                                                            const Tensor& weight, int64_t stride,
                                                            std::string_view activation) {
  const ExpandInput in{x, w1, norm1, activation};
  check_expand("expand_depthwise_forward", in, weight, stride);
  return depthwise_forward(expanded(in), weight, {}, {}, stride);
}

std::tuple<Tensor, Tensor> expand_depthwise_backward(const Tensor& dz, const OptionalTensor& d,
                                                     const OptionalTensor& affine, const Tensor& x, const Tensor& w1,
                                                     const Tensor& norm1, const Tensor& weight, int64_t stride,
                                                     std::string_view activation) {
  constexpr auto op = "expand_depthwise_backward";
  const ExpandInput in{x, w1, norm1, activation};
  check_expand_gradient(op, in, weight, stride, {dz, d, affine});
  return depthwise_backward(op, {dz, d, affine}, {expanded(in), {}, {}, weight, stride}, false, {true, true});
}

}  // namespace generic

TORCH_LIBRARY_IMPL(proxyless_fast, CompositeExplicitAutograd, m) {
  m.impl("expand_depthwise_forward", &generic::expand_depthwise_forward);
  m.impl("expand_depthwise_backward", &generic::expand_depthwise_backward);
}

}  // namespace pf
