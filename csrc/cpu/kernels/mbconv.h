#pragma once
#include "cpu/kernels.h"

namespace pf::cpu::PF_ISA {

template <typename T>
void expand_depthwise(const MBConvArgs<T>& f, const ForwardUnit& unit, T* d, int64_t d_block, Moments* moments,
                      T* scratch);
template <typename T>
void project(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, T* y, Moments* moments,
             T* scratch);
template <typename T>
void probe(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t d_block, Moments& moments,
           double* sum_g, double* sum_yg, T* scratch);
template <typename T>
void affine(const T* y, int64_t pixels, int64_t c, const T* mean, const T* scale, const T* bias, const T* add, T* out);
template <typename T>
void pair_sums(const T* g, const T* y, int64_t pixels, int64_t c, const T* mean, double* sum_g, double* sum_gy);
template <typename T>
void backward_project(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* d, int64_t wide_block, T* dz,
                      double* sum_dz, double* sum_dzd, T* dproject, T* scratch);
template <typename T>
void backward_expand(const MBConvArgs<T>& f, const InputStrip& strip, const T* d, const T* dz, int64_t wide_block,
                     T* dx, const ExpandSums<T>& sums, T* scratch);
template <typename T>
void finish_dx(const MBConvArgs<T>& f, int64_t first, int64_t last, const T* correction, const T* bias, const T* add,
               T* dx, T* scratch);

}  // namespace pf::cpu::PF_ISA
