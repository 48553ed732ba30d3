// How the Python face calls a CPU kernel.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind_memory.h"
#include "cpu/kernels.h"

namespace lstm_ext {

inline const CpuKernels& checked_cpu_kernels(bool bf16_products) {
  const CpuKernels& kernels = cpu_kernels();
  if (bf16_products && !kernels.bf16_products) {
    throw std::invalid_argument(std::string("the CPU kernels ") + kernels.name +
                                " do not multiply bf16");
  }
  return kernels;
}

// Runs a kernel in the tensor that workspace(bytes) returns, without the interpreter's lock.
template <class Params>
void run_core(void (*kernel)(const Params&), int64_t (*bytes)(const Params&), Params params,
              const pybind11::function& workspace) {
  const pybind11::object scratch = workspace(bytes(params));
  params.workspace = memory_of(scratch);
  const pybind11::gil_scoped_release release;
  kernel(params);
}

}  // namespace lstm_ext
