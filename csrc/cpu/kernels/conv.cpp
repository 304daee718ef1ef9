// Passes of a dense convolution with its batch norm and activation. Windows are gathered tile by tile into blocks, and
// gathered again by each pass: what is written is the output alone.
#include "cpu/kernels/conv.h"

#include "cpu/kernels/activation.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/rows.h"

namespace pf::cpu::PF_ISA {

namespace {

template <typename T>
PF_INLINE void copy(const T* from, int64_t n, T* to) {
  for_vectors<T>(n, [&](int64_t i, int width)
                        __attribute__((always_inline)) { store_some(load_some(from + i, width), to + i, width); });
}

// Windows under the output rows [first, first + rows), a row being (image, y), less the center, as [block][pixel][16].
template <typename T>
void windows(const ConvArgs<T>& f, int64_t first, int64_t rows, T* out, T* line) {
  using V = Vec<T>;
  const int64_t k = f.kernel, pad = k / 2, run = k * f.ci, n = blocks(depth(f)), wide = n * lanes;
  const int64_t block_size = rows * f.wo * lanes;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t image = (first + r) / f.ho, top = (first + r) % f.ho * f.stride - pad;
    zero(line, f.wo * wide);
    for (int64_t ky = 0; ky < k; ++ky) {
      if (top + ky < 0 || top + ky >= f.h) continue;
      const T* x = f.x + (image * f.h + top + ky) * f.w * f.ci;
      for (int64_t i = 0; i < f.wo; ++i) {
        const int64_t left = i * f.stride - pad, from = left < 0 ? -left : 0, to = left + k > f.w ? f.w - left : k;
        T* window = line + i * wide + ky * run;
        if (from == 0 && to == k)
          copy(x + left * f.ci, run, window);
        else if (to > from)
          copy(x + (left + from) * f.ci, (to - from) * f.ci, window + from * f.ci);
      }
    }
    for (int64_t i = 0; i < f.wo; ++i)
      for (int64_t v = 0; v < wide; v += V::width)
        (V::load(line + i * wide + v) - V::load(f.center + v))
            .store(out + in_block(v, block_size) + (r * f.wo + i) * lanes);
  }
}

// Runs body(first pixel, pixels, windows, rest of scratch) over tiles of the output rows [first, last).
template <typename T, typename Body>
PF_INLINE void for_tiles(const ConvArgs<T>& f, int64_t first, int64_t last, T* scratch, Body body) {
  const int64_t most = conv_rows(f), wide = blocks(depth(f)) * lanes;
  T *line = scratch, *packed = line + f.wo * wide, *rest = packed + most * f.wo * wide;
  for (int64_t row = first; row < last; row += most) {
    const int64_t rows = row + most < last ? most : last - row;
    windows(f, row, rows, packed, line);
    body(row * f.wo, rows * f.wo, static_cast<const T*>(packed), rest);
  }
}

template <typename T>
void expand(const ConvArgs<T>& f, int64_t pixels, const T* packed, T* u) {
  const int64_t size = pixels * lanes;
  product<T>(pixels, blocks(f.co),
             {packed, size, f.weight, depth(f) * lanes, depth(f), u, size, Out::clamp, f.bias, f.low, f.high});
}

}  // namespace

template <typename T>
void conv_gram(const ConvArgs<T>& f, int64_t first, int64_t last, double* sum, double* gram, T* scratch) {
  for_tiles(f, first, last, scratch, [&](int64_t, int64_t pixels, const T* packed, T* rest) {
    add_gram(packed, pixels, depth(f), sum, gram, rest);
  });
}

template <typename T>
void conv_forward(const ConvArgs<T>& f, int64_t first, int64_t last, T* out, T* scratch) {
  for_tiles(f, first, last, scratch, [&](int64_t pixel, int64_t pixels, const T* packed, T* u) {
    expand(f, pixels, packed, u);
    if (f.activation != ActivationForm::clamp)
      with_activation<T>(f, [&](auto act) {
        for (int64_t i = 0; i < blocks(f.co) * pixels * lanes; i += Vec<T>::width)
          act.value(Vec<T>::load(u + i)).store(u + i);
      });
    unpack(u, pixels * lanes, pixels, f.co, static_cast<const T*>(nullptr), out + pixel * f.co);
  });
}

template <typename T>
void conv_backward(const ConvArgs<T>& f, int64_t first, int64_t last, const T* grad, double* sum_q, T* dweight,
                   T* scratch) {
  using V = Vec<T>;
  for_tiles(f, first, last, scratch, [&](int64_t pixel, int64_t pixels, const T* packed, T* u) {
    const int64_t size = pixels * lanes, k = depth(f);
    expand(f, pixels, packed, u);
    with_activation<T>(f, [&](auto act) {
      for_vectors<T>(f.co, [&](int64_t c, int width) __attribute__((always_inline)) {
        const T* g = grad + pixel * f.co + c;
        T* q = u + in_block(c, size);
        constexpr int64_t run = 32;  // short enough that sums in T lose nothing
        for (int64_t start = 0; start < pixels; start += run) {
          V s = V::zero();
          for (int64_t i = start; i < (start + run < pixels ? start + run : pixels); ++i) {
            const V back = act.back(V::load(q + i * lanes), load_some(g + i * f.co, width));
            back.store(q + i * lanes);
            s = s + back;
          }
          for (int j = 0; j < width; ++j) sum_q[c + j] += static_cast<double>(s.v[j]);
        }
      });
    });
    for (int64_t c = 0; c < k; c += lanes)
      product<T, true>(k - c < lanes ? k - c : lanes, blocks(f.co),
                       {packed + c * pixels, 0, u, size, pixels, dweight + c * lanes, k * lanes, Out::add});
  });
}

#define PF_INSTANTIATE(T)                                                              \
  template void conv_gram(const ConvArgs<T>&, int64_t, int64_t, double*, double*, T*); \
  template void conv_forward(const ConvArgs<T>&, int64_t, int64_t, T*, T*);            \
  template void conv_backward(const ConvArgs<T>&, int64_t, int64_t, const T*, double*, T*, T*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace pf::cpu::PF_ISA
