// Memory that outlives a call and a step. A fresh large allocation costs a page fault for each page it touches, and the
// clearing of that page. Steps of a search ask for much the same sizes again and again, so what they free is kept, as
// torch keeps memory of a GPU.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace pf {

// Scratch memory of one call.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(Workspace&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  Workspace& operator=(Workspace&&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
};

// An uninitialised tensor on kept memory, dense, or channels-last for four dimensions.
at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options,
                       at::MemoryFormat format = at::MemoryFormat::Contiguous);

// Copies pieces of memory, by address and bytes, one behind the other, to one place; all threads share the work.
void copy_behind(const std::vector<uintptr_t>& from, const std::vector<size_t>& bytes, uintptr_t to);

// Gives what is free back to the system.
void release_memory();

}  // namespace pf
