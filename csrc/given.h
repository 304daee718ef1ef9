// What every entry of an op asks first.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace pf {

// Within, torch's ops compute in the types they are given: what an op of ours asks of them is not to be rounded.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Python's None is an undefined tensor here, which has neither shape nor device.
inline void require_given(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.defined(), op, ": ", name, " must be a tensor, got None");
}

}  // namespace pf
