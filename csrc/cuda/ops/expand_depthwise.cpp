// CUDA host entries of the ops that expand and convolve in one; kernels in expand_depthwise.cuh.
#include "generic/expand_depthwise.h"

#include <torch/library.h>

#include "cuda/ops/host.h"

namespace pf {
namespace {

using at::Tensor;
using namespace cuda::host;

// float32 products are no job for tensor cores, and tensor cores that take 16 inputs at a time come with sm_80.
bool expands(const Tensor& x, const DepthwiseShape& s, const cuda::Tiling& tiling) {
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device()));
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  return half && s.kernel >= 3 && s.kernel <= 7 && tiling.threads > 0 && major >= 8;
}

cuda::Activation activation_of(std::string_view name) {
  if (name == "relu6") return cuda::Activation::relu6;
  if (name == "relu") return cuda::Activation::relu;
  if (name == "silu") return cuda::Activation::silu;
  if (name == "hardswish") return cuda::Activation::hardswish;
  return cuda::Activation::identity;
}

// As the kernels read them.
struct Factors {
  Tensor x, w1, norm1;
  explicit Factors(const ExpandInput& in) : x(pixels(in.x)), w1(in.w1.contiguous()), norm1(in.norm1.contiguous()) {}

  cuda::ExpandArgs expand(std::string_view activation) const {
    const bool vectors = x.size(1) % 4 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 8 == 0;
    return {x.const_data_ptr(),          w1.const_data_ptr(),       norm1.const_data_ptr(),
            static_cast<int>(x.size(1)), activation_of(activation), vectors};
  }
};

std::tuple<Tensor, Tensor, Tensor> expand_depthwise_forward(const Tensor& x, const Tensor& w1, const Tensor& norm1,
                                                            const Tensor& weight, int64_t stride,
                                                            std::string_view activation) {
  constexpr auto op = "expand_depthwise_forward";
  const ExpandInput in{x, w1, norm1, activation};
  const auto s = check_expand(op, in, weight, stride);
  const auto shape = shape_of(op, s, x);
  const auto tiling = cuda::forward_tiling(shape, static_cast<int>(x.size(1)));
  if (!expands(x, s, tiling)) return generic::expand_depthwise_forward(x, w1, norm1, weight, stride, activation);
  const c10::cuda::CUDAGuard guard(x.device());
  const Factors factors(in);
  const Tensor w = weight.contiguous();
  const Tensor d =
      like(x, {s.batch, s.channels, s.out_height(), s.out_width()}, x.scalar_type(), at::MemoryFormat::ChannelsLast);
  const auto flat = at::MemoryFormat::Contiguous;
  const Tensor mean = like(x, {s.channels}, at::kFloat, flat), var = like(x, {s.channels}, at::kFloat, flat);
  const Tensor partial = like(x, {tiling.groups, 3, s.channels}, at::kFloat, flat);
  const bool vectors = s.channels * x.element_size() % 16 == 0 && aligned(d.const_data_ptr());
  const cuda::ForwardArgs pass{shape,
                               tiling,
                               nullptr,
                               w.const_data_ptr(),
                               nullptr,
                               nullptr,
                               d.mutable_data_ptr(),
                               partial.mutable_data_ptr(),
                               mean.mutable_data_ptr(),
                               var.mutable_data_ptr(),
                               w.scalar_type() == at::kFloat,
                               vectors};
  cuda::launch(cuda::ExpandForwardArgs{pass, factors.expand(activation)}, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {d, mean, var};
}

std::tuple<Tensor, Tensor> expand_depthwise_backward(const Tensor& dz, const OptionalTensor& d,
                                                     const OptionalTensor& affine, const Tensor& x, const Tensor& w1,
                                                     const Tensor& norm1, const Tensor& weight, int64_t stride,
                                                     std::string_view activation) {
  constexpr auto op = "expand_depthwise_backward";
  const ExpandInput in{x, w1, norm1, activation};
  const auto s = check_expand_gradient(op, in, weight, stride, {dz, d, affine});
  const auto shape = shape_of(op, s, x);
  const auto tiling = cuda::backward_tiling(shape, static_cast<int>(x.size(1)));
  if (!expands(x, s, tiling))
    return generic::expand_depthwise_backward(dz, d, affine, x, w1, norm1, weight, stride, activation);
  const c10::cuda::CUDAGuard guard(x.device());
  const Factors factors(in);
  const Tensor w = weight.contiguous(), g = pixels(dz), out = d ? pixels(*d) : Tensor(), a = contiguous(affine);
  const auto flat = at::MemoryFormat::Contiguous;
  const Tensor de = like(x, {s.batch, s.channels, s.height, s.width}, x.scalar_type(), at::MemoryFormat::ChannelsLast);
  const Tensor partial = like(x, {tiling.groups, s.kernel * s.kernel, s.channels}, at::kFloat, flat);
  const Tensor dw = like(x, w.sizes(), at::kFloat, flat);
  const bool vectors = s.channels * x.element_size() % 16 == 0 && aligned(g.const_data_ptr()) && aligned(data(out)) &&
                       aligned(de.const_data_ptr());
  const cuda::BackwardArgs pass{shape,
                                tiling,
                                g.const_data_ptr(),
                                data(out),
                                data(a),
                                nullptr,
                                nullptr,
                                nullptr,
                                w.const_data_ptr(),
                                de.mutable_data_ptr(),
                                partial.mutable_data_ptr(),
                                dw.mutable_data_ptr(),
                                false,
                                w.scalar_type() == at::kFloat,
                                vectors};
  cuda::launch(cuda::ExpandBackwardArgs{pass, factors.expand(activation)}, stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {de, dw.to(w.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(proxyless_fast, CUDA, m) {
  m.impl("expand_depthwise_forward", &expand_depthwise_forward);
  m.impl("expand_depthwise_backward", &expand_depthwise_backward);
}

}  // namespace pf
