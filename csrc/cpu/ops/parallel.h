// Work shared out piece by piece: whoever is done takes the next. Threads are rarely equally fast (another process,
// another guest of the machine), and pieces are few, so equal halves would leave one thread waiting. Pieces are cut by
// shape and have partial sums of their own, so that results have the same bits whoever computes them.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace pf {

// Runs body(take) in each thread; take() is the next of 0, ..., n - 1, and negative when none is left.
template <typename Body>
void share_pieces(int64_t n, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    return i < n ? i : int64_t{-1};
  };
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(take);
  });
}

}  // namespace pf
