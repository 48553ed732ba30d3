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

// One direction of a layer, or two, at once where that takes less time. Not if a variant of one
// keeps its products from being bf16.
template <class P>
void run_directions(const LayerKernels<P>& kernels, const P& first, const P* second,
                    const pybind11::function& workspace) {
  if (second && second->dtype == first.dtype && second->bf16_products == first.bf16_products &&
      kernels.side_by_side(first)) {
    const OfTwo<P> both{first, *second};
    return run_core(kernels.run_of_two, kernels.workspace_of_two, both, workspace);
  }
  run_core(kernels.run, kernels.workspace, first, workspace);
  if (second) run_core(kernels.run, kernels.workspace, *second, workspace);
}

}  // namespace lstm_ext
