// The matrix product of the passes. Operands are in blocks (cpu/mbconv.h).
#pragma once
#include "cpu/kernels/vec.h"
#include "cpu/mbconv.h"

namespace pf::cpu::PF_ISA {

enum class Out { store, add, clamp };  // C = AB, C += AB, C = clamp(AB + bias)

// Brings the next tile of a wide tensor (or of two alike) into the second-level cache, line by line between the steps
// of a product: the product is bound by the multipliers, and what comes after it would wait for memory.
template <typename T>
struct Ahead {
  const T* next;
  int64_t block_size, pixels, left;
  const T* also = nullptr;
  int64_t pixel = 0;
  PF_INLINE void one() {
    if (left == 0) return;
    __builtin_prefetch(next + pixel * lanes, 0, 2);
    if (also != nullptr) __builtin_prefetch(also + pixel * lanes, 0, 2);
    --left;
    if (++pixel < pixels) return;
    pixel = 0, next += block_size;
    if (also != nullptr) also += block_size;
  }
};

template <typename T>
struct ProductArgs {
  const T* a;  // [k / 16][a_block elements: row * 16 + k % 16], or transposed [k * 16 + row]
  int64_t a_block;
  const T* b;  // [block][k * 16 + column]
  int64_t b_block;
  int64_t k;
  T* c;  // [block][row * 16 + column]
  int64_t c_block;
  Out out;
  const T* bias = nullptr;  // [block][16]
  T low = 0, high = 0;
  Ahead<T>* ahead = nullptr;
};

// C over `rows` rows and `columns` blocks. Transposed: A is given as [k][row], at most 16 rows.
template <typename T, bool Transposed = false>
void product(int64_t rows, int64_t columns, const ProductArgs<T>& all);

}  // namespace pf::cpu::PF_ISA
