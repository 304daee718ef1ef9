// What the host entries share: shapes as the kernels take them, layouts, memory.
#pragma once
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "cuda/kernels.h"
#include "generic/depthwise.h"

namespace pf::cuda::host {

using at::Tensor;

inline bool kernels_run(const Tensor& x, const Tensor& weight) {
  return x.scalar_type() != at::kDouble && weight.size(2) >= 3 && weight.size(2) <= 7;
}

inline KernelShape shape_of(const char* op, const DepthwiseShape& s, const Tensor& x) {
  constexpr int64_t limit = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(
      s.batch <= limit && s.channels * s.kernel * s.kernel <= limit / 2 && s.height * s.width <= limit / 2, op,
      ": x must have fewer than 2^30 pixels per image and weights, got ", x.sizes());
  const auto type = x.scalar_type();
  return {type == at::kHalf       ? ElementType::f16
          : type == at::kBFloat16 ? ElementType::bf16
                                  : ElementType::f32,
          static_cast<int>(s.batch),
          static_cast<int>(s.channels),
          static_cast<int>(s.height),
          static_cast<int>(s.width),
          static_cast<int>(s.out_height()),
          static_cast<int>(s.out_width()),
          static_cast<int>(s.kernel),
          static_cast<int>(s.stride)};
}

// Pixel after pixel of channels.
inline Tensor pixels(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

inline Tensor like(const Tensor& x, at::IntArrayRef sizes, at::ScalarType type, at::MemoryFormat format) {
  return at::empty(sizes, x.options().dtype(type).memory_format(format));
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// Undefined where there is none.
inline Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }

inline CUstream_st* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

}  // namespace pf::cuda::host
