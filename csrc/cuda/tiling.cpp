// The shape of a tile: least memory traffic within 48 KB of shared memory and max_threads.
#include <algorithm>

#include "cuda/kernels.h"

namespace pf::cuda {
namespace {

constexpr int shared_limit = 48 * 1024;
// Blocks in flight on the largest cards are about 1000 (forward) and half of that where each block also writes a weight
// gradient. A constant, so that the order of summation does not depend on the card.
constexpr int forward_blocks = 1024, backward_blocks = 512;

int divide_up(int a, int b) { return (a + b - 1) / b; }

int accumulate_size(ElementType type) { return type == ElementType::f64 ? 8 : 4; }
int element_size(ElementType type) { return type == ElementType::f64 ? 8 : type == ElementType::f32 ? 4 : 2; }

// What the expansion keeps in shared memory: three rows of its norm, and its weights in steps of 16 inputs.
int expand_bytes(const KernelShape& s, int expand) {
  return expand == 0 ? 0 : chunk_bytes / element_size(s.type) * (3 * 4 + divide_up(expand, 16) * 16 * 2);
}

struct Cost {
  int loaded_pixels, shared_bytes;
};

template <typename CostOf>
Tiling choose(const KernelShape& s, int rows, int columns, int strip, int row_step, int blocks, const CostOf& cost_of) {
  const int chunk = chunk_bytes / element_size(s.type), quads = chunk / quad;
  Tiling best{};
  int64_t least = -1;
  for (int strips = 1; strips <= 8; strips *= 2) {
    const int width = strip * strips;
    if (strips > 1 && width / 2 >= columns) break;
    for (int height = row_step; height * strips * quads <= max_threads && height < rows + row_step;
         height += row_step) {
      const int threads = std::max(divide_up(height * strips * quads, 32) * 32, least_threads);
      const Cost cost = cost_of(height, width, threads);
      if (cost.shared_bytes > shared_limit) break;
      const int down = divide_up(rows, height), across = divide_up(columns, width);
      const int64_t traffic = int64_t{down} * across * (cost.loaded_pixels + height * width);
      if (least >= 0 && traffic >= least) continue;
      least = traffic;
      best = {height, width, down, across, 0, 0, threads, cost.shared_bytes};
    }
  }
  best.chunks = divide_up(s.channels, chunk);
  best.groups = static_cast<int>(std::min<int64_t>(best.tiles(s), std::max(1, blocks / best.chunks)));
  return best;
}

}  // namespace

Tiling forward_tiling(const KernelShape& s, int expand) {
  const int chunk = chunk_bytes / element_size(s.type), wide = accumulate_size(s.type);
  const int prologue = expand == 0 ? 2 * chunk * wide : expand_bytes(s, expand);
  return choose(s, s.out_height, s.out_width, forward_strip, 1, forward_blocks,
                [&](int height, int width, int threads) {
                  const int pixels = ((height - 1) * s.stride + s.kernel) * ((width - 1) * s.stride + s.kernel);
                  const int tile = s.kernel * s.kernel * chunk * wide + prologue + pixels * chunk_bytes;
                  const int statistics = threads * (2 * quad * wide + static_cast<int>(sizeof(int)));
                  return Cost{pixels, std::max(tile, statistics)};
                });
}

Tiling backward_tiling(const KernelShape& s, int expand) {
  const int chunk = chunk_bytes / element_size(s.type), quads = chunk / quad, wide = accumulate_size(s.type);
  const int strip = backward_strip(s.stride), prologue = expand == 0 ? 2 * chunk * wide : expand_bytes(s, expand);
  return choose(s, s.height, s.width, strip, s.stride, backward_blocks, [&](int height, int width, int threads) {
    const int pad = s.kernel / 2, around = pad / s.stride + 1;
    const int pixels = ((height - 1 + pad) / s.stride + around) * ((width - 1 + pad) / s.stride + around);
    const int tiles = (s.kernel * s.kernel + 4) * chunk * wide + prologue + (pixels + height * width) * chunk_bytes;
    const int weights = threads / quads / s.kernel * s.kernel * s.kernel * chunk * wide;
    return Cost{2 * pixels, std::max(tiles, weights)};
  });
}

}  // namespace pf::cuda
