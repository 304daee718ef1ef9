// Backward of a fused MBConv over all images: the passes, and the corrections that close over small matrices
// (docs/performance.md has the formulas).
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cpu/ops/folded_mbconv.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/parallel.h"

namespace pf {
namespace {

using at::Tensor;
using cpu::blocks;
using cpu::lanes;

constexpr int64_t wanted_chunks = 16;

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
Tensor gradient_from(const Tensor& parameter, Element element) {
  Tensor g = large_empty(parameter.sizes(), parameter.options());
  T* p = g.mutable_data_ptr<T>();
  const int64_t n = g.numel();
  at::parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) p[i] = static_cast<T>(element(i));
  });
  return g;
}

template <typename T>
Tensor gradient_like(const Tensor& parameter, const std::vector<double>& values) {
  return gradient_from<T>(parameter, [&](int64_t i) { return values[static_cast<size_t>(i)]; });
}

// Strips of the input, as many for each chunk of images as for the next; `single`: of one image each.
template <typename T>
std::vector<cpu::InputStrip> strips_of(const cpu::MBConvArgs<T>& f, int64_t chunks, bool single) {
  std::vector<cpu::InputStrip> strips;
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

// A norm out = scale * (y - mean) + beta backwards: dy = scale * grad + slope * (y - mean) + offset.
struct NormGradient {
  std::vector<double> gamma, beta, slope, offset;

  // sums: of grad, and `second` further on of grad (y - mean), over the output's pixels. gamma and beta are of the
  // images here; what the statistics pass on is of all images that they were made of.
  template <typename T>
  NormGradient(const FoldedMBConv<T>& block, const Norm& norm, const double* sums, int64_t second) {
    const size_t n = norm.scale.size();
    std::vector<double> both;
    for (size_t c = 0; c < n; ++c) both.push_back(norm.inverse[c] * sums[second + static_cast<int64_t>(c)]);
    both.insert(both.end(), sums, sums + n);
    gamma.assign(both.begin(), both.begin() + static_cast<int64_t>(n));
    beta.assign(both.begin() + static_cast<int64_t>(n), both.end());
    const double share = block.share_sums(both, block.pixels_out());
    for (size_t c = 0; c < n; ++c) {
      slope.push_back(-norm.scale[c] * norm.inverse[c] * both[c] * share);
      offset.push_back(-norm.scale[c] * both[n + c] * share);
    }
  }
};

// What the pass over project and the second norm leaves.
template <typename T>
struct ProjectGradient {
  Workspace dz;  // empty where d is streamed
  NormGradient norm;
  Partial<T> weight;  // [blocks(ch)][co][16], or nothing
};

// What the pass over depthwise and expand leaves.
template <typename T>
struct ExpandGradient {
  Partial<double> sums, taps;  // of ExpandSums: q and qu; taps, or nothing
  Partial<T> weight;           // of ExpandSums: expand, or nothing
};

// beta: of the images here. What the statistics of the first norm add to its gradients is of all images that they were
// made of: r = scale * inverse * dgamma / N, offset = dbeta / N.
struct FirstNormGradient {
  std::vector<double> beta, r, offset;
};

// Where d is streamed: one image's d and dz, computed by both passes that read them.
template <typename T>
class StreamedImage {
 public:
  explicit StreamedImage(const FoldedMBConv<T>& block)
      : pixels_(block.f.ho * block.f.wo),
        size_(blocks(block.f.ch) * wide_block()),
        scratch_(std::max(cpu::forward_scratch(block.f, 1), cpu::backward_project_scratch(block.f))) {}

  int64_t wide_block() const { return pixels_ * lanes; }
  int64_t elements() const { return scratch_ + 2 * size_; }  // of the memory: d, dz, scratch
  T* d(T* memory) const { return memory; }
  T* dz(T* memory) const { return memory + size_; }
  void compute(const cpu::MBConvArgs<T>& one, T* memory, double* sum_dz, double* sum_dzd, T* dproject) const {
    const auto& kernels = cpu::kernels_for<T>();
    T* scratch = memory + 2 * size_;
    kernels.expand_depthwise(one, {0, 1, 0, blocks(one.ch), 0, one.ho}, d(memory), wide_block(), nullptr, scratch);
    kernels.backward_project(one, 0, pixels_, d(memory), wide_block(), dz(memory), sum_dz, sum_dzd, dproject, scratch);
  }

 private:
  int64_t pixels_, size_, scratch_;
};

// dY as an affine of (G, y).
template <typename T>
NormGradient third_norm(FoldedMBConv<T>& block) {
  auto& f = block.f;
  const int64_t pixels = block.pixels_out(), narrow = blocks(f.co) * lanes;
  const int64_t chunks = std::min<int64_t>(wanted_chunks, ceil_div(pixels, 256));
  f.mean3 = block.per_channel(block.third.mean);
  Partial<double> sums(chunks, 2 * narrow);
  share_pieces(chunks, [&](const auto& take) {
    for (int64_t i = take(); i >= 0; i = take()) {
      const int64_t p = pixels * i / chunks, last = pixels * (i + 1) / chunks;
      cpu::kernels_for<T>().pair_sums(f.grad + p * f.co, f.y + p * f.co, last - p, f.co, f.mean3, sums.part(i),
                                      sums.part(i) + narrow);
    }
  });
  NormGradient gradient(block, block.third, sums.total(), narrow);
  f.dy_grad = block.per_channel(block.third.scale);
  f.dy_y = block.per_channel(gradient.slope);
  f.dy_bias = block.per_channel(gradient.offset);
  return gradient;
}

// dz and its sums, from which dD is an affine of (dz, d); the gradient of project if `weights`.
template <typename T>
ProjectGradient<T> project_and_second_norm(FoldedMBConv<T>& block, const T* d, bool weights) {
  auto& f = block.f;
  const bool stream = d == nullptr;
  const int64_t pixels = block.pixels_out(), wide = blocks(f.ch) * lanes;
  const StreamedImage<T> streamed(block);
  Workspace dz(stream ? 0 : static_cast<size_t>(block.wide_size()) * sizeof(T));
  const int64_t tiles = stream ? f.images : ceil_div(pixels, cpu::backward_pixels);
  const int64_t weight_size = weights ? wide * f.co : 0;
  const int64_t chunks = chunks_for(tiles, weight_size * static_cast<int64_t>(sizeof(T)));
  Partial<double> sums(chunks, 2 * wide);
  Partial<T> weight(chunks, weight_size);
  share_pieces(chunks, [&](const auto& take) {
    const int64_t elements = stream ? streamed.elements() : cpu::backward_project_scratch(f);
    const Workspace memory(static_cast<size_t>(elements) * sizeof(T));
    for (int64_t i = take(); i >= 0; i = take()) {
      double *sum = sums.part(i), *sum_d = sum + wide;
      const int64_t first = tiles * i / chunks, last = tiles * (i + 1) / chunks;
      if (stream)
        for (int64_t j = first; j < last; ++j)
          streamed.compute(block.image(j), memory.template as<T>(), sum, sum_d, weight.part(i));
      else
        cpu::kernels_for<T>().backward_project(
            f, first * cpu::backward_pixels, std::min(last * cpu::backward_pixels, pixels), d, block.wide_block(),
            dz.template as<T>(), sum, sum_d, weight.part(i), memory.template as<T>());
    }
  });
  NormGradient norm(block, block.second, sums.total(), wide);
  f.dd_dz = block.per_channel(block.second.scale);
  f.dd_d = block.per_channel(norm.slope);
  f.dd_bias = block.per_channel(norm.offset);
  return {std::move(dz), std::move(norm), std::move(weight)};
}

// Strips of the input: dx less what the first norm's statistics add (dx may be null), and the sums for the weights.
template <typename T>
ExpandGradient<T> depthwise_and_expand(const FoldedMBConv<T>& block, const T* d, const T* dz, T* dx, bool weights) {
  const auto& f = block.f;
  const auto& kernels = cpu::kernels_for<T>();
  const bool stream = d == nullptr;
  const int64_t wide = blocks(f.ch) * lanes;
  const int64_t taps_size = weights ? wide * f.kernel * f.kernel : 0;
  const int64_t weight_size = weights && f.expand ? wide * f.ci : 0;
  const int64_t wanted = chunks_for(wanted_chunks, weight_size * static_cast<int64_t>(sizeof(T)));
  const std::vector<cpu::InputStrip> strips = strips_of(f, wanted, stream);
  const auto pieces = static_cast<int64_t>(strips.size()), chunks = std::min(wanted, pieces);
  ExpandGradient<T> gradient{{chunks, 2 * wide}, {chunks, taps_size}, {chunks, weight_size}};
  const StreamedImage<T> streamed(block);
  int64_t strip_size = 0;
  for (const auto& strip : strips) strip_size = std::max(strip_size, cpu::strip_scratch(f, strip.images, strip.rows));
  share_pieces(chunks, [&](const auto& take) {
    const Workspace memory(static_cast<size_t>(strip_size + (stream ? streamed.elements() : 0)) * sizeof(T));
    T *scratch = memory.template as<T>(), *own = scratch + strip_size;
    std::vector<double> unused(stream ? static_cast<size_t>(2 * wide) : 0);
    int64_t have = -1;  // the image whose d and dz are in memory
    for (int64_t n = take(); n >= 0; n = take()) {
      const int64_t i = chunks - 1 - n;  // what was written last is still in cache
      double* sum_q = gradient.sums.part(i);
      const cpu::ExpandSums<T> sums = {sum_q, sum_q + wide, gradient.taps.part(i), gradient.weight.part(i)};
      for (int64_t j = pieces * i / chunks; j < pieces * (i + 1) / chunks; ++j) {
        cpu::InputStrip strip = strips[static_cast<size_t>(j)];
        if (!stream) {
          kernels.backward_expand(f, strip, d, dz, block.wide_block(), dx, sums, scratch);
          continue;
        }
        const cpu::MBConvArgs<T> one = block.image(strip.image);
        if (have != strip.image) streamed.compute(one, own, unused.data(), unused.data() + wide, nullptr);
        have = strip.image;
        T* to = dx == nullptr ? nullptr : dx + strip.image * f.h * f.w * f.ci;
        strip.image = 0;
        kernels.backward_expand(one, strip, streamed.d(own), streamed.dz(own), streamed.wide_block(), to, sums,
                                scratch);
      }
    }
  });
  return gradient;
}

// From sum q (u - beta) = gamma * dgamma.
template <typename T>
FirstNormGradient first_norm(const FoldedMBConv<T>& block, const double* sum_q) {
  const auto& f = block.f;
  const std::vector<double> beta = to_doubles(block.a.b1);
  std::vector<double> both(sum_q, sum_q + f.ch);
  FirstNormGradient gradient;
  gradient.beta = both;
  for (int64_t c = 0; c < f.ch; ++c) {
    const double shift = static_cast<double>(f.expand_bias[c]) - beta[static_cast<size_t>(c)];
    both.push_back(sum_q[blocks(f.ch) * lanes + c] + shift * sum_q[c]);
  }
  const double share = block.share_sums(both, block.pixels_in());
  for (int64_t c = 0; c < f.ch; ++c) {
    const double inverse = block.first.inverse[static_cast<size_t>(c)];
    gradient.r.push_back(inverse * inverse * both[static_cast<size_t>(f.ch + c)] * share);
    gradient.offset.push_back(both[static_cast<size_t>(c)] * share);
  }
  return gradient;
}

// dx += what the first norm's statistics add, an affine of x; and grad if there is a shortcut.
template <typename T>
void add_statistics(FoldedMBConv<T>& block, const FirstNormGradient& norm, bool shortcut, T* dx) {
  const auto& f = block.f;
  const Tensor w = block.a.w1.view({f.ch, f.ci});
  Tensor rw = large_empty({f.ch, f.ci}, w.options());
  const T* pw = w.const_data_ptr<T>();
  T* prw = rw.mutable_data_ptr<T>();
  at::parallel_for(0, f.ch, 1 + (1 << 15) / f.ci, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t i = 0; i < f.ci; ++i) prw[c * f.ci + i] = static_cast<T>(-norm.r[c]) * pw[c * f.ci + i];
  });
  const int64_t pixels = block.pixels_in();
  std::vector<double> bias(f.ci, 0.0);
  for (int64_t c = 0; c < f.ch; ++c) {
    const double share = block.first.scale[c] * norm.offset[c];
    for (int64_t i = 0; i < f.ci; ++i) bias[i] -= share * static_cast<double>(pw[c * f.ci + i]);
  }
  const Tensor q = at::matmul(rw.t(), w).contiguous();  // symmetric
  const T* pq = q.const_data_ptr<T>();
  T* panel = block.take(blocks(f.ci) * lanes * f.ci);
  for (int64_t b = 0; b < blocks(f.ci); ++b)
    for (int64_t k = 0; k < f.ci; ++k)
      std::copy_n(pq + k * f.ci + b * lanes, std::min(lanes, f.ci - b * lanes), panel + (b * f.ci + k) * lanes);
  const T* pbias = block.per_channel(bias);
  const int64_t tiles = ceil_div(pixels, cpu::backward_pixels), pieces = std::min(4 * wanted_chunks, tiles);
  share_pieces(pieces, [&](const auto& take) {
    const Workspace scratch(static_cast<size_t>(2 * cpu::backward_pixels * lanes * blocks(f.ci)) * sizeof(T));
    for (int64_t i = take(); i >= 0; i = take())
      cpu::kernels_for<T>().finish_dx(f, tiles * i / pieces * cpu::backward_pixels,
                                      std::min(tiles * (i + 1) / pieces * cpu::backward_pixels, pixels), panel, pbias,
                                      shortcut ? f.grad : nullptr, dx, scratch.template as<T>());
  });
}

// Of the expand convolution and its norm: weight, gamma, beta. sum_qx: ExpandSums' expand.
template <typename T>
std::vector<Tensor> expand_gradients(const FoldedMBConv<T>& block, const T* sum_qx, const std::vector<double>& beta) {
  const auto& f = block.f;
  const MBConvInputs& a = block.a;
  const Norm& norm = block.first;
  const Tensor w = a.w1.view({f.ch, f.ci});
  const Tensor wc = a.training ? at::matmul(w, a.cov.to(w.scalar_type())) : at::zeros({f.ch, f.ci}, w.options());
  const T *pw = w.const_data_ptr<T>(), *pc = wc.const_data_ptr<T>();
  std::vector<double> gamma(f.ch);
  Tensor dw = large_empty(a.w1.sizes(), a.w1.options());
  T* pdw = dw.mutable_data_ptr<T>();
  at::parallel_for(0, f.ch, 1 + (1 << 14) / f.ci, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const T *row = pw + c * f.ci, *qx = sum_qx + c / lanes * f.ci * lanes + c % lanes;
      double dot = 0;
      for (int64_t i = 0; i < f.ci; ++i) dot += static_cast<double>(qx[i * lanes]) * static_cast<double>(row[i]);
      gamma[c] = norm.inverse[c] * (a.training ? dot : dot - norm.mean[c] * beta[c]);
      const T scale = static_cast<T>(norm.scale[c]), statistics = static_cast<T>(gamma[c] * norm.inverse[c]);
      for (int64_t i = 0; i < f.ci; ++i) pdw[c * f.ci + i] = scale * (qx[i * lanes] - statistics * pc[c * f.ci + i]);
    }
  });
  return {dw, gradient_like<T>(a.g1, gamma), gradient_like<T>(a.b1, beta)};
}

template <typename T>
Tensor depthwise_gradient(const FoldedMBConv<T>& block, const double* sum_taps) {
  const auto& f = block.f;
  const int64_t k2 = f.kernel * f.kernel;
  std::vector<int64_t> turned(static_cast<size_t>(k2));  // where taps_back has tap (ky, kx)
  int64_t index = 0;
  for (int64_t ry = 0; ry < f.stride; ++ry)
    for (int64_t rx = 0; rx < f.stride; ++rx)
      for (int64_t k = k2 - 1; k >= 0; --k)
        if (k / f.kernel % f.stride == ry && k % f.kernel % f.stride == rx) turned[static_cast<size_t>(k)] = index++;
  return gradient_from<T>(block.a.wd, [&](int64_t j) {
    const int64_t c = j / k2, k = turned[static_cast<size_t>(j % k2)];
    return sum_taps[((c / lanes) * k2 + k) * lanes + c % lanes];
  });
}

template <typename T>
Tensor project_gradient(const FoldedMBConv<T>& block, const T* sum) {
  const auto& f = block.f;
  Tensor dw = large_empty(block.a.wp.sizes(), block.a.wp.options());
  T* p = dw.template mutable_data_ptr<T>();
  for (int64_t o = 0; o < f.co; ++o)
    for (int64_t b = 0; b < blocks(f.ch); ++b)
      std::copy_n(sum + (b * f.co + o) * lanes, std::min(lanes, f.ch - b * lanes), p + o * f.ch + b * lanes);
  return dw;
}

}  // namespace

template <typename T>
void FoldedMBConv<T>::pack_backward() {
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
std::vector<Tensor> FoldedMBConv<T>::backward(const Tensor& grad, const T* y, const T* d, const Tensor& dx,
                                              bool weights, bool shortcut) {
  pack_backward();
  f.y = y;
  f.grad = grad.const_data_ptr<T>();
  T* pdx = dx.defined() ? dx.mutable_data_ptr<T>() : nullptr;
  const NormGradient third_gradient = third_norm(*this);
  ProjectGradient<T> project = project_and_second_norm(*this, d, weights);
  ExpandGradient<T> expand = depthwise_and_expand(*this, d, project.dz.template as<T>(), pdx, weights);
  FirstNormGradient first_gradient;
  if (f.expand) first_gradient = first_norm(*this, expand.sums.total());
  if (f.expand && a.training && pdx != nullptr)
    add_statistics(*this, first_gradient, shortcut, pdx);
  else if (shortcut && pdx != nullptr)
    dx.add_(grad);
  if (!weights) return {};

  std::vector<Tensor> grads;
  if (f.expand) grads = expand_gradients(*this, expand.weight.total(), first_gradient.beta);
  grads.push_back(depthwise_gradient(*this, expand.taps.total()));
  grads.push_back(gradient_like<T>(a.g2, project.norm.gamma));
  grads.push_back(gradient_like<T>(a.b2, project.norm.beta));
  grads.push_back(project_gradient(*this, project.weight.total()));
  grads.push_back(gradient_like<T>(a.g3, third_gradient.gamma));
  grads.push_back(gradient_like<T>(a.b3, third_gradient.beta));
  return grads;
}

#define PF_INSTANTIATE(T) \
  template std::vector<Tensor> FoldedMBConv<T>::backward(const Tensor&, const T*, const T*, const Tensor&, bool, bool);
PF_INSTANTIATE(float)
PF_INSTANTIATE(double)
#undef PF_INSTANTIATE

}  // namespace pf
