#include "workspace.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace pf {
namespace {

constexpr size_t huge_page = 2 << 20;

struct Free {
  void* memory;
  size_t bytes;
};
std::mutex mutex;
std::vector<Free> free_list;  // few: as many as one call holds at once

void advise_huge(void* memory, size_t bytes) {
#ifdef __linux__
  const auto start = (reinterpret_cast<uintptr_t>(memory) + huge_page - 1) / huge_page * huge_page;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / huge_page * huge_page;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a wish; failing is no error
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

Workspace::Workspace(size_t bytes) : memory_(nullptr), bytes_(0) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    auto best = free_list.end();
    for (auto it = free_list.begin(); it != free_list.end(); ++it)
      if (it->bytes >= bytes && (best == free_list.end() || it->bytes < best->bytes)) best = it;
    if (best != free_list.end()) {
      memory_ = best->memory;
      bytes_ = best->bytes;
      free_list.erase(best);
    } else if (!free_list.empty()) {  // grow one instead of keeping both
      std::free(free_list.back().memory);
      free_list.pop_back();
    }
  }
  if (memory_ == nullptr) {
    bytes_ = (std::max<size_t>(bytes, 1) + huge_page - 1) / huge_page * huge_page;
    memory_ = std::aligned_alloc(huge_page, bytes_);
    if (memory_ == nullptr) throw std::bad_alloc();
    advise_huge(memory_, bytes_);
  }
  // The switch that poisons torch.empty poisons scratch too: all bits set is NaN.
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
    std::memset(memory_, 0xff, bytes);
}

Workspace::~Workspace() {
  const std::lock_guard<std::mutex> lock(mutex);
  free_list.push_back({memory_, bytes_});
  std::sort(free_list.begin(), free_list.end(), [](const Free& a, const Free& b) { return a.bytes > b.bytes; });
}

at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  at::Tensor t = at::empty(sizes, options.memory_format(format));
  if (t.nbytes() >= 2 * huge_page) advise_huge(t.mutable_data_ptr(), t.nbytes());
  return t;
}

}  // namespace pf
