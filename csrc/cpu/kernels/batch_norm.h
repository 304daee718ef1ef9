#pragma once
#include "cpu/batch_norm.h"

namespace pf::cpu::PF_ISA {

template <typename T>
void norm_moments(const T* x, int64_t rows, int64_t channels, const Moments& moments);
template <typename T>
void norm_forward(const NormArgs<T>& f, const T* x, int64_t rows, T* out);
template <typename T>
void norm_sums(const NormArgs<T>& f, const T* grad, const T* x, int64_t rows, double* sum, double* sum_x);
template <typename T>
void norm_backward(const NormArgs<T>& f, const T* grad, const T* x, int64_t rows, const T* slope, const T* offset,
                   T* dx);

}  // namespace pf::cpu::PF_ISA
