// The table that csrc/cpu/dispatch.cpp chooses from; compiled once per instruction set, like every file here.
#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/conv.h"
#include "cpu/kernels/mbconv.h"
#include "cpu/kernels/statistics.h"

#define PF_STRING_(x) #x
#define PF_STRING(x) PF_STRING_(x)

namespace pf::cpu::PF_ISA {

template <typename T>
constexpr KernelsFor<T> entries() {
  return {.dot = dot<T>,
          .gram = gram<T>,
          .quadratic = quadratic<T>,
          .expand_depthwise = expand_depthwise<T>,
          .project = project<T>,
          .probe = probe<T>,
          .affine = affine<T>,
          .pair_sums = pair_sums<T>,
          .backward_project = backward_project<T>,
          .backward_expand = backward_expand<T>,
          .finish_dx = finish_dx<T>,
          .conv_gram = conv_gram<T>,
          .conv_forward = conv_forward<T>,
          .conv_backward = conv_backward<T>,
          .norm_moments = norm_moments<T>,
          .norm_forward = norm_forward<T>,
          .norm_sums = norm_sums<T>,
          .norm_backward = norm_backward<T>};
}

extern const Kernels table;
const Kernels table = {PF_STRING(PF_ISA), entries<float>(), entries<double>()};

}  // namespace pf::cpu::PF_ISA
