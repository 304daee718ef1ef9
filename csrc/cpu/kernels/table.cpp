// The table that csrc/cpu/dispatch.cpp chooses from; compiled once per instruction set, like every file here.
#include "kernels/statistics.h"

#define PF_STRING_(x) #x
#define PF_STRING(x) PF_STRING_(x)

namespace pf::cpu::PF_ISA {

template <typename T>
constexpr KernelsFor<T> entries() {
  return {.dot = dot<T>, .gram = gram<T>};
}

extern const Kernels table;
const Kernels table = {PF_STRING(PF_ISA), entries<float>(), entries<double>()};

}  // namespace pf::cpu::PF_ISA
