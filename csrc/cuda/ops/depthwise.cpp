// CUDA host entries of the depthwise ops: arguments checked once, memory, device and stream here; kernels in *.cuh.
#include "generic/depthwise.h"

#include <torch/library.h>

#include "cuda/ops/host.h"

namespace pf {
namespace {

using at::Tensor;
using namespace cuda::host;

std::tuple<Tensor, Tensor, Tensor> depthwise_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                                     const OptionalTensor& shift, int64_t stride) {
  if (!kernels_run(x, weight)) return generic::depthwise_forward(x, weight, scale, shift, stride);
  const auto s = check_depthwise("depthwise_forward", {x, scale, shift, weight, stride});
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor input = pixels(x), w = weight.contiguous();
  const Tensor a = contiguous(scale), b = contiguous(shift);
  const Tensor d =
      like(x, {s.batch, s.channels, s.out_height(), s.out_width()}, x.scalar_type(), at::MemoryFormat::ChannelsLast);
  const auto flat = at::MemoryFormat::Contiguous;
  const Tensor mean = like(x, {s.channels}, at::kFloat, flat), var = like(x, {s.channels}, at::kFloat, flat);
  const auto shape = shape_of("depthwise_forward", s, x);
  const auto tiling = cuda::forward_tiling(shape);
  const Tensor partial = like(x, {tiling.groups, 3, s.channels}, at::kFloat, flat);
  const bool vectors =
      s.channels * x.element_size() % 16 == 0 && aligned(input.const_data_ptr()) && aligned(d.const_data_ptr());
  cuda::launch(cuda::ForwardArgs{shape, tiling, input.const_data_ptr(), w.const_data_ptr(), data(a), data(b),
                                 d.mutable_data_ptr(), partial.mutable_data_ptr(), mean.mutable_data_ptr(),
                                 var.mutable_data_ptr(), w.scalar_type() == at::kFloat, vectors},
               stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {d, mean, var};
}

std::tuple<Tensor, Tensor> backward(const char* op, const DepthwiseGradient& gradient, const DepthwiseInput& in,
                                    bool mask, std::array<bool, 2> wanted) {
  if (!kernels_run(in.x, in.weight)) return generic::depthwise_backward(op, gradient, in, mask, wanted);
  const auto s = check_depthwise_gradient(op, in, gradient);
  const c10::cuda::CUDAGuard guard(in.x.device());
  const Tensor x = pixels(in.x), dz = pixels(gradient.dz), w = in.weight.contiguous();
  const Tensor d = gradient.d ? pixels(*gradient.d) : Tensor(), affine = contiguous(gradient.affine);
  const Tensor a = contiguous(in.scale), b = contiguous(in.shift);
  const auto shape = shape_of(op, s, in.x);
  const auto tiling = cuda::backward_tiling(shape);
  const auto flat = at::MemoryFormat::Contiguous;
  Tensor q, dw, partial;
  if (wanted[0]) q = like(x, x.sizes(), x.scalar_type(), at::MemoryFormat::ChannelsLast);
  if (wanted[1]) {
    partial = like(x, {tiling.groups, s.kernel * s.kernel, s.channels}, at::kFloat, flat);
    dw = like(x, w.sizes(), at::kFloat, flat);
  }
  const auto out = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  const bool vectors = s.channels * x.element_size() % 16 == 0 && aligned(x.const_data_ptr()) &&
                       aligned(dz.const_data_ptr()) && aligned(data(d)) && aligned(out(q));
  cuda::launch(cuda::BackwardArgs{shape, tiling, dz.const_data_ptr(), data(d), data(affine), x.const_data_ptr(),
                                  data(a), data(b), w.const_data_ptr(), out(q), out(partial), out(dw), mask,
                                  w.scalar_type() == at::kFloat, vectors},
               stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (wanted[1]) dw = dw.to(w.scalar_type());
  return {q, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(proxyless_fast, CUDA, m) {
  m.impl("depthwise_forward", &depthwise_forward);
  m.impl("depthwise_backward", &depthwise_backward_op<backward>);
  m.impl("depthwise_backward_input", &depthwise_backward_input_op<backward>);
  m.impl("depthwise_backward_weight", &depthwise_backward_weight_op<backward>);
}

}  // namespace pf
