// Gate dot product and Gram statistics: the two reductions every search step runs over whole activations.
#include "cpu/kernels/statistics.h"

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/vec.h"

namespace pf::cpu::PF_ISA {

namespace {

// Partial sums in T run over this many elements before they are added up in double: long enough to be free, short
// enough that the rounding error does not grow with the image.
constexpr int64_t dot_block = 4096;

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

// Rows are copied, less the pivot, into blocks that stay in cache whatever the memory format; their products are then
// those of every block with the blocks after it.
template <typename T>
void gram(const Pixels<T>& x, const T* pivot, int64_t first, int64_t last, double* sum, double* gram, T* scratch) {
  const int64_t c = x.channels, n = blocks(c);
  T* packed = scratch;
  T* tile = scratch + n * lanes * gram_rows;  // [block][16][16]
  for (int64_t r0 = first; r0 < last; r0 += gram_rows) {
    const int64_t rows = r0 + gram_rows < last ? gram_rows : last - r0, size = rows * lanes;
    const bool dense = x.stride_c == 1 && x.stride_p == c && (x.images == 1 || x.stride_n == x.pixels * c);
    if (dense) {
      pack(x.data + r0 * c, rows, c, pivot, packed, size);
    } else {
      for (int64_t i = 0; i < n * lanes; ++i)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (r0 + r) / x.pixels * x.stride_n + (r0 + r) % x.pixels * x.stride_p + i * x.stride_c;
          packed[in_block(i, size) + r * lanes] = i < c ? x.data[at] - pivot[i] : T(0);
        }
    }
    add_gram(packed, rows, c, sum, gram, tile);
  }
}

// w C w^T of each row w, of which panel holds the upper triangle by blocks, those off the diagonal doubled; and w mean.
template <typename T>
void quadratic(const T* w, int64_t rows, int64_t n, const double* mean, const double* panel, double* mean_out,
               double* out, double* scratch) {
  const int64_t size = rows * lanes;
  double* a = scratch;
  double* tile = a + blocks(n) * size;
  double* sums = tile + size;  // a sum for each lane: nothing waits for the sum before it
  for (int64_t r = 0; r < rows; ++r, w += n) {
    double part[lanes] = {};
    for (int64_t b = 0; b < blocks(n); ++b) {
      double* to = a + b * size + r * lanes;
      const int64_t width = n - b * lanes < lanes ? n - b * lanes : lanes;
      for (int64_t l = 0; l < width; ++l) to[l] = static_cast<double>(w[b * lanes + l]);
      for (int64_t l = width; l < lanes; ++l) to[l] = 0;
      for (int64_t l = 0; l < lanes; ++l) part[l] += to[l] * mean[b * lanes + l];
    }
    mean_out[r] = 0;
    for (int64_t l = 0; l < lanes; ++l) mean_out[r] += part[l];
  }
  for (int64_t i = 0; i < size; ++i) sums[i] = 0;
  for (int64_t b = 0; b < blocks(n); ++b) {
    const int64_t k = (b + 1) * lanes < n ? (b + 1) * lanes : n;
    product<double>(rows, 1, {a, size, panel + b * n * lanes, 0, k, tile, 0, Out::store});
    for (int64_t i = 0; i < size; ++i) sums[i] += tile[i] * a[b * size + i];
  }
  for (int64_t r = 0; r < rows; ++r) {
    out[r] = 0;
    for (int64_t l = 0; l < lanes; ++l) out[r] += sums[r * lanes + l];
  }
}

template double dot(const float*, const float*, int64_t);
template double dot(const double*, const double*, int64_t);
template void gram(const Pixels<float>&, const float*, int64_t, int64_t, double*, double*, float*);
template void gram(const Pixels<double>&, const double*, int64_t, int64_t, double*, double*, double*);
template void quadratic(const float*, int64_t, int64_t, const double*, const double*, double*, double*, double*);
template void quadratic(const double*, int64_t, int64_t, const double*, const double*, double*, double*, double*);

}  // namespace pf::cpu::PF_ISA
