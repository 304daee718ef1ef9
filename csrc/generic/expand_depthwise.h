// Arguments of the ops that expand and convolve in one, checked once for every device, and their ATen implementation.
#pragma once
#include <string_view>

#include "generic/depthwise.h"

namespace pf {

// e = activation(BN(x W1^T)), rounded to x's dtype.
struct ExpandInput {
  const at::Tensor &x, &w1, &norm1;
  std::string_view activation;
};

// Both raise ValueError naming the op and the argument. The shape is that of e.
DepthwiseShape check_expand(const char* op, const ExpandInput& in, const at::Tensor& weight, int64_t stride);
DepthwiseShape check_expand_gradient(const char* op, const ExpandInput& in, const at::Tensor& weight, int64_t stride,
                                     const DepthwiseGradient& gradient);

namespace generic {

std::tuple<at::Tensor, at::Tensor, at::Tensor> expand_depthwise_forward(const at::Tensor& x, const at::Tensor& w1,
                                                                        const at::Tensor& norm1,
                                                                        const at::Tensor& weight, int64_t stride,
                                                                        std::string_view activation);
std::tuple<at::Tensor, at::Tensor> expand_depthwise_backward(const at::Tensor& dz, const OptionalTensor& d,
                                                             const OptionalTensor& affine, const at::Tensor& x,
                                                             const at::Tensor& w1, const at::Tensor& norm1,
                                                             const at::Tensor& weight, int64_t stride,
                                                             std::string_view activation);

}  // namespace generic
}  // namespace pf
