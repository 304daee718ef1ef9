// What every entry of an op asks first.
#pragma once
#include <ATen/core/Tensor.h>

namespace pf {

// Python's None is an undefined tensor here, which has neither shape nor device.
inline void require_given(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.defined(), op, ": ", name, " must be a tensor, got None");
}

}  // namespace pf
