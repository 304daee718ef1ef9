#include "cpu/ops/memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace pf {
namespace {

constexpr size_t page = 4096, huge_page = 2 << 20, growth = 256 << 20;
constexpr size_t smallest = 256 << 10;  // of a tensor worth keeping memory for

size_t round_up(size_t n, size_t to) { return (std::max<size_t>(n, 1) + to - 1) / to * to; }

// One range of addresses, of which more is made usable as it is needed; the lowest place that is large enough is taken,
// so that what is in use stays together whatever the order of sizes. Physical memory is only what was written to.
class Pool final : public at::Allocator {
 public:
  void* take(size_t bytes) {
    bytes = round_up(bytes, page);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto place = std::find_if(free_.begin(), free_.end(), [&](const auto& f) { return f.second >= bytes; });
    if (place == free_.end() && grow(bytes)) place = std::prev(free_.end());
    if (place == free_.end()) {  // no range of addresses to be had here: the system's own allocator
      void* memory = std::aligned_alloc(page, bytes);
      if (memory == nullptr) throw std::bad_alloc();
      return memory;
    }
    const auto [start, size] = *place;
    free_.erase(place);
    if (size > bytes) free_[start + bytes] = size - bytes;
    used_[start] = bytes;
    return start;
  }

  void give(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto use = used_.find(static_cast<char*>(memory));
    if (use == used_.end()) return std::free(memory);
    put(use->first, use->second);
    used_.erase(use);
  }

  // Held across a fork, so that the child finds the books in order and the lock free.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  void trim() {
#ifdef __linux__
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [start, size] : free_) madvise(start, size, MADV_DONTNEED);
#endif
  }

  at::DataPtr allocate(size_t bytes) override {
    void* memory = take(bytes);
    return {memory, memory, &delete_memory, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &delete_memory; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void delete_memory(void* memory);

  void put(char* start, size_t size) {  // joined with its free neighbours
    auto next = free_.lower_bound(start);
    if (next != free_.end() && start + size == next->first) size += next->second, next = free_.erase(next);
    if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == start)
      std::prev(next)->second += size;
    else
      free_[start] = size;
  }

  bool grow(size_t bytes) {
#ifdef __linux__
    if (range_ == nullptr && !tried_) {
      tried_ = true;
      size_ = 2 * static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
      void* range = mmap(nullptr, size_ + huge_page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (range == MAP_FAILED) return false;
      range_ = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(range), huge_page));
    }
    const size_t more = round_up(bytes, growth);
    if (range_ == nullptr || more > size_ - usable_) return false;
    if (mprotect(range_ + usable_, more, PROT_READ | PROT_WRITE) != 0) return false;
    madvise(range_ + usable_, more, MADV_HUGEPAGE);  // a wish; failing is no error
    put(range_ + usable_, more);
    usable_ += more;
    return std::prev(free_.end())->second >= bytes;
#else
    (void)bytes;
    return false;
#endif
  }

  std::mutex mutex_;
  std::map<char*, size_t> free_;
  std::unordered_map<char*, size_t> used_;
  char* range_ = nullptr;
  size_t size_ = 0, usable_ = 0;
  bool tried_ = false;
};

Pool* new_pool();

Pool& pool() {
  static auto* it = new_pool();  // never destroyed: tensors may outlive every static object
  return *it;
}

Pool* new_pool() {
#ifdef __linux__
  pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); },
                 [] {
                   pool().unlock();
                   // The parent's OpenMP threads are not in the child, and whatever hands them work waits for ever.
                   if (at::get_num_threads() > 1) at::set_num_threads(1);
                 });
#endif
  return new Pool;
}

void Pool::delete_memory(void* memory) { pool().give(memory); }

// The switch that poisons torch.empty.
bool poison() {
  return at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory();
}

}  // namespace

Workspace::Workspace(size_t bytes) : memory_(pool().take(bytes)) {
  if (poison()) std::memset(memory_, 0xff, bytes);  // all bits set is NaN
}

Workspace::~Workspace() {
  if (memory_ != nullptr) pool().give(memory_);
}

at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const auto bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (bytes < smallest || poison()) return at::empty(sizes, options.memory_format(format));
  std::vector<int64_t> strides(sizes.size(), 1);
  if (format == at::MemoryFormat::ChannelsLast)
    strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  else
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return at::Tensor(at::detail::empty_strided_generic(sizes, strides, &pool(), at::DispatchKeySet(at::DispatchKey::CPU),
                                                      at::typeMetaToScalarType(options.dtype())));
}

void copy_behind(const std::vector<uintptr_t>& from, const std::vector<size_t>& bytes, uintptr_t to) {
  std::vector<size_t> starts = {0};
  for (size_t n : bytes) starts.push_back(starts.back() + n);
  const auto total = static_cast<int64_t>(starts.back());
  at::parallel_for(0, total, 1 << 20, [&](int64_t begin, int64_t end) {
    auto first = static_cast<size_t>(begin);
    const auto last = static_cast<size_t>(end);
    for (size_t i = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1; first < last; ++i) {
      const size_t stop = std::min(starts[i + 1], last);
      std::memcpy(reinterpret_cast<void*>(to + first), reinterpret_cast<const void*>(from[i] + first - starts[i]),
                  stop - first);
      first = stop;
    }
  });
}

void release_memory() { pool().trim(); }

}  // namespace pf
