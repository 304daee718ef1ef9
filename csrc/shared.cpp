#include "shared.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>

namespace pf {

void add_up(std::vector<double>& values, const std::string& group) {
  if (group.empty() || values.empty()) return;
  // Called as Python would: the type of the group's name in the schema is not the same in every version of torch.
  static const auto sum = c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::all_reduce_", "");
  static const auto wait = c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  at::Tensor tensor = at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kDouble);
  torch::jit::Stack stack = {tensor, std::string("sum"), group};
  sum.callBoxed(&stack);
  wait.callBoxed(&stack);
}

double merge_moments(std::vector<double>& mean, std::vector<double>& var, double count, const std::string& group) {
  if (group.empty()) return count;
  std::vector<double> sums(mean);  // first the means, then the squares about the mean of all: no digits are lost
  for (double& v : sums) v *= count;
  sums.push_back(count);
  add_up(sums, group);
  const double total = sums.back();
  std::vector<double> squares(var.size());
  for (size_t c = 0; c < var.size(); ++c) {
    const double apart = mean[c] - sums[c] / total;
    squares[c] = count * (var[c] + apart * apart);
    mean[c] = sums[c] / total;
  }
  add_up(squares, group);
  for (size_t c = 0; c < var.size(); ++c) var[c] = squares[c] / total;
  return total;
}

}  // namespace pf
