// Scratch memory that outlives a call: a fresh large allocation costs a page fault for every page it touches, which on
// wide tensors is as slow as the arithmetic.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstddef>

namespace pf {

class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  size_t bytes_;
};

// An uninitialised tensor on huge pages where the system offers them.
at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options,
                       at::MemoryFormat format = at::MemoryFormat::Contiguous);

}  // namespace pf
