// Arguments of the depthwise ops, checked once for every device, and their ATen implementation.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "given.h"

namespace pf {

using OptionalTensor = std::optional<at::Tensor>;

struct DepthwiseShape {
  int64_t batch, channels, height, width, kernel, stride;
  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
};

struct DepthwiseInput {
  const at::Tensor& x;
  const OptionalTensor &scale, &shift;
  const at::Tensor& weight;
  int64_t stride;
};

struct DepthwiseGradient {
  const at::Tensor& dz;
  const OptionalTensor &d, &affine;
};

// float64 for float64, else float32: the type of sums and of everything per channel.
inline at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool dense_on(const at::Tensor& t, const at::Tensor& x) {
  return t.layout() == at::kStrided && t.device() == x.device();
}

// Both raise ValueError naming the op and the argument.
DepthwiseShape check_depthwise(const char* op, const DepthwiseInput& in);
DepthwiseShape check_depthwise_gradient(const char* op, const DepthwiseInput& in, const DepthwiseGradient& gradient);

namespace generic {

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_forward(const at::Tensor& x, const at::Tensor& weight,
                                                                 const OptionalTensor& scale,
                                                                 const OptionalTensor& shift, int64_t stride);
// wanted: q, dw. What is not wanted is an undefined tensor.
std::tuple<at::Tensor, at::Tensor> depthwise_backward(const char* op, const DepthwiseGradient& gradient,
                                                      const DepthwiseInput& in, bool mask, std::array<bool, 2> wanted);

}  // namespace generic

// The three backward ops of the schema, from one function with the signature of generic::depthwise_backward.
template <auto backward>
std::tuple<at::Tensor, at::Tensor> depthwise_backward_op(const at::Tensor& dz, const OptionalTensor& d,
                                                         const OptionalTensor& affine, const at::Tensor& x,
                                                         const OptionalTensor& scale, const OptionalTensor& shift,
                                                         const at::Tensor& weight, int64_t stride, bool mask) {
  return backward("depthwise_backward", {dz, d, affine}, {x, scale, shift, weight, stride}, mask, {true, true});
}

template <auto backward>
at::Tensor depthwise_backward_input_op(const at::Tensor& dz, const OptionalTensor& d, const OptionalTensor& affine,
                                       const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                       const at::Tensor& weight, int64_t stride, bool mask) {
  return std::get<0>(
      backward("depthwise_backward_input", {dz, d, affine}, {x, scale, shift, weight, stride}, mask, {true, false}));
}

template <auto backward>
at::Tensor depthwise_backward_weight_op(const at::Tensor& dz, const OptionalTensor& d, const OptionalTensor& affine,
                                        const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                                        const at::Tensor& weight, int64_t stride) {
  return std::get<1>(
      backward("depthwise_backward_weight", {dz, d, affine}, {x, scale, shift, weight, stride}, false, {false, true}));
}

}  // namespace pf
