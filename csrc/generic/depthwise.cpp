// Depthwise convolution with batch-norm prologues, in ATen calls: for any device without kernels of ours (csrc/cuda).
#include "generic/depthwise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/var_mean.h>
#include <torch/library.h>

namespace pf {

using at::Tensor;
namespace {

void check_per_channel(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape, const Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == shape && t.scalar_type() == accumulate_type(x) && dense_on(t, x), op, ": ", name,
                    " must be ", accumulate_type(x), " of shape ", shape, " on ", x.device(), ", got ", t.scalar_type(),
                    " of shape ", t.sizes(), " on ", t.device(), ", ", t.layout());
}

}  // namespace

DepthwiseShape check_depthwise(const char* op, const DepthwiseInput& in) {
  const Tensor &x = in.x, &w = in.weight;
  require_given(op, "x", x);
  require_given(op, "weight", w);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0 && x.layout() == at::kStrided, op,
                    ": x must have shape (batch, channels, height, width), be dense and not be empty, got a ",
                    x.layout(), " tensor of shape ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble, op,
                    ": x must be float16, bfloat16, float32 or float64, got ", type);
  TORCH_CHECK_VALUE(w.dim() == 4 && w.size(0) == x.size(1) && w.size(1) == 1 && w.size(2) == w.size(3) &&
                        w.size(2) % 2 == 1 && dense_on(w, x),
                    op, ": weight must have shape (", x.size(1), ", 1, k, k) with odd k, be dense and on ", x.device(),
                    ", got a ", w.layout(), " tensor of shape ", w.sizes(), " on ", w.device());
  TORCH_CHECK_VALUE(w.scalar_type() == type || w.scalar_type() == accumulate_type(x), op, ": weight must be ", type,
                    " as x is, or ", accumulate_type(x), ", got ", w.scalar_type());
  TORCH_CHECK_VALUE(in.stride == 1 || in.stride == 2, op, ": stride must be 1 or 2, got ", in.stride);
  TORCH_CHECK_VALUE(in.scale.has_value() == in.shift.has_value(), op,
                    ": scale and shift must be given together, got only ", in.scale ? "scale" : "shift");
  if (in.scale) {
    check_per_channel(op, "scale", *in.scale, {x.size(1)}, x);
    check_per_channel(op, "shift", *in.shift, {x.size(1)}, x);
  }
  return {x.size(0), x.size(1), x.size(2), x.size(3), w.size(2), in.stride};
}

DepthwiseShape check_depthwise_gradient(const char* op, const DepthwiseInput& in, const DepthwiseGradient& gradient) {
  const auto shape = check_depthwise(op, in);
  const std::array<int64_t, 4> out = {shape.batch, shape.channels, shape.out_height(), shape.out_width()};
  const auto check = [&](const char* name, const Tensor& t) {
    require_given(op, name, t);
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(out) && t.scalar_type() == in.x.scalar_type() && dense_on(t, in.x),
                      op, ": ", name, " must be ", in.x.scalar_type(), " of shape ", at::IntArrayRef(out), " on ",
                      in.x.device(), ", got ", t.scalar_type(), " of shape ", t.sizes(), " on ", t.device(), ", ",
                      t.layout());
  };
  check("dz", gradient.dz);
  TORCH_CHECK_VALUE(gradient.d.has_value() == gradient.affine.has_value(), op,
                    ": d and affine must be given together, got only ", gradient.d ? "d" : "affine");
  if (gradient.d) {
    check("d", *gradient.d);
    check_per_channel(op, "affine", *gradient.affine, {4, shape.channels}, in.x);
  }
  return shape;
}

namespace {

Tensor channels_last_as(at::ScalarType type, const Tensor& t) {
  Tensor out = at::empty(t.sizes(), t.options().dtype(type).memory_format(at::MemoryFormat::ChannelsLast));
  return out.copy_(t);
}

Tensor per_channel(const Tensor& t) { return t.view({-1, 1, 1}); }

// x as the convolution sees it, in the accumulation type; u is what its activation saw.
struct Activated {
  Tensor u, e;
  explicit Activated(const DepthwiseInput& in) : u(in.x.to(accumulate_type(in.x))), e(u) {
    if (!in.scale) return;
    u = u * per_channel(*in.scale) + per_channel(*in.shift);
    e = u.clamp(0, 6);
  }
};

}  // namespace

namespace generic {

std::tuple<Tensor, Tensor, Tensor> depthwise_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                                     const OptionalTensor& shift, int64_t stride) {
  const DepthwiseInput in{x, scale, shift, weight, stride};
  const auto shape = check_depthwise("depthwise_forward", in);
  const Activated input(in);
  const int64_t pad = shape.kernel / 2;
  Tensor d = at::convolution(input.e, weight.to(accumulate_type(x)), std::nullopt, {stride, stride}, {pad, pad}, {1, 1},
                             false, {0, 0}, shape.channels);
  d = channels_last_as(x.scalar_type(), d);
  // Statistics of what was stored, which is what the next pass normalises.
  auto [var, mean] = at::var_mean(d.to(accumulate_type(x)), at::OptionalIntArrayRef({0, 2, 3}), at::Scalar(0));
  return {d, mean, var};
}

std::tuple<Tensor, Tensor> depthwise_backward(const char* op, const DepthwiseGradient& gradient,
                                              const DepthwiseInput& in, bool mask, std::array<bool, 2> wanted) {
  check_depthwise_gradient(op, in, gradient);
  const auto type = accumulate_type(in.x);
  const Activated input(in);
  Tensor dd = gradient.dz.to(type);
  if (gradient.d) {
    const auto row = [&](int64_t i) { return per_channel(gradient.affine->select(0, i)); };
    dd = row(0) * dd + row(1) * (gradient.d->to(type) - row(2)) + row(3);
  }
  const int64_t pad = in.weight.size(2) / 2;
  auto [q, dw, none] =
      at::convolution_backward(dd, input.e, in.weight.to(type), std::nullopt, {in.stride, in.stride}, {pad, pad},
                               {1, 1}, false, {0, 0}, in.x.size(1), {wanted[0], wanted[1], false});
  if (wanted[0]) {
    if (mask) q = q * ((input.u > 0) & (input.u < 6));
    q = channels_last_as(in.x.scalar_type(), q);
  }
  if (wanted[1]) dw = dw.to(in.weight.scalar_type()).contiguous();
  return {q, dw};
}

}  // namespace generic

TORCH_LIBRARY_IMPL(proxyless_fast, CompositeExplicitAutograd, m) {
  m.impl("depthwise_forward", &generic::depthwise_forward);
  m.impl("depthwise_backward", &depthwise_backward_op<generic::depthwise_backward>);
  m.impl("depthwise_backward_input", &depthwise_backward_input_op<generic::depthwise_backward>);
  m.impl("depthwise_backward_weight", &depthwise_backward_weight_op<generic::depthwise_backward>);
}

}  // namespace pf
