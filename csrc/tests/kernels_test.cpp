// The kernels of MBConv and of the stem without torch, for sanitizers and valgrind: every buffer is a heap block of
// exactly the size that csrc/cpu/mbconv.h names, filled with NaN, so that a read or write outside, or of what was never
// written, is seen. Checked: d, y and the gradients of all passes against plain loops in double, for each instruction
// set this machine has.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <vector>

namespace pf::cpu {
namespace {

std::mt19937 generator(0);
int failures = 0;

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n, T value = std::numeric_limits<T>::quiet_NaN()) : size_(n) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, static_cast<size_t>(n) * sizeof(T)) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<T*>(p));
    std::fill(get(), get() + n, value);
  }
  void draw() {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size_; ++i) get()[i] = static_cast<T>(normal(generator));
  }
  T& operator[](int64_t i) { return get()[i]; }
  T* get() { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<T[], Free> memory_;
};

void expect(const char* what, double value, double wanted, double tolerance) {
  if (std::abs(value - wanted) <= tolerance * (1 + std::abs(wanted))) return;
  if (++failures < 20) std::printf("%s: %.9g, expected %.9g\n", what, value, wanted);
}

// One MBConv: kernels' arguments and memory, and the same passes in plain loops.
template <typename T>
class MBConvCase {
 public:
  MBConvCase(const KernelsFor<T>& kernels_, int64_t images, int64_t ci_, int64_t ratio, int64_t co_, int64_t h_,
             int64_t w_, int64_t k_, int64_t s_)
      : kernels(kernels_),
        ci(ci_),
        ch(ci_ * ratio),
        co(co_),
        h(h_),
        w(w_),
        k(k_),
        s(s_),
        in(images * h * w),
        out(images * ((h - 1) / s + 1) * ((w - 1) / s + 1)) {
    f.images = images, f.ci = ci, f.ch = ch, f.co = co, f.h = h, f.w = w, f.kernel = k, f.stride = s;
    f.ho = (h - 1) / s + 1, f.wo = (w - 1) / s + 1, f.expand = ratio > 1;
    f.activation = ActivationForm::clamp, f.low = 0, f.high = 6;
    for (auto* b : {&x, &w1, &wd, &wp, &grad}) b->draw();
    pack_weights();
    f.x = x.get(), f.center = center.get(), f.expand_in = expand_in.get(), f.expand_bias = bias1.get();
    f.taps = taps.get(), f.mean2 = zero.get(), f.scale2 = one.get(), f.bias2 = zero.get();
    f.project_in = project_in.get(), f.taps_back = back.get(), f.project_out = project_out.get();
    f.expand_out = expand_out.get(), f.y = y.get(), f.grad = grad.get(), f.mean3 = narrow_zero.get();
    f.dy_grad = narrow_one.get(), f.dy_y = narrow_zero.get(), f.dy_bias = narrow_zero.get();
    f.dd_dz = one.get(), f.dd_d = zero.get(), f.dd_bias = zero.get();
  }

  void run() {
    check_depthwise();
    check_project_and_probe();
    check_backward_project();
    check_backward_expand();
    run_the_rest();
  }

 private:
  const KernelsFor<T>& kernels;
  const double tolerance = sizeof(T) == 4 ? 2e-3 : 1e-10;
  MBConvArgs<T> f{};
  const int64_t ci, ch, co, h, w, k, s, in, out;
  const int64_t wide = blocks(ch) * lanes, narrow = blocks(co) * lanes, block = out * lanes;
  Buffer<T> x{in * ci}, w1{ch * ci}, wd{ch * k * k}, wp{co * ch}, y{out * co}, grad{out * co};
  Buffer<T> center{blocks(ci) * lanes, 0}, bias1{wide, 0}, one{wide, 1}, zero{wide, 0}, narrow_one{narrow, 1},
      narrow_zero{narrow, 0}, expand_in{wide * ci, 0}, taps{wide * k * k, 0}, back{wide * k * k, 0},
      project_in{narrow * ch, 0}, project_out{wide * co, 0}, expand_out{blocks(ci) * lanes * wide, 0};
  Buffer<T> d{wide * out}, dz{wide * out}, dx_out{in * ci};
  Buffer<double> sum_g{narrow, 0}, sum_yg{narrow, 0};
  // In plain loops: e and u, its pre-activation; d; y; the gradients of z, e, x and the taps.
  std::vector<double> e = doubles(in * ch), u = e, dd = doubles(out * ch), yy = doubles(out * co), gz = dd, q = e,
                      dx = doubles(in * ci), dwd = doubles(ch * k * k);

  static std::vector<double> doubles(int64_t n) { return std::vector<double>(static_cast<size_t>(n)); }
  static double clamp6(double v) { return std::min(std::max(v, 0.0), 6.0); }
  int64_t wide_at(int64_t p, int64_t c) const { return (c / lanes) * block + p * lanes + c % lanes; }
  double product(int64_t p, int64_t c) {  // of a pixel of x with a row of the expand weight
    double sum = 0.25;
    for (int64_t i = 0; i < ci; ++i) sum += static_cast<double>(x[p * ci + i]) * static_cast<double>(w1[c * ci + i]);
    return sum;
  }

  template <typename Body>
  void each_tap(Body body) const {  // body(output pixel, input pixel, tap)
    for (int64_t n = 0; n < f.images; ++n)
      for (int64_t oy = 0; oy < f.ho; ++oy)
        for (int64_t ox = 0; ox < f.wo; ++ox)
          for (int64_t t = 0; t < k * k; ++t) {
            const int64_t iy = oy * s - k / 2 + t / k, ix = ox * s - k / 2 + t % k;
            if (iy < 0 || iy >= h || ix < 0 || ix >= w) continue;
            body((n * f.ho + oy) * f.wo + ox, (n * h + iy) * w + ix, t);
          }
  }

  std::vector<int64_t> turned_taps() const {  // the tap at each place of taps_back
    std::vector<int64_t> order;
    for (int64_t ry = 0; ry < s; ++ry)
      for (int64_t rx = 0; rx < s; ++rx)
        for (int64_t t = k * k - 1; t >= 0; --t)
          if (t / k % s == ry && t % k % s == rx) order.push_back(t);
    return order;
  }

  void pack_weights() {
    const std::vector<int64_t> order = turned_taps();
    for (int64_t c = 0; c < ch; ++c) {
      const int64_t b = c / lanes, l = c % lanes;
      bias1[c] = static_cast<T>(0.25);
      for (int64_t i = 0; i < ci; ++i) {
        expand_in[(b * ci + i) * lanes + l] = w1[c * ci + i];
        expand_out[(i / lanes * wide + c) * lanes + i % lanes] = w1[c * ci + i];
      }
      for (int64_t o = 0; o < co; ++o) {
        project_out[(b * co + o) * lanes + l] = wp[o * ch + c];
        project_in[(o / lanes * ch + c) * lanes + o % lanes] = wp[o * ch + c];
      }
      for (int64_t t = 0; t < k * k; ++t) {
        taps[(b * k * k + t) * lanes + l] = wd[c * k * k + t];
        back[(b * k * k + t) * lanes + l] = wd[c * k * k + order[t]];
      }
    }
  }

  void check_depthwise() {
    Buffer<T> scratch(forward_scratch(f, f.images));
    Buffer<double> mean(wide, 0), m2(wide, 0);
    Moments moments{0, mean.get(), m2.get()};
    kernels.expand_depthwise(f, {0, f.images, 0, blocks(ch), 0, f.ho}, d.get(), block, &moments, scratch.get());
    for (int64_t p = 0; p < in; ++p)
      for (int64_t c = 0; c < ch; ++c) {
        u[p * ch + c] = f.expand ? product(p, c) : static_cast<double>(x[p * ci + c]);
        e[p * ch + c] = f.expand ? clamp6(u[p * ch + c]) : u[p * ch + c];
      }
    each_tap([&](int64_t o, int64_t i, int64_t t) {
      for (int64_t c = 0; c < ch; ++c) dd[o * ch + c] += e[i * ch + c] * static_cast<double>(wd[c * k * k + t]);
    });
    for (int64_t c = 0; c < ch; ++c) {
      double sum = 0;
      for (int64_t p = 0; p < out; ++p) sum += dd[p * ch + c];
      expect("mean of d", mean[c], sum / static_cast<double>(out), tolerance);
      for (int64_t p = 0; p < out; ++p) expect("d", static_cast<double>(d[wide_at(p, c)]), dd[p * ch + c], tolerance);
    }
  }

  void check_project_and_probe() {
    Buffer<T> project_memory(project_scratch(f)), probe_memory(project_scratch(f));
    kernels.project(f, 0, out, d.get(), block, y.get(), nullptr, project_memory.get());
    for (int64_t p = 0; p < out; ++p)
      for (int64_t o = 0; o < co; ++o) {
        for (int64_t c = 0; c < ch; ++c) yy[p * co + o] += clamp6(dd[p * ch + c]) * static_cast<double>(wp[o * ch + c]);
        expect("y", static_cast<double>(y[p * co + o]), yy[p * co + o], tolerance);
      }
    Buffer<double> mean(narrow, 0), m2(narrow, 0);
    Moments moments{0, mean.get(), m2.get()};
    kernels.probe(f, 0, out, d.get(), block, moments, sum_g.get(), sum_yg.get(), probe_memory.get());
    for (int64_t o = 0; o < co; ++o) {
      double wanted = 0;
      for (int64_t p = 0; p < out; ++p) wanted += yy[p * co + o] * static_cast<double>(grad[p * co + o]);
      expect("sum of y G", sum_yg[o], wanted, 10 * tolerance);
    }
  }

  // Norms are the identity here, so that only products, convolutions and masks are at work.
  void check_backward_project() {
    Buffer<T> dproject(wide * co, 0), memory(backward_project_scratch(f));
    Buffer<double> sum_dz(wide, 0), sum_dzd(wide, 0);
    kernels.backward_project(f, 0, out, d.get(), block, dz.get(), sum_dz.get(), sum_dzd.get(), dproject.get(),
                             memory.get());
    for (int64_t p = 0; p < out; ++p)
      for (int64_t c = 0; c < ch; ++c) {
        double sum = 0;
        for (int64_t o = 0; o < co; ++o)
          sum += static_cast<double>(grad[p * co + o]) * static_cast<double>(wp[o * ch + c]);
        const auto z = static_cast<double>(d[wide_at(p, c)]);
        gz[p * ch + c] = z > 0 && z < 6 ? sum : 0;
        expect("dz", static_cast<double>(dz[wide_at(p, c)]), gz[p * ch + c], tolerance);
      }
    each_tap([&](int64_t o, int64_t i, int64_t t) {
      for (int64_t c = 0; c < ch; ++c) {
        q[i * ch + c] += gz[o * ch + c] * static_cast<double>(wd[c * k * k + t]);
        dwd[c * k * k + t] += gz[o * ch + c] * e[i * ch + c];
      }
    });
  }

  void check_backward_expand() {
    Buffer<T> dexpand(wide * ci, 0);
    Buffer<double> sum_q(wide, 0), sum_qu(wide, 0), dtaps(wide * k * k, 0);
    const ExpandSums<T> sums{sum_q.get(), sum_qu.get(), dtaps.get(), dexpand.get()};
    const int64_t rows = std::max<int64_t>(1, h / 2);
    for (int64_t n = 0; n < f.images; ++n)
      for (int64_t row = 0; row < h; row += rows) {
        const InputStrip strip{n, 1, row, std::min(rows, h - row)};
        Buffer<T> memory(strip_scratch(f, 1, strip.rows));
        kernels.backward_expand(f, strip, d.get(), dz.get(), block, dx_out.get(), sums, memory.get());
      }
    int64_t unclear = 0;  // a mask that rounding may turn either way
    for (int64_t p = 0; p < in; ++p) {
      bool clear = true;
      for (int64_t c = 0; c < ch; ++c) {
        const double v = u[p * ch + c];
        if (f.expand) clear = clear && std::abs(v) > 1e-4 && std::abs(v - 6) > 1e-4;
        const double masked = !f.expand || (v > 0 && v < 6) ? q[p * ch + c] : 0;
        if (!f.expand) dx[p * ci + c] = masked;
        for (int64_t i = 0; f.expand && i < ci; ++i) dx[p * ci + i] += masked * static_cast<double>(w1[c * ci + i]);
      }
      unclear += !clear;
      for (int64_t i = 0; clear && i < ci; ++i)
        expect("dx", static_cast<double>(dx_out[p * ci + i]), dx[p * ci + i], 10 * tolerance);
    }
    if (unclear > in / 4 + 1) ++failures, std::printf("too few pixels checked\n");
    const std::vector<int64_t> order = turned_taps();
    for (int64_t c = 0; c < ch; ++c)
      for (int64_t j = 0; j < k * k; ++j)
        expect("dtaps", dtaps[((c / lanes) * k * k + j) * lanes + c % lanes], dwd[c * k * k + order[j]],
               10 * tolerance);
  }

  void run_the_rest() {  // for bounds
    Buffer<T> correction(blocks(ci) * lanes * ci, 0), finish_memory(2 * backward_pixels * lanes * blocks(ci)),
        affine(out * co);
    kernels.finish_dx(f, 0, in, correction.get(), center.get(), nullptr, dx_out.get(), finish_memory.get());
    kernels.affine(y.get(), out, co, narrow_zero.get(), narrow_one.get(), narrow_zero.get(), nullptr, affine.get());
    kernels.pair_sums(grad.get(), y.get(), out, co, narrow_zero.get(), sum_g.get(), sum_yg.get());
    Buffer<double> gram(ci * ci, 0), sum(ci, 0), panel(blocks(ci) * lanes * ci, 1), mean(blocks(ci) * lanes, 0);
    Buffer<double> mean_out(ch), var_out(ch), quadratic_memory(ch * lanes * (blocks(ci) + 2));
    Buffer<T> gram_memory(gram_scratch(ci));
    kernels.gram({x.get(), f.images, h * w, ci, h * w * ci, ci, 1}, center.get(), 0, in, sum.get(), gram.get(),
                 gram_memory.get());
    kernels.quadratic(w1.get(), ch, ci, mean.get(), panel.get(), mean_out.get(), var_out.get(), quadratic_memory.get());
  }
};

// A dense convolution with its activation: output, gradient sums and window sums against plain loops.
template <typename T>
void run_conv(const KernelsFor<T>& kernels, int64_t images, int64_t ci, int64_t co, int64_t h, int64_t w, int64_t k,
              int64_t s) {
  const double tolerance = sizeof(T) == 4 ? 2e-3 : 1e-10;
  ConvArgs<T> f{};
  f.images = images, f.ci = ci, f.co = co, f.h = h, f.w = w, f.kernel = k, f.stride = s;
  f.ho = (h - 1) / s + 1, f.wo = (w - 1) / s + 1;
  f.activation = ActivationForm::clamp, f.low = 0, f.high = 6;
  const int64_t n = depth(f), rows = images * f.ho, pixels = rows * f.wo;
  Buffer<T> x(images * h * w * ci), weight(co * n), grad(pixels * co), center(blocks(n) * lanes, 0),
      bias(blocks(co) * lanes, 0), panel(blocks(co) * n * lanes, 0), out(pixels * co), scratch(conv_scratch(f)),
      products(blocks(co) * n * lanes, 0);
  for (auto* b : {&x, &weight, &grad}) b->draw();
  for (int64_t i = 0; i < n; ++i) center[i] = static_cast<T>(0.125);
  for (int64_t o = 0; o < co; ++o) {
    bias[o] = static_cast<T>(0.5);
    for (int64_t i = 0; i < n; ++i) panel[(o / lanes * n + i) * lanes + o % lanes] = weight[o * n + i];
  }
  f.x = x.get(), f.center = center.get(), f.weight = panel.get(), f.bias = bias.get();
  Buffer<double> sum(n, 0), gram(n * n, 0), sum_q(co, 0);
  kernels.conv_gram(f, 0, rows, sum.get(), gram.get(), scratch.get());
  kernels.conv_forward(f, 0, rows, out.get(), scratch.get());
  kernels.conv_backward(f, 0, rows, grad.get(), sum_q.get(), products.get(), scratch.get());

  std::vector<double> window(n), sums(n, 0), squares(n * n, 0), q_sum(co, 0), q_window(co * n, 0);
  for (int64_t p = 0; p < pixels; ++p) {
    const int64_t image = p / (f.ho * f.wo), y = p / f.wo % f.ho, column = p % f.wo;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = y * s - k / 2 + i / (k * ci), c = column * s - k / 2 + i / ci % k;
      const bool inside = r >= 0 && r < h && c >= 0 && c < w;
      window[i] = (inside ? double(x[((image * h + r) * w + c) * ci + i % ci]) : 0) - double(center[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
      sums[i] += window[i];
      for (int64_t j = i; j < n; ++j) squares[i * n + j] += window[i] * window[j];
    }
    for (int64_t o = 0; o < co; ++o) {
      double u = bias[o];
      for (int64_t i = 0; i < n; ++i) u += window[i] * double(weight[o * n + i]);
      const double value = std::min(std::max(u, 0.0), 6.0), q = u > 0 && u < 6 ? double(grad[p * co + o]) : 0;
      expect("conv", out[p * co + o], value, tolerance);
      q_sum[o] += q;
      for (int64_t i = 0; i < n; ++i) q_window[o * n + i] += q * window[i];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    expect("sum of windows", sum[i], sums[i], 10 * tolerance);
    for (int64_t j = i; j < n; ++j) expect("gram of windows", gram[i * n + j], squares[i * n + j], 10 * tolerance);
  }
  for (int64_t o = 0; o < co; ++o) {
    expect("sum q", sum_q[o], q_sum[o], 10 * tolerance);
    for (int64_t i = 0; i < n; ++i)
      expect("sum q window", products[(o / lanes * n + i) * lanes + o % lanes], q_window[o * n + i], 10 * tolerance);
  }
}

}  // namespace

}  // namespace pf::cpu

int main() {
  const auto& table = pf::cpu::kernels();
  const int64_t shapes[][8] = {{2, 5, 4, 7, 9, 8, 3, 1},   {1, 16, 3, 24, 11, 13, 5, 2}, {3, 20, 2, 33, 7, 7, 7, 1},
                               {1, 24, 1, 16, 6, 5, 3, 2}, {2, 3, 8, 1, 2, 1, 7, 2},     {1, 33, 1, 40, 15, 14, 5, 1},
                               {1, 8, 6, 17, 1, 30, 3, 1}, {5, 17, 5, 18, 4, 3, 5, 2}};
  for (const auto& s : shapes) {
    pf::cpu::MBConvCase<float>(table.f32, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]).run();
    pf::cpu::MBConvCase<double>(table.f64, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]).run();
  }
  const int64_t convs[][7] = {
      {2, 3, 32, 9, 12, 3, 2}, {1, 1, 5, 3, 300, 5, 1}, {3, 7, 17, 2, 1, 3, 1}, {1, 1, 3, 4, 6, 7, 3}};
  for (const auto& s : convs) {
    pf::cpu::run_conv<float>(table.f32, s[0], s[1], s[2], s[3], s[4], s[5], s[6]);
    pf::cpu::run_conv<double>(table.f64, s[0], s[1], s[2], s[3], s[4], s[5], s[6]);
  }
  std::printf("%s: %s\n", table.name, pf::cpu::failures == 0 ? "clean" : "FAILED");
  return pf::cpu::failures == 0 ? 0 : 1;
}
