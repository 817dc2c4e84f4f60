// The Python module: importing it registers the operators; it says how it was built, and nothing more.
#include <pybind11/pybind11.h>

#include "../probmoe.h"

#define PM_TEXT_(x) #x
#define PM_TEXT(x) PM_TEXT_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "probmoe_ext's compiled core";
  m.def("instruction_set", &pm_instruction_set, "Instruction set of the CPU kernels in use.");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = PM_TEXT(PM_VERSION_MAJOR) "." PM_TEXT(PM_VERSION_MINOR) "." PM_TEXT(PM_VERSION_PATCH);
        info["compiler"] = __VERSION__;
        info["torch_target_version"] = PM_TEXT(TORCH_TARGET_VERSION);
        info["built_with_torch"] = PM_TORCH_VERSION;
#if defined(PM_CUDA_VERSION)
        info["cuda"] = PM_CUDA_VERSION;
        info["cuda_architectures"] = PM_CUDA_ARCHITECTURES;
#else
        info["cuda"] = pybind11::none();
        info["cuda_architectures"] = "";
        info["cuda_absence"] = PM_CUDA_ABSENCE;
#endif
        return info;
      },
      "How this build was made: version, compiler, torch, CUDA.");
}
