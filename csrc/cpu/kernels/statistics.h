#pragma once
#include "cpu/kernels.h"

namespace pf::cpu::PF_ISA {

template <typename T>
double dot(const T* a, const T* b, int64_t n);

template <typename T>
void gram(const Pixels<T>& x, const T* pivot, int64_t first, int64_t last, double* sum, double* gram, T* scratch);

template <typename T>
void quadratic(const T* w, int64_t rows, int64_t n, const double* mean, const double* panel, double* mean_out,
               double* out, double* scratch);

}  // namespace pf::cpu::PF_ISA
