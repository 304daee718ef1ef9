// Runs the depthwise kernels on the CPU: `driver < request > answer`, both raw bytes in the order written below.
// tests/csrc/emulation/emulate.py speaks to it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/kernels.h"

using namespace pf::cuda;

namespace {

// A tensor of the request: exactly its size from malloc, so that AddressSanitizer sees what reaches over it; shifted by
// `skew` bytes off a 16-byte boundary.
struct Allocations {
  std::vector<unsigned char*> blocks;

  void* allocate(size_t bytes, size_t skew) {
    auto* block = static_cast<unsigned char*>(std::malloc(bytes + skew));
    std::memset(block, 0xff, bytes + skew);  // NaN in every type
    blocks.push_back(block);
    return block + skew;
  }
  ~Allocations() {
    for (auto* block : blocks) std::free(block);
  }
};

struct Request {
  int32_t backward, type, batch, channels, height, width, kernel, stride;
  int32_t prologue, affine, mask, want_q, want_dw, wide_weight, skew, groups;  // groups: at most, 0 for the tiling's
  int32_t expand, activation;  // channels of x where e is made from it, else 0
};

size_t element(ElementType type) { return type == ElementType::f64 ? 8 : type == ElementType::f32 ? 4 : 2; }

void* input(Allocations& buffer, size_t bytes, size_t skew = 0) {
  void* p = buffer.allocate(bytes, skew);
  if (std::fread(p, 1, bytes, stdin) != bytes) std::abort();
  return p;
}

void output(const void* p, size_t bytes) {
  if (std::fwrite(p, 1, bytes, stdout) != bytes) std::abort();
}

void run(const Request& r) {
  Allocations buffer;
  const KernelShape s{
      static_cast<ElementType>(r.type), r.batch,  r.channels, r.height, r.width, (r.height - 1) / r.stride + 1,
      (r.width - 1) / r.stride + 1,     r.kernel, r.stride};
  const size_t size = element(s.type), wide = s.type == ElementType::f64 ? 8 : 4, skew = static_cast<size_t>(r.skew);
  const auto pixels = [&](int h, int w) { return static_cast<size_t>(s.batch) * h * w * s.channels * size; };
  const size_t channels = static_cast<size_t>(s.channels), taps = static_cast<size_t>(s.kernel * s.kernel);
  const size_t in = pixels(s.height, s.width), out = pixels(s.out_height, s.out_width);
  const auto expand = static_cast<size_t>(r.expand);
  const void* x = input(buffer, expand == 0 ? in : in / channels * expand, skew);
  const void* weight = input(buffer, channels * taps * (r.wide_weight ? wide : size));
  const void* scale = r.prologue ? input(buffer, channels * wide) : nullptr;
  const void* shift = r.prologue ? input(buffer, channels * wide) : nullptr;
  const void* w1 = expand != 0 ? input(buffer, channels * expand * size) : nullptr;
  const void* norm = expand != 0 ? input(buffer, 4 * channels * wide) : nullptr;
  const ExpandArgs expansion{
      x, w1, norm, r.expand, static_cast<Activation>(r.activation), r.expand % 4 == 0 && r.skew % 8 == 0};
  const bool vectors = channels * size % 16 == 0 && r.skew == 0;
  auto tiling = r.backward ? backward_tiling(s, r.expand) : forward_tiling(s, r.expand);
  if (r.groups > 0 && r.groups < tiling.groups) tiling.groups = r.groups;
  const size_t groups = static_cast<size_t>(tiling.groups);
  if (!r.backward) {
    ForwardArgs p{s,
                  tiling,
                  x,
                  weight,
                  scale,
                  shift,
                  buffer.allocate(out, skew),
                  buffer.allocate(groups * 3 * channels * wide, 0),
                  buffer.allocate(channels * wide, 0),
                  buffer.allocate(channels * wide, 0),
                  r.wide_weight != 0,
                  vectors};
    expand != 0 ? launch(ExpandForwardArgs{p, expansion}, nullptr) : launch(p, nullptr);
    output(p.d, out);
    output(p.mean, channels * wide);
    output(p.var, channels * wide);
    return;
  }
  const void* dz = input(buffer, out, skew);
  const void* d = r.affine ? input(buffer, out, skew) : nullptr;
  const void* affine = r.affine ? input(buffer, 4 * channels * wide) : nullptr;
  BackwardArgs p{s,      tiling, dz,      d,       affine,  x,           scale,
                 shift,  weight, nullptr, nullptr, nullptr, r.mask != 0, r.wide_weight != 0,
                 vectors};
  if (r.want_q) p.q = buffer.allocate(in, skew);
  if (r.want_dw) {
    p.partial = buffer.allocate(groups * taps * channels * wide, 0);
    p.dw = buffer.allocate(channels * taps * wide, 0);
  }
  expand != 0 ? launch(ExpandBackwardArgs{p, expansion}, nullptr) : launch(p, nullptr);
  if (r.want_q) output(p.q, in);
  if (r.want_dw) output(p.dw, channels * taps * wide);
}

}  // namespace

int main() {
  Request request;
  while (std::fread(&request, sizeof(request), 1, stdin) == 1) run(request);
}
