// Host entries of the two reductions: arguments checked once, memory and threads here, arithmetic in cpu/kernels.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops/checks.h"
#include "cpu/ops/memory.h"
#include "cpu/ops/parallel.h"

namespace pf {
namespace {

using at::Tensor;

bool is_real(const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble; }

// Memory order of a tensor without gaps or overlap, so that two tensors of equal strides can be read flat.
bool same_dense_layout(const Tensor& a, const Tensor& b) {
  return a.is_non_overlapping_and_dense() && a.strides() == b.strides();
}

// Work is cut into chunks of fixed size, not per thread: the order of summation, and so every bit of the result, is the
// same for any number of threads.
constexpr int64_t dot_chunk = 1 << 16;
constexpr int64_t gram_chunks = 64;

Tensor gate_dot(const Tensor& a, const Tensor& b) {
  require_given("gate_dot", "a", a);
  require_given("gate_dot", "b", b);
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), "gate_dot: a and b must have the same shape, got ", a.sizes(), " and ",
                    b.sizes());
  TORCH_CHECK_VALUE(is_real(a) && a.scalar_type() == b.scalar_type(),
                    "gate_dot: a and b must both be float32 or both float64, got ", a.scalar_type(), " and ",
                    b.scalar_type());
  Tensor x = a, y = b;
  if (!same_dense_layout(x, y)) {
    x = a.contiguous();
    y = b.contiguous();
  }
  const int64_t n = x.numel(), chunks = (n + dot_chunk - 1) / dot_chunk;
  std::vector<double> partial(static_cast<size_t>(chunks));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gate_dot", [&] {
    const auto* px = x.const_data_ptr<scalar_t>();
    const auto* py = y.const_data_ptr<scalar_t>();
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i * dot_chunk;
        partial[static_cast<size_t>(i)] =
            cpu::kernels_for<scalar_t>().dot(px + start, py + start, std::min(dot_chunk, n - start));
      }
    });
  });
  double total = 0;
  for (double p : partial) total += p;
  return at::scalar_tensor(total, x.options());
}

template <typename T>
cpu::Pixels<T> as_pixels(const Tensor& x) {
  // The two pixel dimensions must be one walk through memory: true for contiguous and channels_last tensors. The stride
  // of a dimension of size 1 may be anything.
  const int64_t step = x.size(3) > 1 ? x.stride(3) : x.stride(2);
  return {x.const_data_ptr<T>(), x.size(0), x.size(2) * x.size(3), x.size(1), x.stride(0), step, x.stride(1)};
}

std::tuple<Tensor, Tensor> gram(const Tensor& input) {
  require_real_image("gram", "x", input);
  const bool line = input.size(2) == 1 || input.size(3) == 1;
  const bool one_walk = line || input.stride(2) == input.stride(3) * input.size(3);
  const Tensor x = one_walk ? input : input.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t c = x.size(1), rows = x.size(0) * x.size(2) * x.size(3);
  const int64_t chunks = std::min(gram_chunks, (rows + 255) / 256), chunk = (rows + chunks - 1) / chunks;
  Tensor mean = at::empty({c}, x.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor cov = at::empty({c, c}, x.options().memory_format(at::MemoryFormat::Contiguous));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gram", [&] {
    const auto pixels = as_pixels<scalar_t>(x);
    // A pivot near the mean saves the digits that the squares of far values would cost: the mean of a few pixels.
    std::vector<double> near(static_cast<size_t>(c), 0.0);
    std::vector<scalar_t> pivot(static_cast<size_t>(c));
    const int64_t sampled = std::min<int64_t>(rows, 64), step = rows / sampled;
    for (int64_t k = 0; k < sampled; ++k) {
      const int64_t row = k * step, n = row / pixels.pixels, p = row % pixels.pixels;
      const auto* values = pixels.data + n * pixels.stride_n + p * pixels.stride_p;
      for (int64_t i = 0; i < c; ++i) near[static_cast<size_t>(i)] += static_cast<double>(values[i * pixels.stride_c]);
    }
    for (size_t i = 0; i < near.size(); ++i) pivot[i] = static_cast<scalar_t>(near[i] / static_cast<double>(sampled));
    const int64_t size = c + c * c;
    const Workspace memory(static_cast<size_t>(chunks * size) * sizeof(double));
    auto* partial = memory.as<double>();
    share_pieces(chunks, [&](const auto& take) {
      const Workspace scratch(static_cast<size_t>(cpu::gram_scratch(c)) * sizeof(scalar_t));
      for (int64_t i = take(); i >= 0; i = take()) {
        double* sum = partial + i * size;
        std::fill_n(sum, size, 0.0);
        cpu::kernels_for<scalar_t>().gram(pixels, pivot.data(), i * chunk, std::min(rows, (i + 1) * chunk), sum,
                                          sum + c, scratch.as<scalar_t>());
      }
    });
    at::parallel_for(0, size, 1 << 13, [&](int64_t begin, int64_t end) {
      for (int64_t i = 1; i < chunks; ++i)
        for (int64_t j = begin; j < end; ++j) partial[j] += partial[i * size + j];
    });
    const double* sum = partial;
    const double* second = sum + c;
    const double n = static_cast<double>(rows);
    auto* pm = mean.mutable_data_ptr<scalar_t>();
    auto* pc = cov.mutable_data_ptr<scalar_t>();
    std::vector<double> offset(sum, sum + c);
    for (int64_t i = 0; i < c; ++i) {
      offset[static_cast<size_t>(i)] /= n;
      pm[i] =
          static_cast<scalar_t>(static_cast<double>(pivot[static_cast<size_t>(i)]) + offset[static_cast<size_t>(i)]);
    }
    const double share = 1 / n;
    for (int64_t i = 0; i < c; ++i) {
      const double own = offset[static_cast<size_t>(i)];
      for (int64_t j = i; j < c; ++j)
        pc[i * c + j] = static_cast<scalar_t>(second[i * c + j] * share - own * offset[static_cast<size_t>(j)]);
      for (int64_t j = 0; j < i; ++j) pc[i * c + j] = pc[j * c + i];
    }
  });
  return {mean, cov};
}

}  // namespace

TORCH_LIBRARY_IMPL(proxyless_fast, CPU, m) {
  m.impl("gram", &gram);
  m.impl("gate_dot", &gate_dot);
}

}  // namespace pf
