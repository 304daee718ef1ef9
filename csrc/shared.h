// Sums over the processes of a group, which share a batch: torch.distributed's own, by the group's name. A group
// without a name is this process alone.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace pf {

// Adds up each value over the processes of a group, in place. All of them must call it, in one order.
void add_up(std::vector<double>& values, const std::string& group);

// Mean and variance (biased) of `count` values here, as those of all processes have them; returns the count of all.
double merge_moments(std::vector<double>& mean, std::vector<double>& var, double count, const std::string& group);

}  // namespace pf
