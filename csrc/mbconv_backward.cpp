// Backward of a fused MBConv over all images: the passes, and the corrections that close over small matrices
// (docs/performance.md has the formulas).
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "mbconv.h"
#include "memory.h"
#include "parallel.h"

namespace pf {
namespace {

using at::Tensor;
using cpu::blocks;
using cpu::lanes;

constexpr int64_t wanted_chunks = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Zeroed partial sums, one row per chunk of the work, added up in order.
template <typename S>
class Partial {
 public:
  Partial(int64_t chunks, int64_t n)
      : chunks_(chunks), n_(n), memory_(static_cast<size_t>(chunks * n + 1) * sizeof(S)) {
    at::parallel_for(0, chunks * n, 1 << 15, [&](int64_t begin, int64_t end) {
      std::fill(memory_.as<S>() + begin, memory_.as<S>() + end, S(0));
    });
  }
  S* part(int64_t i) { return n_ == 0 ? nullptr : memory_.as<S>() + i * n_; }
  const S* total() {
    S* sum = memory_.as<S>();
    at::parallel_for(0, n_, 1 << 13, [&](int64_t begin, int64_t end) {
      for (int64_t i = 1; i < chunks_; ++i)
        for (int64_t j = begin; j < end; ++j) sum[j] += sum[i * n_ + j];
    });
    return sum;
  }

 private:
  int64_t chunks_, n_;
  Workspace memory_;
};

// Large partial sums (those of a weight) in fewer chunks, one a thread at least: zeroing and adding them up should stay
// small.
int64_t chunks_for(int64_t pieces, int64_t bytes) {
  const int64_t affordable = (4 << 20) / std::max<int64_t>(bytes, 1);
  return std::min(pieces, std::max<int64_t>(at::get_num_threads(), std::min(affordable, wanted_chunks)));
}

// The gradient of a parameter, filled from doubles.
template <typename T, typename Element>
Tensor gradient_like(const Tensor& parameter, Element element) {
  Tensor g = large_empty(parameter.sizes(), parameter.options());
  T* p = g.mutable_data_ptr<T>();
  const int64_t n = g.numel();
  at::parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) p[i] = static_cast<T>(element(i));
  });
  return g;
}

// Strips of the input, as many for each chunk of images as for the next; `single`: of one image each.
template <typename T>
std::vector<cpu::Strip> strips_of(const cpu::MBConv<T>& f, int64_t chunks, bool single) {
  std::vector<cpu::Strip> strips;
  const int64_t pixels = cpu::strip_pixels(f), size = f.h * f.w;
  if (f.images >= chunks && size <= pixels) {
    const int64_t share = ceil_div(f.images, chunks),
                  images = single ? 1 : ceil_div(share, ceil_div(share, pixels / size));
    for (int64_t i = 0; i < f.images; i += images) strips.push_back({i, std::min(images, f.images - i), 0, f.h});
    return strips;
  }
  const int64_t parts = std::min(std::max(ceil_div(size, pixels), ceil_div(chunks, f.images)), f.h);
  const int64_t rows = ceil_div(ceil_div(f.h, parts), f.stride) * f.stride;
  for (int64_t i = 0; i < f.images; ++i)
    for (int64_t y = 0; y < f.h; y += rows) strips.push_back({i, 1, y, std::min(rows, f.h - y)});
  return strips;
}

}  // namespace

template <typename T>
void Block<T>::pack_backward() {
  const T* wp = a.wp.const_data_ptr<T>();
  T* project_out = take(blocks(f.ch) * lanes * f.co);
  at::parallel_for(0, blocks(f.ch), 1 + 4096 / f.co, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t k = 0; k < f.co; ++k)
        std::copy_n(wp + k * f.ch + b * lanes, std::min(lanes, f.ch - b * lanes), project_out + (b * f.co + k) * lanes);
  });
  f.project_out = project_out;
  const int64_t k = f.kernel, s = f.stride;
  T* back = take(blocks(f.ch) * lanes * k * k);
  int64_t index = 0;
  for (int64_t ry = 0; ry < s; ++ry)
    for (int64_t rx = 0; rx < s; ++rx)
      for (int64_t ky = k - 1; ky >= 0; --ky)
        for (int64_t kx = k - 1; kx >= 0; --kx) {
          if (ky % s != ry || kx % s != rx) continue;
          for (int64_t b = 0; b < blocks(f.ch); ++b)
            std::copy_n(f.taps + (b * k * k + ky * k + kx) * lanes, lanes, back + (b * k * k + index) * lanes);
          ++index;
        }
  f.taps_back = back;
  if (!f.expand) return;
  const T* w1 = a.w1.const_data_ptr<T>();
  const int64_t depth = blocks(f.ch) * lanes;
  T* out = take(blocks(f.ci) * lanes * depth);
  at::parallel_for(0, blocks(f.ci), 1 + 4096 / f.ch, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t c = 0; c < f.ch; ++c) {
        const T scale = static_cast<T>(first.scale[c]);
        for (int64_t l = 0; l < std::min(lanes, f.ci - b * lanes); ++l)
          out[(b * depth + c) * lanes + l] = w1[c * f.ci + b * lanes + l] * scale;
      }
  });
  f.expand_out = out;
}

template <typename T>
std::vector<Tensor> Block<T>::backward(const Tensor& grad, const T* y, const T* d, const Tensor& dx, bool weights,
                                       bool shortcut) {
  pack_backward();
  const auto& kernels = cpu::kernels_for<T>();
  const int64_t n_in = pixels_in(), n_out = pixels_out(), wide = blocks(f.ch) * lanes, narrow = blocks(f.co) * lanes;
  const int64_t k2 = f.kernel * f.kernel;
  const double share_in =
      a.training ? 1.0 / static_cast<double>(n_in) : 0;  // statistics that are given pass no gradient
  const double share_out = a.training ? 1.0 / static_cast<double>(n_out) : 0;
  f.y = y;
  f.grad = grad.const_data_ptr<T>();

  // Third norm: dY as an affine of (G, y).
  f.mean3 = per_channel(third.mean);
  const int64_t sum_chunks = std::min<int64_t>(wanted_chunks, ceil_div(n_out, 256));
  Partial<double> sums3(sum_chunks, 2 * narrow);
  share_pieces(sum_chunks, [&](const auto& take) {
    for (int64_t i = take(); i >= 0; i = take()) {
      const int64_t p = n_out * i / sum_chunks, last = n_out * (i + 1) / sum_chunks;
      kernels.pair_sums(f.grad + p * f.co, y + p * f.co, last - p, f.co, f.mean3, sums3.part(i),
                        sums3.part(i) + narrow);
    }
  });
  const double* sum_g = sums3.total();
  std::vector<double> dg3(f.co), dy_y(f.co), dy_bias(f.co);
  for (int64_t c = 0; c < f.co; ++c) {
    dg3[c] = third.inverse[c] * sum_g[narrow + c];
    dy_y[c] = -third.scale[c] * third.inverse[c] * dg3[c] * share_out;
    dy_bias[c] = -third.scale[c] * sum_g[c] * share_out;
  }
  f.dy_grad = per_channel(third.scale);
  f.dy_y = per_channel(dy_y);
  f.dy_bias = per_channel(dy_bias);

  // Project and second norm: dz, its sums, the gradient of project. Where d is null, both are computed in a buffer of
  // one image, here and again below.
  const bool stream = d == nullptr;
  const int64_t pixels = f.ho * f.wo, image_block = pixels * lanes, image_size = blocks(f.ch) * image_block;
  const int64_t own_scratch = stream ? std::max(cpu::forward_scratch(f, 1), cpu::backward_project_scratch(f))
                                     : cpu::backward_project_scratch(f);
  const Workspace dz_memory(stream ? 0 : static_cast<size_t>(wide_size()) * sizeof(T));
  T* dz = stream ? nullptr : dz_memory.as<T>();
  const int64_t tiles = stream ? f.images : ceil_div(n_out, cpu::backward_pixels);
  const int64_t dproject_size = weights ? wide * f.co : 0;
  const int64_t chunks2 = chunks_for(tiles, dproject_size * static_cast<int64_t>(sizeof(T)));
  Partial<double> sums2(chunks2, 2 * wide);
  Partial<T> dproject(chunks2, dproject_size);
  share_pieces(chunks2, [&](const auto& take) {
    const Workspace memory(static_cast<size_t>(own_scratch + (stream ? 2 * image_size : 0)) * sizeof(T));
    T *scratch = memory.template as<T>(), *own_d = scratch + own_scratch, *own_dz = own_d + image_size;
    for (int64_t i = take(); i >= 0; i = take()) {
      double *sum = sums2.part(i), *sum_d = sum + wide;
      const int64_t first = tiles * i / chunks2, last = tiles * (i + 1) / chunks2;
      if (!stream) {
        kernels.backward_project(f, first * cpu::backward_pixels, std::min(last * cpu::backward_pixels, n_out), d,
                                 wide_block(), dz, sum, sum_d, dproject.part(i), scratch);
        continue;
      }
      for (int64_t j = first; j < last; ++j) {
        const cpu::MBConv<T> one = image(j);
        kernels.expand_depthwise(one, {0, 1, 0, blocks(f.ch), 0, f.ho}, own_d, image_block, nullptr, scratch);
        kernels.backward_project(one, 0, pixels, own_d, image_block, own_dz, sum, sum_d, dproject.part(i), scratch);
      }
    }
  });
  const double* sum_dz = sums2.total();
  std::vector<double> dg2(f.ch), dd_d(f.ch), dd_bias(f.ch);
  for (int64_t c = 0; c < f.ch; ++c) {
    dg2[c] = second.inverse[c] * sum_dz[wide + c];
    dd_d[c] = -second.scale[c] * second.inverse[c] * dg2[c] * share_out;
    dd_bias[c] = -second.scale[c] * sum_dz[c] * share_out;
  }
  f.dd_dz = per_channel(second.scale);
  f.dd_d = per_channel(dd_d);
  f.dd_bias = per_channel(dd_bias);

  // Depthwise, first norm, expand: strips of the input.
  const int64_t taps_size = weights ? wide * k2 : 0, expand_size = weights && f.expand ? wide * f.ci : 0;
  const int64_t wanted = chunks_for(wanted_chunks, expand_size * static_cast<int64_t>(sizeof(T)));
  const std::vector<cpu::Strip> strips = strips_of(f, wanted, stream);
  const auto pieces = static_cast<int64_t>(strips.size());
  const int64_t chunks1 = std::min(wanted, pieces);
  Partial<double> sums1(chunks1, 2 * wide), dtaps(chunks1, taps_size);
  Partial<T> dexpand(chunks1, expand_size);
  T* pdx = dx.defined() ? dx.mutable_data_ptr<T>() : nullptr;
  int64_t scratch1 = 0;
  for (const auto& strip : strips) scratch1 = std::max(scratch1, cpu::strip_scratch(f, strip.images, strip.rows));
  share_pieces(chunks1, [&](const auto& take) {
    const Workspace memory(static_cast<size_t>(scratch1 + (stream ? 2 * image_size + own_scratch : 0)) * sizeof(T));
    T *scratch = memory.template as<T>(), *own_d = scratch + scratch1, *own_dz = own_d + image_size;
    std::vector<double> unused(stream ? static_cast<size_t>(2 * wide) : 0);
    int64_t have = -1;  // the image that own_d and own_dz hold
    for (int64_t n = take(); n >= 0; n = take()) {
      const int64_t i = chunks1 - 1 - n;  // what was written last is still in cache
      const cpu::ExpandSums<T> sums = {sums1.part(i), sums1.part(i) + wide, dtaps.part(i), dexpand.part(i)};
      for (int64_t j = pieces * i / chunks1; j < pieces * (i + 1) / chunks1; ++j) {
        cpu::Strip strip = strips[static_cast<size_t>(j)];
        if (!stream) {
          kernels.backward_expand(f, strip, d, dz, wide_block(), pdx, sums, scratch);
          continue;
        }
        const cpu::MBConv<T> one = image(strip.image);
        if (have != strip.image) {
          have = strip.image;
          T* again = own_dz + image_size;
          kernels.expand_depthwise(one, {0, 1, 0, blocks(f.ch), 0, f.ho}, own_d, image_block, nullptr, again);
          kernels.backward_project(one, 0, pixels, own_d, image_block, own_dz, unused.data(), unused.data() + wide,
                                   nullptr, again);
        }
        T* to = pdx == nullptr ? nullptr : pdx + strip.image * f.h * f.w * f.ci;
        strip.image = 0;
        kernels.backward_expand(one, strip, own_d, own_dz, image_block, to, sums, scratch);
      }
    }
  });

  // What the first norm's statistics add: r = scale * inverse * dgamma / N, from sum q (u - beta) = gamma * dgamma.
  std::vector<double> r(f.expand ? f.ch : 0), db1(r.size());
  if (f.expand) {
    const double* sum_q = sums1.total();
    const std::vector<double> beta = to_doubles(a.b1);
    for (int64_t c = 0; c < f.ch; ++c) {
      db1[c] = sum_q[c];
      const double shift = static_cast<double>(f.expand_bias[c]) - beta[c];
      r[c] = first.inverse[c] * first.inverse[c] * (sum_q[wide + c] + shift * db1[c]) * share_in;
    }
    if (a.training && pdx != nullptr) {
      const Tensor w = a.w1.view({f.ch, f.ci});
      Tensor rw = large_empty({f.ch, f.ci}, w.options());
      const T* pw = w.const_data_ptr<T>();
      T* prw = rw.mutable_data_ptr<T>();
      std::vector<double> bias(f.ci, 0.0);
      at::parallel_for(0, f.ch, 1 + (1 << 15) / f.ci, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c)
          for (int64_t i = 0; i < f.ci; ++i) prw[c * f.ci + i] = static_cast<T>(-r[c]) * pw[c * f.ci + i];
      });
      for (int64_t c = 0; c < f.ch; ++c) {
        const double share = first.scale[c] * db1[c] * share_in;
        for (int64_t i = 0; i < f.ci; ++i) bias[i] -= share * static_cast<double>(pw[c * f.ci + i]);
      }
      const Tensor q = at::matmul(rw.t(), w).contiguous();  // symmetric
      const T* pq = q.const_data_ptr<T>();
      T* panel = take(blocks(f.ci) * lanes * f.ci);
      for (int64_t b = 0; b < blocks(f.ci); ++b)
        for (int64_t k = 0; k < f.ci; ++k)
          std::copy_n(pq + k * f.ci + b * lanes, std::min(lanes, f.ci - b * lanes), panel + (b * f.ci + k) * lanes);
      const T* pbias = per_channel(bias);
      const int64_t in_tiles = ceil_div(n_in, cpu::backward_pixels);
      const int64_t pieces_in = std::min(4 * wanted_chunks, in_tiles);
      share_pieces(pieces_in, [&](const auto& take) {
        const Workspace scratch(static_cast<size_t>(2 * cpu::backward_pixels * lanes * blocks(f.ci)) * sizeof(T));
        for (int64_t i = take(); i >= 0; i = take())
          kernels.finish_dx(f, in_tiles * i / pieces_in * cpu::backward_pixels,
                            std::min(in_tiles * (i + 1) / pieces_in * cpu::backward_pixels, n_in), panel, pbias,
                            shortcut ? f.grad : nullptr, pdx, scratch.template as<T>());
      });
    }
  }
  if (shortcut && pdx != nullptr && !(f.expand && a.training)) dx.add_(grad);  // otherwise the last pass has added it
  if (!weights) return {};

  std::vector<Tensor> grads;
  if (f.expand) {
    const Tensor w = a.w1.view({f.ch, f.ci});
    const Tensor wc = a.training ? at::matmul(w, a.cov.to(w.scalar_type())) : at::zeros({f.ch, f.ci}, w.options());
    const T *pw = w.const_data_ptr<T>(), *pc = wc.const_data_ptr<T>(), *sum_qx = dexpand.total();
    std::vector<double> dg1(f.ch);
    Tensor dw1 = large_empty(a.w1.sizes(), a.w1.options());
    T* pdw = dw1.mutable_data_ptr<T>();
    at::parallel_for(0, f.ch, 1 + (1 << 14) / f.ci, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const T *row = pw + c * f.ci, *qx = sum_qx + c / lanes * f.ci * lanes + c % lanes;
        double dot = 0;
        for (int64_t i = 0; i < f.ci; ++i) dot += static_cast<double>(qx[i * lanes]) * static_cast<double>(row[i]);
        dg1[c] = first.inverse[c] * (a.training ? dot : dot - first.mean[c] * db1[c]);
        const T scale = static_cast<T>(first.scale[c]), statistics = static_cast<T>(dg1[c] * first.inverse[c]);
        for (int64_t i = 0; i < f.ci; ++i) pdw[c * f.ci + i] = scale * (qx[i * lanes] - statistics * pc[c * f.ci + i]);
      }
    });
    grads.push_back(dw1);
    grads.push_back(gradient_like<T>(a.g1, [&](int64_t c) { return dg1[c]; }));
    grads.push_back(gradient_like<T>(a.b1, [&](int64_t c) { return db1[c]; }));
  }
  std::vector<int64_t> turned(static_cast<size_t>(k2));  // where taps_back has tap (ky, kx)
  int64_t index = 0;
  for (int64_t ry = 0; ry < f.stride; ++ry)
    for (int64_t rx = 0; rx < f.stride; ++rx)
      for (int64_t k = k2 - 1; k >= 0; --k)
        if (k / f.kernel % f.stride == ry && k % f.kernel % f.stride == rx) turned[static_cast<size_t>(k)] = index++;
  const double* sum_taps = dtaps.total();
  grads.push_back(gradient_like<T>(a.wd, [&](int64_t j) {
    const int64_t c = j / k2, k = turned[static_cast<size_t>(j % k2)];
    return sum_taps[((c / lanes) * k2 + k) * lanes + c % lanes];
  }));
  grads.push_back(gradient_like<T>(a.g2, [&](int64_t c) { return dg2[c]; }));
  grads.push_back(gradient_like<T>(a.b2, [&](int64_t c) { return sum_dz[c]; }));
  const T* sum_project = dproject.total();
  Tensor dwp = large_empty(a.wp.sizes(), a.wp.options());
  for (int64_t o = 0; o < f.co; ++o)
    for (int64_t b = 0; b < blocks(f.ch); ++b)
      std::copy_n(sum_project + (b * f.co + o) * lanes, std::min(lanes, f.ch - b * lanes),
                  dwp.mutable_data_ptr<T>() + o * f.ch + b * lanes);
  grads.push_back(dwp);
  grads.push_back(gradient_like<T>(a.g3, [&](int64_t c) { return dg3[c]; }));
  grads.push_back(gradient_like<T>(a.b3, [&](int64_t c) { return sum_g[c]; }));
  return grads;
}

template void Block<float>::pack_backward();
template void Block<double>::pack_backward();
template std::vector<Tensor> Block<float>::backward(const Tensor&, const float*, const float*, const Tensor&, bool,
                                                    bool);
template std::vector<Tensor> Block<double>::backward(const Tensor&, const double*, const double*, const Tensor&, bool,
                                                     bool);

}  // namespace pf
