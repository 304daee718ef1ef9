// Which instruction set runs: decided once, at load.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pf::cpu {
namespace baseline {
extern const Kernels table;
}
#ifdef PF_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef PF_HAVE_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

// Best first; only what this processor can run.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> tables;
#ifdef PF_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    tables.push_back(&avx512::table);
#endif
#ifdef PF_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::table);
#endif
  tables.push_back(&baseline::table);
  return tables;
}

const Kernels& choose() {
  const auto tables = usable();
  const char* wanted = std::getenv("PROXYLESS_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.front();
  std::string names;
  for (const auto* table : tables) {
    if (table->name == std::string(wanted)) return *table;
    names += std::string(names.empty() ? "" : ", ") + table->name;
  }
  throw std::invalid_argument("PROXYLESS_FAST_ISA is '" + std::string(wanted) + "', but this machine runs: " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

template <>
const KernelsFor<float>& kernels_for<float>() {
  return kernels().f32;
}
template <>
const KernelsFor<double>& kernels_for<double>() {
  return kernels().f64;
}

}  // namespace pf::cpu
