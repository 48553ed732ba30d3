// Forward mode and second derivatives on the CUDA engine as Python functions.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/second.h"

namespace lstm_ext {

// Every argument is described in cuda/second.h; addresses are the device's.
inline void bind_second(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  using Address = std::uintptr_t;
  static constexpr auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
  py::class_<CudaSecond>(m, "CudaSecond", py::module_local())
      .def(py::init([](int dtype, bool tf32, int device, Address stream, const Steps& steps,
                       int64_t H, int64_t P, Address gates, Address c_seq, Address c0) {
             return CudaSecond{static_cast<Dtype>(dtype),
                               tf32,
                               device,
                               pointer(stream),
                               steps,
                               H,
                               P,
                               pointer(gates),
                               pointer(c_seq),
                               pointer(c0)};
           }),
           py::kw_only(), "dtype"_a, "tf32"_a, "device"_a, "stream"_a, "steps"_a, "H"_a, "P"_a,
           "gates"_a, "c_seq"_a, "c0"_a);
  py::class_<CudaSecondSide>(m, "CudaSecondSide", py::module_local())
      .def(py::init([](Address dy, int64_t dy_stride, Address dcells, Address dh_n, Address dc_n,
                       Address h0, Address y, int64_t y_stride, Address dgates, Address h_prev,
                       Address dr) {
             return CudaSecondSide{pointer(dy),     dy_stride,       pointer(dcells), pointer(dh_n),
                                   pointer(dc_n),   pointer(h0),     pointer(y),      y_stride,
                                   pointer(dgates), pointer(h_prev), pointer(dr)};
           }),
           py::kw_only(), "dy"_a, "dy_stride"_a, "dcells"_a, "dh_n"_a, "dc_n"_a, "h0"_a, "y"_a,
           "y_stride"_a, "dgates"_a, "h_prev"_a, "dr"_a);
  m.def("cuda_tangents_workspace", &cuda_tangents_workspace, "second"_a, "projection"_a);
  m.def("cuda_second_workspace", &cuda_second_workspace, "second"_a, "projection"_a);
  m.def(
      "cuda_tangents",
      [](const CudaSecond& second, Address workspace, Address gates, Address gates_after,
         Address gates_first, Address h_more, Address w_hh, Address w_hr, Address c0, Address state,
         Address c_seq, Address cell_out, Address y, int64_t y_stride, Address h_n, Address c_n) {
        const CudaTangents tangents = {
            pointer(gates), pointer(gates_after), pointer(gates_first), pointer(h_more),
            pointer(w_hh),  pointer(w_hr),        pointer(c0),          pointer(state),
            pointer(c_seq), pointer(cell_out),    pointer(y),           y_stride,
            pointer(h_n),   pointer(c_n)};
        cuda_tangents(second, tangents, pointer(workspace));
      },
      "second"_a, "workspace"_a, py::kw_only(), "gates"_a, "gates_after"_a, "gates_first"_a,
      "h_more"_a, "w_hh"_a, "w_hr"_a, "c0"_a, "state"_a, "c_seq"_a, "cell_out"_a, "y"_a,
      "y_stride"_a, "h_n"_a, "c_n"_a, py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_second",
      [](const CudaSecond& second, Address workspace, const CudaSecondSide& backward,
         const CudaSecondSide& tangent, Address gates_dot, Address c_seq_dot, Address c0_dot,
         Address w_hh, Address w_hr, Address v_hh, Address v_hr, Address dh0, Address dc0) {
        const CudaSecondBackward both = {
            {backward, tangent}, pointer(gates_dot), pointer(c_seq_dot), pointer(c0_dot),
            pointer(w_hh),       pointer(w_hr),      pointer(v_hh),      pointer(v_hr),
            pointer(dh0),        pointer(dc0)};
        cuda_second(second, both, pointer(workspace));
      },
      "second"_a, "workspace"_a, "backward"_a, "tangent"_a, py::kw_only(), "gates_dot"_a,
      "c_seq_dot"_a, "c0_dot"_a, "w_hh"_a, "w_hr"_a, "v_hh"_a, "v_hr"_a, "dh0"_a, "dc0"_a,
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace lstm_ext
