// The Python module: importing it registers the operators of the other sources. Python's limited
// API, so that one build serves every Python from 3.11 on.
#include <Python.h>

#if defined(__AVX512F__)
#define ISA "avx512"
#elif defined(__AVX2__)
#define ISA "avx2"
#else
#define ISA "baseline"
#endif
#define INIT_OF(name) PyInit_##name
#define INIT(name) INIT_OF(name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "dfm_fast._C"};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "isa", ISA) < 0) return nullptr;
  return module;
}
