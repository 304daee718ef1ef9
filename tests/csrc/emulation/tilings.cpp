// For every line "backward type batch channels height width kernel stride expand" the tiling the host would choose.
#include <cstdio>

#include "cuda/kernels.h"

int main() {
  int backward, type, expand;
  pf::cuda::KernelShape s{};
  while (std::scanf("%d %d %d %d %d %d %d %d %d", &backward, &type, &s.batch, &s.channels, &s.height, &s.width,
                    &s.kernel, &s.stride, &expand) == 9) {
    s.type = static_cast<pf::cuda::ElementType>(type);
    s.out_height = (s.height - 1) / s.stride + 1;
    s.out_width = (s.width - 1) / s.stride + 1;
    const auto t = backward != 0 ? pf::cuda::backward_tiling(s, expand) : pf::cuda::forward_tiling(s, expand);
    std::printf("%d %d %d %d %d %d %d %d\n", t.height, t.width, t.down, t.across, t.groups, t.chunks, t.threads,
                t.shared_bytes);
  }
}
