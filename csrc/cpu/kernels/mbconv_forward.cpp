// Forward passes of a fused MBConv: expand -> depthwise into d, then d -> project into y, or into a gate gradient.
#include "cpu/kernels/activation.h"
#include "cpu/kernels/depthwise.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/mbconv.h"
#include "cpu/kernels/rows.h"

namespace pf::cpu::PF_ISA {

namespace {

// Rows [first, last) of the expanded image after its activation, for `count` blocks from `block`, into buffers with
// kernel / 2 columns of zeros (left as they are) on both sides.
template <typename T>
void expanded_rows(const MBConvArgs<T>& f, int64_t image, const T* packed, int64_t packed_block, int64_t block,
                   int64_t count, int64_t first, int64_t last, T* buffer, int64_t buffer_block) {
  const int64_t pad = f.kernel / 2, row_size = (f.w + 2 * pad) * lanes;
  for (int64_t y = first; y < last; ++y) {
    T* row = buffer + (y - first) * row_size + pad * lanes;
    if (!f.expand) {
      for (int64_t b = 0; b < count; ++b) {
        const int64_t c = (block + b) * lanes, n = f.ci - c < lanes ? f.ci - c : lanes;
        const T* x = f.x + ((image * f.h + y) * f.w) * f.ci + c;
        for (int64_t i = 0; i < f.w; ++i, x += f.ci)
          for (int64_t j = 0; j < lanes; ++j) row[b * buffer_block + i * lanes + j] = j < n ? x[j] : T(0);
      }
      continue;
    }
    product<T>(f.w, count,
               {packed + y * f.w * lanes, packed_block, f.expand_in + block * f.ci * lanes, f.ci * lanes, f.ci, row,
                buffer_block, Out::clamp, f.expand_bias + block * lanes, f.low, f.high});
    if (f.activation == ActivationForm::clamp) continue;
    with_activation<T>(f, [&](auto act) {
      for (int64_t b = 0; b < count; ++b)
        for (int64_t i = 0; i < f.w * lanes; i += Vec<T>::width) {
          T* p = row + b * buffer_block + i;
          act.value(Vec<T>::load(p)).store(p);
        }
    });
  }
}

template <typename T>
void depthwise_rows(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* buffer, int64_t buffer_first,
                    const T* taps, T* out) {
  const int64_t k = f.kernel, pad = k / 2, row_size = (f.w + 2 * pad) * lanes;
  for (int64_t y = first; y < last; ++y) {
    const int64_t top = y * f.stride - pad, from = top < 0 ? -top : 0, to = top + k > f.h ? f.h - top : k;
    const T* in = buffer + (top + from - buffer_first) * row_size;
    const T* w = taps + from * k * lanes;
    T* row = out + (y - first) * f.wo * lanes;
    const auto run = [&](auto size) {
      constexpr int K = decltype(size)::value;
      if (f.stride == 1)
        depthwise_row<T, K, 1>(f.wo, row, lanes, in, row_size, to - from, w);
      else
        depthwise_row<T, K, 2>(f.wo, row, lanes, in, row_size, to - from, w);
    };
    if (k == 3) run(std::integral_constant<int, 3>());
    if (k == 5) run(std::integral_constant<int, 5>());
    if (k == 7) run(std::integral_constant<int, 7>());
  }
}

// z = act(BN2(d)) for all blocks of a tile of pixels.
template <typename T>
void activate(const MBConvArgs<T>& f, const T* d, int64_t d_block, int64_t pixels, T* z) {
  using V = Vec<T>;
  with_activation<T>(f, [&](auto act) {
    for (int64_t b = 0; b < blocks(f.ch); ++b, d += d_block, z += pixels * lanes)
      for (int64_t v = 0; v < lanes; v += V::width) {
        const int64_t c = b * lanes + v;
        const V mean = V::load(f.mean2 + c), scale = V::load(f.scale2 + c), bias = V::load(f.bias2 + c);
        for (int64_t p = 0; p < pixels; ++p)
          act.value(fma(V::load(d + p * lanes + v) - mean, scale, bias)).store(z + p * lanes + v);
      }
  });
}

// Runs body(first pixel, pixels, tile of y) over tiles of the project product.
template <typename T, typename Body>
void projected(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, T* scratch,
               Body body) {
  const int64_t most = project_pixels(f);
  T* z = scratch;
  T* y = scratch + most * lanes * blocks(f.ch);
  for (int64_t p = first; p < last; p += most) {
    const int64_t n = p + most < last ? most : last - p;
    activate(f, d + p * lanes, d_block, n, z);
    const int64_t after = last - p - n < most ? last - p - n : most;
    Ahead<T> ahead = {d + (p + n) * lanes, d_block, after, after * blocks(f.ch)};
    ProductArgs<T> project = {z, n * lanes, f.project_in, f.ch * lanes, f.ch, y, n * lanes, Out::store};
    project.ahead = &ahead;
    product<T>(n, blocks(f.co), project);
    body(p, n, y);
  }
}

}  // namespace

template <typename T>
void expand_depthwise(const MBConvArgs<T>& f, const ForwardUnit& unit, T* d, int64_t d_block, Moments* moments,
                      T* scratch) {
  const int64_t k = f.kernel, s = f.stride, pad = k / 2, row_size = (f.w + 2 * pad) * lanes;
  const auto top = [&](int64_t y) { return y * s - pad < 0 ? 0 : y * s - pad; };
  const auto bottom = [&](int64_t y) { return y * s - pad + k > f.h ? f.h : y * s - pad + k; };  // one past the last
  const int64_t image_size = f.h * f.w, packed_block = unit.images * image_size * lanes;
  T* packed = scratch;
  T* buffer = scratch + blocks(f.ci) * packed_block;
  const int64_t buffer_block = forward_buffer(f);
  zero(buffer, group * buffer_block);
  if (f.expand) {
    const int64_t y0 = top(unit.row), y1 = bottom(unit.row + unit.rows - 1);
    for (int64_t i = 0; i < unit.images; ++i)
      pack(f.x + ((unit.image + i) * f.h + y0) * f.w * f.ci, (y1 - y0) * f.w, f.ci, f.center,
           packed + (i * image_size + y0 * f.w) * lanes, packed_block);
  }
  const int64_t strip = forward_rows(f), end = unit.row + unit.rows;
  for (int64_t b = unit.block; b < unit.block + unit.blocks; b += group) {
    const int64_t count = b + group < unit.block + unit.blocks ? group : unit.block + unit.blocks - b;
    double seen = moments != nullptr ? moments->count : 0;
    for (int64_t i = 0; i < unit.images; ++i) {
      int64_t have_first = 0, have_last = 0;  // rows of the expanded image that the buffer holds
      for (int64_t y = unit.row; y < end; y += strip) {
        const int64_t y_end = y + strip < end ? y + strip : end, need_first = top(y), need_last = bottom(y_end - 1);
        const int64_t kept = have_last > need_first ? have_last - need_first : 0;
        for (int64_t j = 0; j < count; ++j)
          std::memmove(buffer + j * buffer_block, buffer + j * buffer_block + (need_first - have_first) * row_size,
                       static_cast<size_t>(kept * row_size) * sizeof(T));
        expanded_rows(f, unit.image + i, packed + i * image_size * lanes, packed_block, b, count, need_first + kept,
                      need_last, buffer + kept * row_size, buffer_block);
        have_first = need_first;
        have_last = need_last;
        for (int64_t j = 0; j < count; ++j) {
          T* out = d + (b + j) * d_block + ((i * f.ho + y) * f.wo) * lanes;
          depthwise_rows(f, y, y_end, buffer + j * buffer_block, need_first, f.taps + (b + j) * k * k * lanes, out);
          if (moments != nullptr)
            add_moments(out, (y_end - y) * f.wo, seen, moments->mean + (b + j) * lanes, moments->m2 + (b + j) * lanes);
        }
        seen += static_cast<double>((y_end - y) * f.wo);
      }
    }
  }
  if (moments != nullptr) moments->count += static_cast<double>(unit.images * unit.rows * f.wo);
}

template <typename T>
void project(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, T* y, Moments* moments,
             T* scratch) {
  projected(f, first, last, d, d_block, scratch, [&](int64_t p, int64_t n, const T* tile) {
    if (moments != nullptr) {
      for (int64_t b = 0; b < blocks(f.co); ++b)
        add_moments(tile + b * n * lanes, n, moments->count, moments->mean + b * lanes, moments->m2 + b * lanes);
      moments->count += static_cast<double>(n);
    }
    unpack(tile, n * lanes, n, f.co, f.project_bias, y + p * f.co);
  });
}

template <typename T>
void probe(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, Moments& moments,
           double* sum_g, double* sum_yg, T* scratch) {
  using V = Vec<T>;
  projected(f, first, last, d, d_block, scratch, [&](int64_t p, int64_t n, const T* tile) {
    for (int64_t b = 0; b < blocks(f.co); ++b)
      add_moments(tile + b * n * lanes, n, moments.count, moments.mean + b * lanes, moments.m2 + b * lanes);
    moments.count += static_cast<double>(n);
    for_vectors<T>(f.co, [&](int64_t c, int width) {
      const T* y = tile + in_block(c, n * lanes);
      const T* g = f.grad + p * f.co + c;
      const V pivot = V::load(y);
      V sum = V::zero(), product = V::zero();
      for (int64_t i = 0; i < n; ++i) {
        const V gv = load_some(g + i * f.co, width);
        sum = sum + gv;
        product = fma(V::load(y + i * lanes) - pivot, gv, product);
      }
      for (int j = 0; j < width; ++j) {
        sum_g[c + j] += static_cast<double>(sum.v[j]);
        sum_yg[c + j] +=
            static_cast<double>(product.v[j]) + static_cast<double>(pivot.v[j]) * static_cast<double>(sum.v[j]);
      }
    });
  });
}

template <typename T>
void affine(const T* y, int64_t pixels, int64_t c, const T* mean, const T* scale, const T* bias, const T* add, T* out) {
  using V = Vec<T>;
  for (int64_t p = 0; p < pixels; ++p, y += c, out += c) {
    for_vectors<T>(c, [&](int64_t i, int n) __attribute__((always_inline)) {
      V v = fma(load_some(y + i, n) - V::load(mean + i), V::load(scale + i), V::load(bias + i));
      if (add != nullptr) v = v + load_some(add + i, n);
      store_some(v, out + i, n);
    });
    if (add != nullptr) add += c;
  }
}

#define PF_INSTANTIATE(T)                                                                                         \
  template void expand_depthwise(const MBConvArgs<T>&, const ForwardUnit&, T*, int64_t, Moments*, T*);            \
  template void project(const MBConvArgs<T>&, int64_t, int64_t, const T*, int64_t, T*, Moments*, T*);             \
  template void probe(const MBConvArgs<T>&, int64_t, int64_t, const T*, int64_t, Moments&, double*, double*, T*); \
  template void affine(const T*, int64_t, int64_t, const T*, const T*, const T*, const T*, T*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace pf::cpu::PF_ISA
