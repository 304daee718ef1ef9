// Backward passes of a fused MBConv: G -> dz (with project's gradient), then dz -> dx (with the others).
#include "cpu/kernels/activation.h"
#include "cpu/kernels/depthwise.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/mbconv.h"
#include "cpu/kernels/rows.h"

namespace pf::cpu::PF_ISA {

namespace {

template <typename Body>
void with_taps(int64_t k, Body body) {
  switch (k) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 5:
      return body(std::integral_constant<int, 5>());
    case 7:
      return body(std::integral_constant<int, 7>());
  }
}

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// The part of dD that a strip of one image reaches, with columns of zeros around it.
template <typename T>
struct Reach {
  int64_t first, last;  // rows of the output
  int64_t left;         // columns of zeros on the left
  int64_t columns;

  Reach(const MBConvArgs<T>& f, int64_t row, int64_t rows) {
    const int64_t pad = f.kernel / 2;
    first = -floor_div(-(row + pad - f.kernel + 1), f.stride);
    last = floor_div(row + rows - 1 + pad, f.stride) + 1;
    if (first < 0) first = 0;
    if (last > f.ho) last = f.ho;
    left = pad;
    columns = dd_columns(f);
  }
};

template <typename T>
void load_dd(const MBConvArgs<T>& f, const Reach<T>& reach, int64_t block, const T* d, const T* dz, T* out) {
  using V = Vec<T>;
  for (int64_t y = reach.first; y < reach.last; ++y) {
    T* row = out + (y - reach.first) * reach.columns * lanes;
    for (int64_t i = 0; i < reach.left * lanes; ++i) row[i] = 0;
    for (int64_t i = (reach.left + f.wo) * lanes; i < reach.columns * lanes; ++i) row[i] = 0;
    row += reach.left * lanes;
    for (int64_t v = 0; v < lanes; v += V::width) {
      const int64_t c = block * lanes + v;
      const V a = V::load(f.dd_dz + c), b = V::load(f.dd_d + c), e = V::load(f.dd_bias + c), m = V::load(f.mean2 + c);
      for (int64_t x = 0; x < f.wo; ++x) {
        const int64_t at = (y * f.wo + x) * lanes + v;
        fma(a, V::load(dz + at), fma(b, V::load(d + at) - m, e)).store(row + x * lanes + v);
      }
    }
  }
}

// One phase of the stride: the input columns x with (x + pad) % stride == rest, and the taps that reach them.
struct Phase {
  int64_t rest, x, pixels, taps, offset;  // x: the first column; offset: of its last tap's output column

  template <typename T>
  Phase(const MBConvArgs<T>& f, int64_t r) : rest(r) {
    const int64_t pad = f.kernel / 2;
    x = (r + f.stride * f.kernel - pad) % f.stride;
    pixels = x < f.w ? (f.w - x + f.stride - 1) / f.stride : 0;
    taps = (f.kernel - r + f.stride - 1) / f.stride;
    offset = floor_div(x + pad - r, f.stride) - (taps - 1);
  }
};

// q before its mask: the depthwise convolution of dD with the taps turned round, one phase at a time.
template <typename T>
void input_gradient(const MBConvArgs<T>& f, const Reach<T>& reach, int64_t row, int64_t rows, const T* dd,
                    const T* taps_back, T* q) {
  const int64_t pad = f.kernel / 2, s = f.stride;
  for (int64_t y = row; y < row + rows; ++y) {
    const int64_t rest = (y + pad) % s, n = (f.kernel - rest + s - 1) / s;
    const int64_t low = (y + pad - rest) / s - (n - 1);  // output row of the first turned tap
    const int64_t from = low < reach.first ? reach.first - low : 0, to = low + n > reach.last ? reach.last - low : n;
    const T* taps = taps_back + (rest == 0 ? 0 : (f.kernel + 1) / 2 * f.kernel) * lanes;
    for (int64_t r = 0; r < s; ++r) {
      const Phase phase(f, r);
      T* out = q + ((y - row) * f.w + phase.x) * lanes;
      const T* in = dd + ((low + from - reach.first) * reach.columns + reach.left + phase.offset) * lanes;
      with_taps(phase.taps, [&](auto k) {
        constexpr int K = decltype(k)::value;
        depthwise_row<T, K, 1>(phase.pixels, out, s * lanes, in, reach.columns * lanes, to > from ? to - from : 0,
                               taps + from * K * lanes);
      });
      taps += n * phase.taps * lanes;
    }
  }
}

// grad[ky][kx][16], turned round by the caller's order of taps_back: adds the strip's share.
template <typename T>
void taps_gradient(const MBConvArgs<T>& f, const Reach<T>& reach, int64_t row, int64_t rows, const T* h, const T* dd,
                   double* grad, int64_t grad_step) {
  const int64_t pad = f.kernel / 2, s = f.stride;
  int64_t index = 0;
  for (int64_t rest = 0; rest < s; ++rest) {
    const int64_t n = (f.kernel - rest + s - 1) / s;
    int64_t y0 = row;  // the first row of this phase
    while ((y0 + pad) % s != rest) ++y0;
    for (int64_t r = 0; r < s; ++r) {
      const Phase phase(f, r);
      for (int64_t j = 0; j < n; ++j, index += phase.taps) {
        const int64_t out0 = (y0 + pad - rest) / s - (n - 1) + j;  // output row that turned tap j takes from y0
        const int64_t skip = out0 < reach.first ? reach.first - out0 : 0;
        int64_t count = y0 < row + rows ? (row + rows - y0 + s - 1) / s : 0;
        if (out0 + count > reach.last) count = reach.last - out0;
        if (count <= skip) continue;
        const T* a = h + ((y0 + skip * s - row) * f.w + phase.x) * lanes;
        const T* b = dd + ((out0 + skip - reach.first) * reach.columns + reach.left + phase.offset) * lanes;
        with_taps(phase.taps, [&](auto k) {
          depthwise_taps<T, decltype(k)::value>(phase.pixels, count - skip, a, s * lanes, s * f.w * lanes, b,
                                                reach.columns * lanes, grad + index * grad_step, grad_step);
        });
      }
    }
  }
}

// q of one block of `size` elements times the derivative at h, and its sums.
template <typename T>
void mask_gradient(const MBConvArgs<T>& f, int64_t block, int64_t size, const T* h, T* q, const ExpandSums<T>& sums) {
  using V = Vec<T>;
  with_activation<T>(f, [&](auto act) {
    for (int64_t v = 0; v < lanes; v += V::width) {
      const V bias = V::load(f.expand_bias + block * lanes + v);
      V s = V::zero(), t = V::zero();
      for (int64_t i = v; i < size; i += lanes) {
        const V u = V::load(h + i), g = act.back(u, V::load(q + i));
        g.store(q + i);
        s = s + g;
        t = fma(g, u - bias, t);
      }
      for (int l = 0; l < V::width; ++l) {
        sums.q[block * lanes + v + l] += static_cast<double>(s.v[l]);
        sums.qu[block * lanes + v + l] += static_cast<double>(t.v[l]);
      }
    }
  });
}

}  // namespace

template <typename T>
void pair_sums(const T* g, const T* y, int64_t pixels, int64_t c, const T* mean, double* sum_g, double* sum_gy) {
  using V = Vec<T>;
  constexpr int64_t run = 128;
  for (int64_t start = 0; start < pixels; start += run) {
    const int64_t n = start + run < pixels ? run : pixels - start;
    for_vectors<T>(c, [&](int64_t i, int width) {
      const V m = V::load(mean + i);
      V s = V::zero(), t = V::zero();
      for (int64_t p = start; p < start + n; ++p) {
        const V gv = load_some(g + p * c + i, width);
        s = s + gv;
        t = fma(gv, load_some(y + p * c + i, width) - m, t);
      }
      for (int j = 0; j < width; ++j) {
        sum_g[i + j] += static_cast<double>(s.v[j]);
        sum_gy[i + j] += static_cast<double>(t.v[j]);
      }
    });
  }
}

template <typename T>
void backward_project(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t wide_block, T* dz,
                      double* sum_dz, double* sum_dzd, T* dproject, T* scratch) {
  using V = Vec<T>;
  constexpr int w = V::width;
  for (int64_t p = first; p < last; p += backward_pixels) {
    const int64_t n = p + backward_pixels < last ? backward_pixels : last - p;
    T* dy = scratch;
    T* z = scratch + blocks(f.co) * n * lanes;
    for (int64_t i = 0; i < n; ++i)
      for_vectors<T>(f.co, [&](int64_t c, int width) __attribute__((always_inline)) {
        const V g = load_some(f.grad + (p + i) * f.co + c, width), y = load_some(f.y + (p + i) * f.co + c, width);
        const V narrow = fma(V::load(f.dy_y + c), y - V::load(f.mean3 + c), V::load(f.dy_bias + c));
        fma(V::load(f.dy_grad + c), g, narrow).store(dy + in_block(c, n * lanes) + i * lanes);
      });
    for (int64_t b = 0; b < blocks(f.ch); b += group) {
      const int64_t count = b + group < blocks(f.ch) ? group : blocks(f.ch) - b;
      Ahead<T> ahead = {d + b * wide_block + p * lanes, wide_block, n, n * count};
      ProductArgs<T> back = {dy,           n * lanes, f.project_out + b * f.co * lanes,
                             f.co * lanes, f.co,      dz + b * wide_block + p * lanes,
                             wide_block,   Out::store};
      back.ahead = &ahead;
      product<T>(n, count, back);
      with_activation<T>(f, [&](auto act) {
        for (int64_t j = 0; j < count; ++j)
          for (int64_t v = 0; v < lanes; v += w) {
            const int64_t c = (b + j) * lanes + v;
            const V mean = V::load(f.mean2 + c), scale = V::load(f.scale2 + c), bias = V::load(f.bias2 + c);
            const T* dp = d + (b + j) * wide_block + p * lanes + v;
            T* gp = dz + (b + j) * wide_block + p * lanes + v;
            T* zp = z + j * n * lanes + v;
            V s = V::zero(), t = V::zero();
            for (int64_t i = 0; i < n; ++i) {
              const V centered = V::load(dp + i * lanes) - mean, u = fma(centered, scale, bias);
              const V g = act.back(u, V::load(gp + i * lanes));
              if (dproject != nullptr) act.value(u).store(zp + i * lanes);
              g.store(gp + i * lanes);
              s = s + g;
              t = fma(g, centered, t);
            }
            for (int l = 0; l < w; ++l) {
              sum_dz[c + l] += static_cast<double>(s.v[l]);
              sum_dzd[c + l] += static_cast<double>(t.v[l]);
            }
          }
      });
      if (dproject == nullptr) continue;
      for (int64_t c = 0; c < f.co; c += lanes)
        product<T, true>(f.co - c < lanes ? f.co - c : lanes, count,
                         {dy + c * n, 0, z, n * lanes, n, dproject + (b * f.co + c) * lanes, f.co * lanes, Out::add});
    }
  }
}

template <typename T>
void backward_expand(const MBConvArgs<T>& f, const InputStrip& strip, const T* d, const T* dz, int64_t wide_block,
                     T* dx, const ExpandSums<T>& sums, T* scratch) {
  using V = Vec<T>;
  constexpr int w = V::width;
  const int64_t image_pixels = strip.rows * f.w, pixels = strip.images * image_pixels, size = pixels * lanes;
  const int64_t taps = f.kernel * f.kernel;
  const Reach<T> reach(f, strip.row, strip.rows);
  T* packed = scratch;
  T* dx_tile = packed + blocks(f.ci) * size;
  T* h = dx_tile + blocks(f.ci) * size;  // the expanded strip; its pre-activation where the derivative needs it
  T* q = h + group * size;
  T* value = q + group * size;  // the expanded strip of one image, where h is the pre-activation
  T* dd = value + group * size;
  const bool linear = f.activation == ActivationForm::clamp || !f.expand;
  for (int64_t i = 0; i < strip.images; ++i) {
    const T* x = f.x + ((strip.image + i) * f.h + strip.row) * f.w * f.ci;
    pack(x, image_pixels, f.ci, f.center, packed + i * image_pixels * lanes, size);
  }
  for (int64_t b = 0; b < blocks(f.ch); b += group) {
    const int64_t count = b + group < blocks(f.ch) ? group : blocks(f.ch) - b;
    T* expanded = f.expand ? h : packed + b * size;
    if (f.expand) {
      const int64_t reached = reach.last > reach.first ? reach.last - reach.first : 0;
      const int64_t rows = strip.images > 1 ? strip.images * f.ho : reached;
      const int64_t start = b * wide_block + ((strip.image * f.ho + reach.first) * f.wo) * lanes;
      Ahead<T> ahead = {d + start, wide_block, rows * f.wo, rows * f.wo * count, dz + start};
      ProductArgs<T> expand = {packed, size,       f.expand_in + b * f.ci * lanes, f.ci * lanes, f.ci,   h,
                               size,   Out::clamp, f.expand_bias + b * lanes,      f.low,        f.high, &ahead};
      product<T>(pixels, count, expand);
    }
    T* q_out = f.expand ? q : dx_tile + b * size;
    for (int64_t j = 0; j < count; ++j) {
      const T* hj = expanded + j * size;
      T* qj = q_out + j * size;
      if (!linear && sums.taps != nullptr) {
        with_activation<T>(f, [&](auto act) {
          for (int64_t i = 0; i < size; i += w) act.value(V::load(hj + i)).store(value + i);
        });
      }
      const T* vj = linear ? hj : value;
      for (int64_t i = 0; i < strip.images; ++i) {
        const int64_t offset = (b + j) * wide_block + (strip.image + i) * f.ho * f.wo * lanes;
        load_dd(f, reach, b + j, d + offset, dz + offset, dd);
        input_gradient(f, reach, strip.row, strip.rows, dd, f.taps_back + (b + j) * taps * lanes,
                       qj + i * image_pixels * lanes);
        if (sums.taps != nullptr)
          taps_gradient(f, reach, strip.row, strip.rows, vj + i * image_pixels * lanes, dd,
                        sums.taps + (b + j) * taps * lanes, lanes);
      }
      if (f.expand) mask_gradient(f, b + j, size, hj, qj, sums);
    }
    if (!f.expand) continue;
    if (sums.expand != nullptr)
      for (int64_t c = 0; c < f.ci; c += lanes)
        product<T, true>(
            f.ci - c < lanes ? f.ci - c : lanes, count,
            {packed + c * pixels, 0, q, size, pixels, sums.expand + (b * f.ci + c) * lanes, f.ci * lanes, Out::add});
    if (dx != nullptr)
      product<T>(pixels, blocks(f.ci),
                 {q, size, f.expand_out + b * lanes * lanes, blocks(f.ch) * lanes * lanes, count * lanes, dx_tile, size,
                  b == 0 ? Out::store : Out::add});
  }
  if (dx == nullptr) return;
  for (int64_t i = 0; i < strip.images; ++i)
    unpack(dx_tile + i * image_pixels * lanes, size, image_pixels, f.ci, static_cast<const T*>(nullptr),
           dx + ((strip.image + i) * f.h + strip.row) * f.w * f.ci);
}

// dx[pixel] += (x[pixel] - center) * correction + bias + add[pixel], correction given as [blocks(ci)][ci][16].
template <typename T>
void finish_dx(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* correction, const T* bias, const T* add,
               T* dx, T* scratch) {
  using V = Vec<T>;
  for (int64_t p = first; p < last; p += backward_pixels) {
    const int64_t n = p + backward_pixels < last ? backward_pixels : last - p, size = n * lanes;
    T* x = scratch;
    T* out = scratch + blocks(f.ci) * size;
    pack(f.x + p * f.ci, n, f.ci, f.center, x, size);
    product<T>(n, blocks(f.ci), {x, size, correction, f.ci * lanes, f.ci, out, size, Out::store});
    for (int64_t i = 0; i < n; ++i)
      for_vectors<T>(f.ci, [&](int64_t c, int width) __attribute__((always_inline)) {
        T* at = dx + (p + i) * f.ci + c;
        V v = V::load(out + in_block(c, size) + i * lanes) + V::load(bias + c);
        if (add != nullptr) v = v + load_some(add + (p + i) * f.ci + c, width);
        store_some(v + load_some(at, width), at, width);
      });
  }
}

#define PF_INSTANTIATE(T)                                                                                             \
  template void pair_sums(const T*, const T*, int64_t, int64_t, const T*, double*, double*);                          \
  template void backward_project(const MBConvArgs<T>&, int64_t, int64_t, const T*, int64_t, T*, double*, double*, T*, \
                                 T*);                                                                                 \
  template void backward_expand(const MBConvArgs<T>&, const InputStrip&, const T*, const T*, int64_t, T*,             \
                                const ExpandSums<T>&, T*);                                                            \
  template void finish_dx(const MBConvArgs<T>&, int64_t, int64_t, const T*, const T*, const T*, T*, T*);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)

}  // namespace pf::cpu::PF_ISA
