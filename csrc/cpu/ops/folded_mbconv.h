// The host's view of a fused MBConv: arguments checked and folded once, and each pass run over all images.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "shared.h"

namespace pf {

// Mean and covariance of x in float64, as given or undefined: made once for all candidates of a layer.
struct Covariance {
  at::Tensor mean, cov;
  at::Tensor panel;  // cov as the kernel `quadratic` takes it, for forward passes alone
  Covariance(const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& cov, bool forward);
};

struct MBConvInputs {
  at::Tensor x;                                   // channels-last
  at::Tensor w1, g1, b1, wd, g2, b2, wp, g3, b3;  // w1, g1, b1 undefined if there is no expand convolution
  at::Tensor mean, cov, panel;                    // of x (see Covariance); undefined if not training or without expand
  int64_t stride;
  std::string activation;
  bool training;
  double eps;
  std::string group;  // of the processes that share the batch; empty: none
  bool expand() const { return w1.defined(); }
};

// Checks every argument once; messages begin with `op`.
MBConvInputs check_mbconv(const char* op, const at::Tensor& x, at::TensorList params, const Covariance& given,
                          int64_t stride, const std::string& activation, bool training, double eps,
                          std::string_view group);
void check_running(const char* op, const MBConvInputs& a, at::TensorList running);
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
at::Tensor channels_last(const at::Tensor& t);  // t itself if its memory is already so

// One batch norm: the statistics in use, and what follows from them.
struct Norm {
  std::vector<double> mean, var;
  std::vector<double> inverse;  // 1 / sqrt(var + eps)
  std::vector<double> scale;    // gamma * inverse
  void fold(const at::Tensor& gamma, double eps);
};
std::vector<double> to_doubles(const at::Tensor& t);

// The block as the kernels want it, with the memory that it points at.
template <typename T>
class FoldedMBConv {
 public:
  explicit FoldedMBConv(const MBConvInputs& a);
  FoldedMBConv(const FoldedMBConv&) = delete;
  FoldedMBConv& operator=(const FoldedMBConv&) = delete;

  cpu::MBConvArgs<T> f{};
  const MBConvInputs& a;
  Norm first, second, third;
  int64_t pixels_in() const { return f.images * f.h * f.w; }
  int64_t pixels_out() const { return f.images * f.ho * f.wo; }
  int64_t wide_block() const { return pixels_out() * cpu::lanes; }
  int64_t wide_size() const { return cpu::blocks(f.ch) * wide_block(); }
  // `sums` over n pixels here as those of all processes that share the batch; returns what one pixel contributes to a
  // mean: 0 where statistics are given, which pass no gradient.
  double share_sums(std::vector<double>& sums, int64_t n) const {
    if (!a.training) return 0;
    sums.push_back(static_cast<double>(n));
    add_up(sums, a.group);
    const double pixels = sums.back();
    sums.pop_back();
    return 1.0 / pixels;
  }

  // Each norm is set from the batch (where the passes before it have run) or from given statistics.
  void first_from_batch();
  void set_first(Norm norm);
  void set_second(Norm norm);
  void set_third(Norm norm) { (third = std::move(norm)).fold(a.g3, a.eps); }

  // Whether wide tensors that nobody keeps are too large for scratch memory: then d below is null.
  bool streams() const;
  // d from x; the moments of d if asked for. Moments are those of the whole batch, whatever processes share it.
  Norm depthwise(T* d, bool moments) const;
  // y from d; its moments.
  Norm project(const T* d, T* y);
  // <grad, out> with y never written; sets third.
  double gate(const T* d, const at::Tensor& grad);
  // out = BN3(y), plus x if there is a shortcut
  void normalise(const T* y, T* out, bool shortcut);
  // out from x with all norms given, image by image.
  void infer(T* out);
  // dx (if defined) and, if `weights`, the gradients of the parameters. d is null if it is to be computed on the spot.
  std::vector<at::Tensor> backward(const at::Tensor& grad, const T* y, const T* d, const at::Tensor& dx, bool weights,
                                   bool shortcut);

  // What the passes ask for while they run.
  T* take(int64_t n);                                  // zeros, aligned, as long as the block lives
  const T* per_channel(const std::vector<double>& v);  // padded to whole blocks
  cpu::MBConvArgs<T> image(int64_t i) const;           // the block as image i alone sees it

 private:
  std::vector<at::Tensor> owned_;
  T* next_ = nullptr;  // where the last of them is free
  int64_t left_ = 0;
  void pack_project(const std::vector<double>* scale);
  void pack_backward();
  int64_t output_chunks(const T* d) const;
  template <typename Body>
  void for_outputs(const T* d, int64_t chunks, Body body) const;
};

}  // namespace pf
