// The one list of every op. Implementations register by dispatch key in the file of their family, autograd in
// autograd.cpp (depthwise: in proxyless_fast/ops), fake kernels in proxyless_fast/ops.
#include <torch/library.h>

TORCH_LIBRARY(proxyless_fast, m) {
  m.def("gram(Tensor x) -> (Tensor mean, Tensor cov)");
  m.def("gate_dot(Tensor a, Tensor b) -> Tensor");
  // <grad, BN(y)>, statistics ending in the mean and the variance of the norm.
  m.def("norm_dot(Tensor grad, Tensor y, Tensor statistics, Tensor gamma, Tensor beta, float eps) -> Tensor");

  // params: expand weight, gamma, beta (absent where there is no expand convolution), depthwise weight, gamma, beta,
  // project weight, gamma, beta. group: of the processes that share the batch, whose statistics it then has, by
  // torch.distributed's name; empty: this process alone. running: mean and variance of each of the batch norms, in the
  // same order; read only if not training. statistics: the same, as the batch has them, in one float64 vector.
  // shortcut: x is added to out.
  m.def(
      "mbconv(Tensor x, Tensor[] params, Tensor[] running, Tensor? mean, Tensor? cov, int stride, str activation, "
      "bool training, float eps, int keep, bool shortcut=False, str group=\"\") -> (Tensor out, Tensor y, Tensor d, "
      "Tensor "
      "statistics)");
  m.def(
      "mbconv_backward(Tensor grad, Tensor x, Tensor y, Tensor d, Tensor statistics, Tensor[] params, Tensor? mean, "
      "Tensor? cov, int stride, str activation, bool training, float eps, bool input, bool weights, "
      "bool shortcut=False, str group=\"\") -> "
      "(Tensor dx, Tensor[] dparams)");
  m.def(
      "mbconv_probe(Tensor x, Tensor grad, Tensor[] params, Tensor(a!)[] running, int[] sizes, Tensor? mean, Tensor? "
      "cov, "
      "int stride, str activation, bool training, float momentum, float eps, str group=\"\") -> Tensor");

  // statistics: mean and variance in use, one after the other, float64; running: both, read only if not training.
  m.def(
      "batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor[] running, str activation, bool training, "
      "float eps, str group=\"\") -> (Tensor out, Tensor statistics)");
  m.def(
      "batch_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor statistics, str activation, "
      "bool training, float eps, str group=\"\") -> (Tensor dx, Tensor dweight, Tensor dbias)");

  // A dense convolution with few inputs, its norm and activation; mean, cov: of the windows under the output pixels.
  m.def(
      "conv_norm_act(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor[] running, int stride, "
      "str activation, bool training, float eps) -> (Tensor out, Tensor statistics, Tensor mean, Tensor cov)");
  m.def(
      "conv_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor statistics, "
      "Tensor mean, Tensor cov, int stride, str activation, bool training, float eps) -> "
      "(Tensor dweight, Tensor dgamma, Tensor dbeta)");

  m.def(
      "update_running(Tensor statistics, Tensor(a!)[] running, int pixels_in, int pixels_out, float momentum, "
      "str group=\"\") -> ()");

  // Depthwise convolution with batch-norm prologues: generic/ for every device, cuda/ where it is built.
  m.def(
      "depthwise_forward(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int stride)"
      " -> (Tensor d, Tensor mean, Tensor var)");
  m.def(
      "depthwise_backward(Tensor dz, Tensor? d, Tensor? affine, Tensor x, Tensor? scale, Tensor? shift, Tensor weight,"
      " int stride, bool mask) -> (Tensor q, Tensor dw)");
  m.def(
      "depthwise_backward_input(Tensor dz, Tensor? d, Tensor? affine, Tensor x, Tensor? scale, Tensor? shift,"
      " Tensor weight, int stride, bool mask) -> Tensor");
  m.def(
      "depthwise_backward_weight(Tensor dz, Tensor? d, Tensor? affine, Tensor x, Tensor? scale, Tensor? shift,"
      " Tensor weight, int stride) -> Tensor");

  // The same of e = activation(BN1(x w1^T)), which is not stored where kernels of ours run. norm1: (4, channels), mean,
  // inverse deviation, scale, shift.
  m.def(
      "expand_depthwise_forward(Tensor x, Tensor w1, Tensor norm1, Tensor weight, int stride, str activation)"
      " -> (Tensor d, Tensor mean, Tensor var)");
  m.def(
      "expand_depthwise_backward(Tensor dz, Tensor? d, Tensor? affine, Tensor x, Tensor w1, Tensor norm1,"
      " Tensor weight, int stride, str activation) -> (Tensor de, Tensor dw)");
}
