// The names of activations, as the host entries take them.
#pragma once
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <string_view>

#include "cpu/mbconv.h"

namespace pf {

template <typename T>
struct ActivationOf {
  cpu::Activation kind;
  T low, high;
};

inline void check_activation(const char* op, std::string_view name) {
  static constexpr std::string_view known[] = {"relu6", "relu", "identity", "silu", "hardswish"};
  TORCH_CHECK_VALUE(std::find(std::begin(known), std::end(known), name) != std::end(known), op,
                    ": activation must be relu6, relu, identity, silu or hardswish, got '", name, "'");
}

template <typename T>
ActivationOf<T> activation_of(std::string_view name) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  if (name == "silu") return {cpu::Activation::silu, -infinity, infinity};
  if (name == "hardswish") return {cpu::Activation::hardswish, -infinity, infinity};
  return {cpu::Activation::clamp, name == "identity" ? -infinity : T(0), name == "relu6" ? T(6) : infinity};
}

}  // namespace pf
