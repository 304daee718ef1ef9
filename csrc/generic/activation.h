// The names of activations, as the host entries of every device take them.
#pragma once
#include <c10/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <string_view>

namespace pf {

inline void check_activation(const char* op, std::string_view name) {
  static constexpr std::string_view known[] = {"relu6", "relu", "identity", "silu", "hardswish"};
  TORCH_CHECK_VALUE(std::find(std::begin(known), std::end(known), name) != std::end(known), op,
                    ": activation must be relu6, relu, identity, silu or hardswish, got '", name, "'");
}

}  // namespace pf
