// CUDA for one block at a time on the CPU: as many threads as the block has, a barrier, shared memory of exactly the
// size asked for (so that AddressSanitizer sees what reaches over it) and filled with NaN (so that results show what
// was read before it was written). Real threads, so that ThreadSanitizer sees a missing __syncthreads(). Warps, so that
// the tensor cores' instruction waits for all of its lanes: one that never comes is a hang, which the caller times.
#pragma once
#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define PF_EMULATION
#define __global__
#define __device__
#define __launch_bounds__(...)
#define PF_SHARED(name) unsigned char* name = pf::emulation::block->shared.get()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace pf::emulation {

struct FreeShared {
  void operator()(unsigned char* p) const { std::free(p); }
};

// What the lanes of a warp bring to a collective instruction: two sets, used in turn, so that one barrier each is
// enough (who writes a set has passed the barrier that all reach after they read it).
struct Warp {
  pthread_barrier_t barrier;
  uint32_t a[2][32][4], b[2][32][2];
};

struct ThreadBlock {
  pthread_barrier_t barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, FreeShared> shared;
};

inline ThreadBlock* block = nullptr;

inline thread_local int turn;

inline void barrier() { pthread_barrier_wait(&block->barrier); }

// kernel<<<grid, threads, shared_bytes>>>(), block after block.
template <typename Kernel>
void launch(dim3 grid, int threads, int shared_bytes, const Kernel& kernel) {
  ThreadBlock state;
  block = &state;
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  pthread_barrier_init(&state.barrier, nullptr, static_cast<unsigned>(threads));
  state.warps.resize(static_cast<size_t>(threads / 32));
  for (auto& warp : state.warps) pthread_barrier_init(&warp.barrier, nullptr, 32);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      threadIdx = {static_cast<unsigned>(t), 0, 0};
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          if (t == 0) {
            state.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(16, static_cast<size_t>(shared_bytes))));
            std::memset(state.shared.get(), 0xff, static_cast<size_t>(shared_bytes));
          }
          barrier();
          blockIdx = {x, y, 0};
          kernel();
          barrier();
        }
    });
  for (auto& thread : pool) thread.join();
  for (auto& warp : state.warps) pthread_barrier_destroy(&warp.barrier);
  pthread_barrier_destroy(&state.barrier);
}

}  // namespace pf::emulation

inline void __syncthreads() { pf::emulation::barrier(); }
inline void __syncwarp() {}  // no memory is passed between lanes, and ThreadSanitizer may see if it were

namespace pf::cuda {

// The two half types, as bits; narrowing rounds to the nearest, ties to even, as the device does.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }

inline float widen(Half x) {
  const int exponent = x.bits >> 10 & 31;
  const float mantissa = static_cast<float>(x.bits & 1023);
  float value = std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 0) value = std::ldexp(mantissa, -24);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return (x.bits & 0x8000) != 0 ? -value : value;
}

inline void narrow(float x, BFloat16& y) {
  const uint32_t bits = to_bits(x), odd = bits >> 16 & 1;
  y.bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + odd) >> 16);
}

inline void narrow(float x, Half& y) {
  const uint16_t sign = static_cast<uint16_t>(to_bits(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) {
    y.bits = 0x7fff;
  } else if (size >= 65520) {
    y.bits = sign | 0x7c00;
  } else {
    // In units of the last place: 2^-24 below the normal numbers.
    int exponent = size == 0 ? -14 : std::ilogb(size);
    exponent = exponent < -14 ? -14 : exponent;
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    y.bits = static_cast<uint16_t>(sign + ((exponent + 14) << 10) + units);  // a carry moves into the exponent
  }
}

}  // namespace pf::cuda

namespace pf::emulation {

// mma.sync.aligned.m16n8k16.row.col.f32 of two half types, by the fragment layout of the PTX ISA: with g = lane / 4 and
// t = lane % 4, element (row, k) of A is with g = row % 8, t = k % 8 / 2, in register row / 8 + k / 8 * 2, half k % 2;
// element (k, n) of B with g = n, t = k % 8 / 2, in register k / 8, half k % 2; a lane's four sums are rows g and g + 8
// of columns 2 t and 2 t + 1.
template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  const int set = turn;
  turn ^= 1;
  std::memcpy(warp.a[set][lane], a, sizeof(a));
  std::memcpy(warp.b[set][lane], b, sizeof(b));
  pthread_barrier_wait(&warp.barrier);
  const auto half = [](uint32_t pair, int i) { return widen(T{static_cast<uint16_t>(pair >> (16 * i))}); };
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + static_cast<unsigned>(i) / 2 * 8,
                   column = lane % 4 * 2 + static_cast<unsigned>(i) % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t left = warp.a[set][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t right = warp.b[set][column * 4 + k % 8 / 2][k / 8];
      sum[i] += half(left, k % 2) * half(right, k % 2);
    }
  }
}

}  // namespace pf::emulation
