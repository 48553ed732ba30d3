// The CUDA engine on the emulator, as a Python module like _C: the project's Python code runs the
// very kernels that a GPU would run.
#include <pybind11/pybind11.h>

#include "bind_steps.h"
#include "bind_variants.h"
#include "cuda/bindings.h"
#include "cuda_runtime.h"

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels on a CPU; for tests.";
  lstm_ext::bind_steps(m);
  lstm_ext::bind_variants(m);
  lstm_ext::bind_cuda(m);
  m.def("set_seed", [](unsigned long seed) { emu::g_seed = seed; });
  m.def("set_device", [](unsigned sm_count, size_t shared_bytes) {
    emu::g_device.sm_count = sm_count;
    emu::g_device.shared_per_block = shared_bytes;
  });
}
