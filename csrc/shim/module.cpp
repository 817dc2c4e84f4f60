// The Python module: importing it registers the operators; it says how it was built, and nothing more. In Python's own
// C API: for two functions without arguments a binding library's templates would cost more than any other file here.
#include <Python.h>

#include "../probmoe.h"

#define PM_TEXT_(x) #x
#define PM_TEXT(x) PM_TEXT_(x)

namespace {

PyObject *instruction_set(PyObject *, PyObject *) { return PyUnicode_FromString(pm_instruction_set()); }

PyObject *build_info(PyObject *, PyObject *) {
#if defined(PM_CUDA_VERSION)
  const char *const cuda = PM_CUDA_VERSION, *const architectures = PM_CUDA_ARCHITECTURES;
#else
  const char *const cuda = nullptr, *const architectures = "";
#endif
  PyObject *const info =
      Py_BuildValue("{s:s,s:s,s:s,s:s,s:z,s:s}", "version",
                    PM_TEXT(PM_VERSION_MAJOR) "." PM_TEXT(PM_VERSION_MINOR) "." PM_TEXT(PM_VERSION_PATCH), "compiler",
                    __VERSION__, "torch_target_version", PM_TEXT(TORCH_TARGET_VERSION), "built_with_torch",
                    PM_TORCH_VERSION, "cuda", cuda, "cuda_architectures", architectures);
#if defined(PM_CUDA_ABSENCE)
  PyObject *const absence = info ? PyUnicode_FromString(PM_CUDA_ABSENCE) : nullptr;
  const bool stored = absence && PyDict_SetItemString(info, "cuda_absence", absence) == 0;
  Py_XDECREF(absence);
  if (!stored) {
    Py_XDECREF(info);
    return nullptr;
  }
#endif
  return info;
}

PyMethodDef functions[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Instruction set of the CPU kernels in use."},
    {"build_info", build_info, METH_NOARGS, "How this build was made: version, compiler, torch, CUDA."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "probmoe_ext's compiled core", -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
