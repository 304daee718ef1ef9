// Gate dot product and Gram statistics: the two reductions every search step runs over whole activations.
#include "kernels/statistics.h"

#include "kernels/vec.h"

namespace pf::cpu::PF_ISA {

namespace {

// Partial sums in T run over this many elements before they are added up in double: long enough to be free, short
// enough that the rounding error does not grow with the image.
constexpr int64_t dot_block = 4096;
constexpr int64_t gram_rows = 32;

}  // namespace

template <typename T>
double dot(const T* a, const T* b, int64_t n) {
  using V = Vec<T>;
  constexpr int w = V::width;
  double total = 0;
  for (int64_t start = 0; start < n; start += dot_block) {
    const int64_t end = start + dot_block < n ? start + dot_block : n;
    V s0 = V::zero(), s1 = V::zero(), s2 = V::zero(), s3 = V::zero();
    int64_t i = start;
    for (; i + 4 * w <= end; i += 4 * w) {
      s0 = fma(V::load(a + i), V::load(b + i), s0);
      s1 = fma(V::load(a + i + w), V::load(b + i + w), s1);
      s2 = fma(V::load(a + i + 2 * w), V::load(b + i + 2 * w), s2);
      s3 = fma(V::load(a + i + 3 * w), V::load(b + i + 3 * w), s3);
    }
    for (; i + w <= end; i += w) s0 = fma(V::load(a + i), V::load(b + i), s0);
    T tail = ((s0 + s1) + (s2 + s3)).sum();
    for (; i < end; ++i) tail += a[i] * b[i];
    total += static_cast<double>(tail);
  }
  return total;
}

// Rows are copied, less the pivot, into a padded block that stays in cache whatever the memory format; the block's
// upper triangle is then a small symmetric rank-k update with a register tile of 4 rows by 2 vectors.
template <typename T>
void gram(const Pixels<T>& x, const T* pivot, int64_t first, int64_t last, double* sum, double* gram, T* scratch) {
  using V = Vec<T>;
  constexpr int w = V::width;
  const int64_t c = x.channels, ld = (c + 2 * w - 1) / (2 * w) * (2 * w);
  T* block = scratch;                  // gram_rows x ld
  T* part = scratch + gram_rows * ld;  // 4 x 2w
  for (int64_t r0 = first; r0 < last; r0 += gram_rows) {
    const int64_t rows = r0 + gram_rows < last ? gram_rows : last - r0;
    for (int64_t r = 0; r < rows; ++r) {
      const T* src = x.data + (r0 + r) / x.pixels * x.stride_n + (r0 + r) % x.pixels * x.stride_p;
      T* dst = block + r * ld;
      if (x.stride_c == 1) {
        for (int64_t i = 0; i < c; ++i) dst[i] = src[i] - pivot[i];
      } else {
        for (int64_t i = 0; i < c; ++i) dst[i] = src[i * x.stride_c] - pivot[i];
      }
      for (int64_t i = c; i < ld; ++i) dst[i] = 0;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < c; ++j) sum[j] += static_cast<double>(block[r * ld + j]);
    for (int64_t j = 0; j < ld; j += 2 * w) {
      const int64_t i_end = j + 2 * w < c ? j + 2 * w : c;  // the upper triangle: i <= j of the tile's last column
      for (int64_t i = 0; i < i_end; i += 4) {
        V t00 = V::zero(), t01 = t00, t10 = t00, t11 = t00, t20 = t00, t21 = t00, t30 = t00, t31 = t00;
        for (int64_t r = 0; r < rows; ++r) {
          const T* row = block + r * ld;  // ld is a multiple of 4, so that row[i + 3] exists
          const V b0 = V::load(row + j), b1 = V::load(row + j + w);
          const V a0 = V::broadcast(row[i]), a1 = V::broadcast(row[i + 1]);
          const V a2 = V::broadcast(row[i + 2]), a3 = V::broadcast(row[i + 3]);
          t00 = fma(a0, b0, t00), t01 = fma(a0, b1, t01), t10 = fma(a1, b0, t10), t11 = fma(a1, b1, t11);
          t20 = fma(a2, b0, t20), t21 = fma(a2, b1, t21), t30 = fma(a3, b0, t30), t31 = fma(a3, b1, t31);
        }
        t00.store(part), t01.store(part + w), t10.store(part + 2 * w), t11.store(part + 3 * w);
        t20.store(part + 4 * w), t21.store(part + 5 * w), t30.store(part + 6 * w), t31.store(part + 7 * w);
        for (int64_t ii = 0; ii < 4 && i + ii < c; ++ii)
          for (int64_t jj = 0; jj < 2 * w && j + jj < c; ++jj)
            gram[(i + ii) * c + j + jj] += static_cast<double>(part[ii * 2 * w + jj]);
      }
    }
  }
}

template double dot(const float*, const float*, int64_t);
template double dot(const double*, const double*, int64_t);
template void gram(const Pixels<float>&, const float*, int64_t, int64_t, double*, double*, float*);
template void gram(const Pixels<double>&, const double*, int64_t, int64_t, double*, double*, double*);

}  // namespace pf::cpu::PF_ISA
