#pragma once
#include "cpu/conv.h"

namespace pf::cpu::PF_ISA {

template <typename T>
void conv_gram(const ConvArgs<T>& f, int64_t first, int64_t last, double* sum, double* gram, T* scratch);
template <typename T>
void conv_forward(const ConvArgs<T>& f, int64_t first, int64_t last, T* out, T* scratch);
template <typename T>
void conv_backward(const ConvArgs<T>& f, int64_t first, int64_t last, const T* grad, double* sum_q, T* dweight,
                   T* scratch);

}  // namespace pf::cpu::PF_ISA
