// Batch norm with its activation over rows of channels: two passes forward, two backward, and nothing kept but x.
#include "cpu/kernels/batch_norm.h"

#include "cpu/kernels/activation.h"
#include "cpu/kernels/rows.h"

namespace pf::cpu::PF_ISA {

namespace {

// Rows whose sums run in T before they are merged in double; few enough to stay in the first-level cache while the
// vectors of a row are gone through one after the other.
template <typename T>
int64_t run_rows(int64_t channels) {
  const int64_t rows = 8192 / channels;
  return rows < 16 ? 16 : rows > 256 ? 256 : rows;
}

}  // namespace

template <typename T>
void norm_moments(const T* x, int64_t rows, int64_t channels, const Moments& moments) {
  using V = Vec<T>;
  const int64_t run = run_rows<T>(channels);
  double count = moments.count;
  for (int64_t start = 0; start < rows; start += run) {
    const int64_t n = start + run < rows ? run : rows - start;
    for_vectors<T>(channels, [&](int64_t c, int width) {
      const T* p = x + start * channels + c;
      const V pivot = load_some(p, width);
      V s[2] = {V::zero(), V::zero()}, ss[2] = {V::zero(), V::zero()};
      int64_t i = 0;
      for (; i + 2 <= n; i += 2)
        for (int u = 0; u < 2; ++u) {
          const V t = load_some(p + (i + u) * channels, width) - pivot;
          s[u] = s[u] + t;
          ss[u] = fma(t, t, ss[u]);
        }
      for (; i < n; ++i) {
        const V t = load_some(p + i * channels, width) - pivot;
        s[0] = s[0] + t;
        ss[0] = fma(t, t, ss[0]);
      }
      const V sum = s[0] + s[1], square = ss[0] + ss[1];
      const double b = static_cast<double>(n), share = b / (count + b);
      for (int j = 0; j < width; ++j) {
        const double offset = static_cast<double>(sum.v[j]) / b;
        const double delta = static_cast<double>(pivot.v[j]) + offset - moments.mean[c + j];
        moments.m2[c + j] += static_cast<double>(square.v[j]) - offset * offset * b + delta * delta * count * share;
        moments.mean[c + j] += delta * share;
      }
    });
    count += static_cast<double>(n);
  }
}

template <typename T>
void norm_forward(const NormArgs<T>& f, const T* x, int64_t rows, T* out) {
  using V = Vec<T>;
  with_activation<T>(f, [&](auto act) {
    for (int64_t r = 0; r < rows; ++r, x += f.channels, out += f.channels)
      for_vectors<T>(f.channels, [&](int64_t c, int width) __attribute__((always_inline)) {
        const V u = fma(load_some(x + c, width) - V::load(f.mean + c), V::load(f.scale + c), V::load(f.bias + c));
        store_some(act.value(u), out + c, width);
      });
  });
}

template <typename T>
void norm_sums(const NormArgs<T>& f, const T* grad, const T* x, int64_t rows, double* sum, double* sum_x) {
  using V = Vec<T>;
  const int64_t run = run_rows<T>(f.channels);
  with_activation<T>(f, [&](auto act) {
    for (int64_t start = 0; start < rows; start += run) {
      const int64_t n = start + run < rows ? run : rows - start;
      for_vectors<T>(f.channels, [&](int64_t c, int width) __attribute__((always_inline)) {
        const V mean = V::load(f.mean + c), scale = V::load(f.scale + c), bias = V::load(f.bias + c);
        V s = V::zero(), sx = V::zero();
        for (int64_t i = start; i < start + n; ++i) {
          const V centred = load_some(x + i * f.channels + c, width) - mean;
          const V g = act.back(fma(centred, scale, bias), load_some(grad + i * f.channels + c, width));
          s = s + g;
          sx = fma(g, centred, sx);
        }
        for (int j = 0; j < width; ++j) {
          sum[c + j] += static_cast<double>(s.v[j]);
          sum_x[c + j] += static_cast<double>(sx.v[j]);
        }
      });
    }
  });
}

template <typename T>
void norm_backward(const NormArgs<T>& f, const T* grad, const T* x, int64_t rows, const T* slope, const T* offset,
                   T* dx) {
  using V = Vec<T>;
  with_activation<T>(f, [&](auto act) {
    for (int64_t r = 0; r < rows; ++r, x += f.channels, grad += f.channels, dx += f.channels)
      for_vectors<T>(f.channels, [&](int64_t c, int width) __attribute__((always_inline)) {
        const V centred = load_some(x + c, width) - V::load(f.mean + c), scale = V::load(f.scale + c);
        const V g = act.back(fma(centred, scale, V::load(f.bias + c)), load_some(grad + c, width));
        store_some(fma(g, scale, fma(centred, V::load(slope + c), V::load(offset + c))), dx + c, width);
      });
  });
}

#define PF_INSTANTIATE(T)                                                                     \
  template void norm_moments(const T*, int64_t, int64_t, const Moments&);                     \
  template void norm_forward(const NormArgs<T>&, const T*, int64_t, T*);                      \
  template void norm_sums(const NormArgs<T>&, const T*, const T*, int64_t, double*, double*); \
  template void norm_backward(const NormArgs<T>&, const T*, const T*, int64_t, const T*, const T*, T*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace pf::cpu::PF_ISA
