// The table of CPU kernels. Every kernel is a plain function over a range of work: the host entries (compiled for the
// baseline) own memory and threads, and the kernels, compiled once per instruction set, own the arithmetic.
#pragma once
#include <cstdint>

namespace pf::cpu {

// A batch of images seen as pixels x channels: element (n, p, c) is at data[n * stride_n + p * stride_p + c *
// stride_c].
template <typename T>
struct Pixels {
  const T* data;
  int64_t images, pixels, channels;
  int64_t stride_n, stride_p, stride_c;
};

template <typename T>
struct KernelsFor {
  // Sum of a[i] * b[i] over n contiguous elements, in double.
  double (*dot)(const T* a, const T* b, int64_t n);
  // Rows first..last-1 (row = image * pixels + pixel): adds sum(x - pivot) to sum[C] and the upper triangle of
  // sum((x - pivot)(x - pivot)^T) to gram[C * C], in double. scratch holds gram_scratch(C) elements.
  void (*gram)(const Pixels<T>& x, const T* pivot, int64_t first, int64_t last, double* sum, double* gram, T* scratch);
};

int64_t gram_scratch(int64_t channels);

struct Kernels {
  const char* name;
  KernelsFor<float> f32;
  KernelsFor<double> f64;
};

// The table of the best instruction set this machine has, or of the one PROXYLESS_FAST_ISA names.
const Kernels& kernels();

template <typename T>
const KernelsFor<T>& kernels_for();

}  // namespace pf::cpu
