// What Python asks of the build, its memory and of modules; the ops are reached through torch.ops.proxyless_fast.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "cpu/ops/memory.h"
#include "modules.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of proxyless_fast; importing it registers torch.ops.proxyless_fast.";
  m.def("instruction_set", [] { return pf::cpu::kernels().name; }, "The instruction set the CPU kernels run with.");
  m.def("release_memory", &pf::release_memory,
        "Give the memory that the CPU ops keep between steps and do not use now back to the system.");
  m.def("copy_behind", &pf::copy_behind, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Copy pieces of memory, by address and bytes, one behind the other, to an address.");
  m.def("objects_of", &pf::objects_of, "Every object that calling a torch module depends on, its children's too.");
  m.def("has_objects", &pf::has_objects, "Whether objects_of(module) would be the very same objects as these.");
  m.def("versions_of", &pf::versions_of, "Which tensors a module's parameters are, and how often each was changed.");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = PF_TORCH_VERSION;
        info["compiler"] = __VERSION__;
        pybind11::list sets;
        sets.append("baseline");
#ifdef PF_HAVE_AVX2
        sets.append("avx2");
#endif
#ifdef PF_HAVE_AVX512
        sets.append("avx512");
#endif
        info["instruction_sets"] = sets;
#ifdef _OPENMP
        info["openmp"] = true;  // otherwise at::parallel_for is a plain loop
#else
        info["openmp"] = false;
#endif
#ifdef PF_HAVE_CUDA
        info["cuda"] = true;
#else
        info["cuda"] = false;
#endif
        return info;
      },
      "What was built: torch version, compiler, instruction sets, OpenMP, CUDA.");
}
