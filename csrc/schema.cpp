// The one list of every op. Implementations register by dispatch key in the file of their family; fake kernels and
// autograd formulas stand in proxyless_fast/ops.
#include <torch/library.h>

TORCH_LIBRARY(proxyless_fast, m) {
  m.def("gram(Tensor x) -> (Tensor mean, Tensor cov)");
  m.def("gate_dot(Tensor a, Tensor b) -> Tensor");
}
