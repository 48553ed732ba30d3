// Steps of params.h as a Python class, for each module that has an engine.
#pragma once

#include <pybind11/pybind11.h>

#include "params.h"

namespace lstm_ext {

inline void bind_steps(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  const auto make = [](int64_t T, int64_t B, int64_t rows, int64_t stride_t, int64_t stride_b,
                       std::uintptr_t offsets, std::uintptr_t lengths, std::uintptr_t reset,
                       bool reverse) {
    return Steps{T,
                 B,
                 rows,
                 stride_t,
                 stride_b,
                 reinterpret_cast<const int64_t*>(offsets),
                 reinterpret_cast<const int64_t*>(lengths),
                 reinterpret_cast<const uint8_t*>(reset),
                 reverse};
  };
  // Local: another module in the process may have one of its own.
  py::class_<Steps>(m, "Steps", py::module_local())
      .def(py::init(make), py::kw_only(), "T"_a, "B"_a, "rows"_a, "stride_t"_a, "stride_b"_a,
           "offsets"_a, "lengths"_a, "reset"_a, "reverse"_a);
}

}  // namespace lstm_ext
