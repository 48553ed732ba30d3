// Variants of params.h as a Python class, for each module that has an engine.
#pragma once

#include <pybind11/pybind11.h>

#include "params.h"

namespace lstm_ext {

inline void bind_variants(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  using Address = std::uintptr_t;
  const auto make = [](Address peephole, Address gamma_hh, Address gamma_ch, Address beta_ch,
                       double epsilon, Address h_dropout, Address keep_h, Address keep_c,
                       double keep_h_all, double keep_c_all) {
    const auto read = [](Address address) { return reinterpret_cast<const void*>(address); };
    return Variants{read(peephole),
                    read(gamma_hh),
                    read(gamma_ch),
                    read(beta_ch),
                    epsilon,
                    read(h_dropout),
                    reinterpret_cast<const uint8_t*>(keep_h),
                    reinterpret_cast<const uint8_t*>(keep_c),
                    keep_h_all,
                    keep_c_all};
  };
  // Local: another module in the process may have one of its own.
  py::class_<Variants>(m, "Variants", py::module_local())
      .def(py::init(make), py::kw_only(), "peephole"_a = 0, "gamma_hh"_a = 0, "gamma_ch"_a = 0,
           "beta_ch"_a = 0, "epsilon"_a = 0., "h_dropout"_a = 0, "keep_h"_a = 0, "keep_c"_a = 0,
           "keep_h_all"_a = 0., "keep_c_all"_a = 0.);
}

}  // namespace lstm_ext
