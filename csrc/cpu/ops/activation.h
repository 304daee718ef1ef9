// An activation as the CPU kernels take it: one of a few forms, and its limits.
#pragma once
#include <limits>

#include "cpu/mbconv.h"
#include "generic/activation.h"

namespace pf {

template <typename T>
struct BoundedActivation {
  cpu::ActivationForm form;
  T low, high;
};

// name: one that check_activation has let pass.
template <typename T>
BoundedActivation<T> bounded_activation(std::string_view name) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  if (name == "silu") return {cpu::ActivationForm::silu, -infinity, infinity};
  if (name == "hardswish") return {cpu::ActivationForm::hardswish, -infinity, infinity};
  return {cpu::ActivationForm::clamp, name == "identity" ? -infinity : T(0), name == "relu6" ? T(6) : infinity};
}

}  // namespace pf
