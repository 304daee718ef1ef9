// Checks that several host entries share. A message begins with the op and names the argument.
#pragma once
#include <ATen/core/Tensor.h>

#include "given.h"

namespace pf {

inline void require_real_image(const char* op, const char* name, const at::Tensor& x) {
  require_given(op, name, x);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, op, ": ", name,
                    " must have shape (batch, channels, height, width) and not be empty, got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op, ": ", name,
                    " must be float32 or float64, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got ", x.layout());
}

// t must lie on the CPU, as every argument of a CPU op, and have this shape and dtype.
inline void require(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
  require_given(op, name, t);
  TORCH_CHECK_VALUE(t.device().is_cpu(), op, ": ", name, " must be on the CPU, as x is, got one on ", t.device());
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got ", t.layout());
  TORCH_CHECK_VALUE(t.sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.scalar_type() == type, op, ": ", name, " must be ", type, ", got ", t.scalar_type());
}

inline void require_eps(const char* op, double eps) {
  TORCH_CHECK_VALUE(eps >= 0, op, ": eps must not be negative, got ", eps);
}

// The float64 values that a forward op returned, densely: reading them through a slice would read others.
inline at::Tensor required_statistics(const char* op, const char* name, const at::Tensor& t, int64_t n) {
  require(op, name, t, {n}, at::kDouble);
  return t.contiguous();
}

// Mean or variance of one norm: vectors of n values of float32 or float64.
inline void require_running(const char* op, size_t i, const at::Tensor& t, int64_t n) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.layout() == at::kStrided && t.dim() == 1 && t.size(0) == n, op,
                    ": running[", i, "] must have shape (", n, ",), be dense and on the CPU, got a ", t.layout(),
                    " tensor of shape ", t.sizes(), " on ", t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": running[", i,
                    "] must be float32 or float64, got ", t.scalar_type());
}

// Mean and variance of one norm of n channels; they may be left out where they are not read.
inline void require_moments(const char* op, at::TensorList running, int64_t n, bool read) {
  TORCH_CHECK_VALUE(running.size() == 2 || (!read && running.empty()), op,
                    ": running must hold a mean and a variance, got ", running.size(), " tensors");
  for (size_t i = 0; i < running.size(); ++i) require_running(op, i, running[i], n);
}

// Where it is moved, each value must have its place in memory.
inline void require_own_values(const char* op, size_t i, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.numel() < 2 || t.stride(0) != 0, op, ": running[", i,
                    "] must hold values of its own, got one expanded");
}

}  // namespace pf
