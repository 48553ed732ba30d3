#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/arrange.h"
#include "cuda/bind_cuda_plain.h"
#include "cuda/bind_second.h"
#include "cuda/bind_vendor.h"
#include "cuda/engine.h"
#include "cuda/pointwise.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace lstm_ext {
namespace {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

CudaProblem problem(int dtype, bool tf32, bool backward, bool projection, bool variants,
                    bool normed, int directions, int64_t T, int64_t B, int64_t H, int64_t P) {
  return {static_cast<Dtype>(dtype),
          tf32,
          backward,
          projection,
          variants,
          normed,
          directions,
          T,
          B,
          H,
          P};
}

CudaLayer layer(int dtype, bool tf32, int device, int directions, const Steps& steps, int64_t H,
                int64_t P, bool variants, bool normed, const CudaPlan& plan) {
  const Dtype code = static_cast<Dtype>(dtype);
  return {code, tf32, device,          nullptr,  directions, steps,
          H,    P,    padded(P, code), variants, normed,     plan};
}

CudaForwardDirection forward_direction(bool reverse, Address gx, Address b_ih, Address b_hh,
                                       Address w_hh, Address w_hr, Address h0, Address c0,
                                       const Variants& variants, Address gates, Address c_seq,
                                       Address norm, Address norm_r, Address y, int64_t y_stride,
                                       Address h_n, Address c_n) {
  return {reverse,        pointer(gx),   pointer(b_ih),   pointer(b_hh), pointer(w_hh),
          pointer(w_hr),  pointer(h0),   pointer(c0),     variants,      pointer(gates),
          pointer(c_seq), pointer(norm), pointer(norm_r), pointer(y),    y_stride,
          pointer(h_n),   pointer(c_n)};
}

CudaBackwardDirection backward_direction(bool reverse, Address w_hh, Address w_hr, Address h0,
                                         Address c0, Address y, int64_t y_stride, Address gates,
                                         Address c_seq, const Variants& variants, Address norm,
                                         Address norm_r, Address dy, int64_t dy_stride,
                                         Address dh_n, Address dc_n, Address dcells, Address dgates,
                                         Address dproduct, Address cell_out, Address dpeephole,
                                         Address dnorm, Address h_prev, Address dr, Address dh0,
                                         Address dc0) {
  return {reverse,           pointer(w_hh),     pointer(w_hr),
          pointer(h0),       pointer(c0),       pointer(y),
          y_stride,          pointer(gates),    pointer(c_seq),
          variants,          pointer(norm),     pointer(norm_r),
          pointer(dy),       dy_stride,         pointer(dh_n),
          pointer(dc_n),     pointer(dcells),   pointer(dgates),
          pointer(dproduct), pointer(cell_out), pointer(dpeephole),
          pointer(dnorm),    pointer(h_prev),   pointer(dr),
          pointer(dh0),      pointer(dc0)};
}

CudaCell cell(int dtype, int64_t rows, int64_t width, Address a, Address h, Address c,
              Address peephole, Address lengths, Address stream) {
  return {static_cast<Dtype>(dtype),
          rows,
          width,
          pointer(a),
          pointer(h),
          pointer(c),
          pointer(peephole),
          pointer<const int64_t>(lengths),
          pointer(stream)};
}

template <class Direction>
void require(const CudaLayer& layer, const std::vector<Direction>& directions) {
  if (int64_t(directions.size()) != layer.directions)
    throw std::invalid_argument("got " + std::to_string(directions.size()) +
                                " directions for a layer of " + std::to_string(layer.directions));
}

StepRange steps_of(const CudaLayer& layer, const std::optional<std::pair<int64_t, int64_t>>& r) {
  return r ? StepRange{r->first, r->second} : StepRange{0, layer.steps.T};
}

}  // namespace

void bind_cuda(py::module_& m) {
  // Every argument is described in cuda/engine.h and cuda/plan.h; addresses are the device's.
  py::class_<CudaProperties>(m, "CudaProperties", py::module_local())
      .def(py::init([](int major, int minor, int sm_count, int64_t shared_bytes, int64_t l2_bytes,
                       const std::array<int64_t, 5>& clusters, bool vendor, bool untimed) {
             return CudaProperties{major,    minor,    sm_count, shared_bytes,
                                   l2_bytes, clusters, vendor,   untimed};
           }),
           py::kw_only(), "major"_a, "minor"_a, "sm_count"_a, "shared_bytes"_a, "l2_bytes"_a,
           "clusters"_a, "vendor"_a, "untimed"_a = false)
      .def_readonly("major", &CudaProperties::major)
      .def_readonly("sm_count", &CudaProperties::sm_count)
      .def_readonly("shared_bytes", &CudaProperties::shared_bytes);
  py::class_<CudaProblem>(m, "CudaProblem", py::module_local())
      .def(py::init(&problem), py::kw_only(), "dtype"_a, "tf32"_a, "backward"_a, "projection"_a,
           "variants"_a, "normed"_a, "directions"_a, "T"_a, "B"_a, "H"_a, "P"_a)
      .def_readonly("backward", &CudaProblem::backward);
  py::class_<CudaPlan>(m, "CudaPlan", py::module_local())
      .def(py::init<const CudaPlan&>())
      .def_property(
          "family", [](const CudaPlan& p) { return int(p.family); },
          [](CudaPlan& p, int family) { p.family = static_cast<CudaFamily>(family); })
      .def_readwrite("m_tiles", &CudaPlan::m_tiles)
      .def_readwrite("n_tiles", &CudaPlan::n_tiles)
      .def_readwrite("held", &CudaPlan::held)
      .def_readwrite("shared", &CudaPlan::shared)
      .def_readwrite("ahead", &CudaPlan::ahead)
      .def_readwrite("in_l2", &CudaPlan::in_l2)
      .def_readwrite("fetches", &CudaPlan::fetches)
      .def_readwrite("slices", &CudaPlan::slices)
      .def_readwrite("groups", &CudaPlan::groups)
      .def_readwrite("group_rows", &CudaPlan::group_rows)
      .def_readwrite("cluster", &CudaPlan::cluster)
      .def_readwrite("shared_bytes", &CudaPlan::shared_bytes)
      .def_readwrite("step_us", &CudaPlan::step_us);
  m.def("cuda_plan", &make_cuda_plan, "problem"_a, "properties"_a,
        "The kernels, tiles and grid for a problem on a device with these properties.");
  m.def("cuda_plans", &all_cuda_plans, "problem"_a, "properties"_a,
        "Every plan that could run, for tests and tuning.");
  m.def("cuda_refuse_plan", &refuse, "plan"_a, "problem"_a,
        "Why the kernels cannot run a plan; empty if they can.");
  m.def("cuda_describe_plan", &describe, "plan"_a, "problem"_a, "A plan as a line of text.");
  py::class_<CudaWavefront>(m, "CudaWavefront", py::module_local())
      .def_readonly("parts", &CudaWavefront::parts)
      .def_readonly("plan", &CudaWavefront::plan)
      .def_readonly("us", &CudaWavefront::us)
      .def_readonly("us_in_turn", &CudaWavefront::us_in_turn);
  m.def("cuda_wavefront", &make_cuda_wavefront, "problem"_a, "properties"_a, "layers"_a, "steps"_a,
        "In how many parts of the steps a stack of layers like this runs as a wavefront.");
  m.def(
      "cuda_padded", [](int64_t k, int dtype) { return padded(k, static_cast<Dtype>(dtype)); },
      "k"_a, "dtype"_a, "Elements of a row of a product's operand, padded to whole chunks.");

  py::class_<CudaLayer>(m, "CudaLayer", py::module_local())
      .def(py::init(&layer), py::kw_only(), "dtype"_a, "tf32"_a, "device"_a, "directions"_a,
           "steps"_a, "H"_a, "P"_a, "variants"_a, "normed"_a, "plan"_a);
  py::class_<CudaForwardDirection>(m, "CudaForwardDirection", py::module_local())
      .def(py::init(&forward_direction), py::kw_only(), "reverse"_a, "gx"_a, "b_ih"_a, "b_hh"_a,
           "w_hh"_a, "w_hr"_a, "h0"_a, "c0"_a, "variants"_a, "gates"_a, "c_seq"_a, "norm"_a,
           "norm_r"_a, "y"_a, "y_stride"_a, "h_n"_a, "c_n"_a);
  py::class_<CudaBackwardDirection>(m, "CudaBackwardDirection", py::module_local())
      .def(py::init(&backward_direction), py::kw_only(), "reverse"_a, "w_hh"_a, "w_hr"_a, "h0"_a,
           "c0"_a, "y"_a, "y_stride"_a, "gates"_a, "c_seq"_a, "variants"_a, "norm"_a, "norm_r"_a,
           "dy"_a, "dy_stride"_a, "dh_n"_a, "dc_n"_a, "dcells"_a, "dgates"_a, "dproduct"_a,
           "cell_out"_a, "dpeephole"_a, "dnorm"_a, "h_prev"_a, "dr"_a, "dh0"_a, "dc0"_a);
  m.def("cuda_forward_workspace", &cuda_forward_workspace, "layer"_a, "projection"_a);
  m.def("cuda_backward_workspace", &cuda_backward_workspace, "layer"_a, "projection"_a);
  m.def(
      "cuda_forward",
      [](CudaLayer layer, const std::vector<CudaForwardDirection>& directions, Address workspace,
         Address stream, std::optional<std::pair<int64_t, int64_t>> range) {
        require(layer, directions);
        layer.stream = pointer(stream);
        cuda_forward(layer, directions.data(), pointer(workspace), steps_of(layer, range));
      },
      "layer"_a, "directions"_a, "workspace"_a, "stream"_a, "range"_a = py::none(),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_backward",
      [](CudaLayer layer, const std::vector<CudaBackwardDirection>& directions, Address workspace,
         Address stream, std::optional<std::pair<int64_t, int64_t>> range) {
        require(layer, directions);
        layer.stream = pointer(stream);
        cuda_backward(layer, directions.data(), pointer(workspace), steps_of(layer, range));
      },
      "layer"_a, "directions"_a, "workspace"_a, "stream"_a, "range"_a = py::none(),
      py::call_guard<py::gil_scoped_release>());

  // Described in cuda/pointwise.h.
  py::class_<CudaCell>(m, "CudaCell", py::module_local())
      .def(py::init(&cell), py::kw_only(), "dtype"_a, "rows"_a, "width"_a, "a"_a, "h"_a, "c"_a,
           "peephole"_a, "lengths"_a, "stream"_a);
  m.def(
      "cuda_cell_forward",
      [](const CudaCell& cell, Address h, Address c) {
        cuda_cell_forward(cell, pointer(h), pointer(c));
      },
      "cell"_a, "h"_a, "c"_a, py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_cell_backward",
      [](const CudaCell& cell, Address dh, Address dc, Address da, Address dh0, Address dc0,
         Address dpeephole) {
        cuda_cell_backward(cell, {pointer(dh), pointer(dc), pointer(da), pointer(dh0), pointer(dc0),
                                  pointer(dpeephole)});
      },
      "cell"_a, py::kw_only(), "dh"_a, "dc"_a, "da"_a, "dh0"_a, "dc0"_a, "dpeephole"_a,
      py::call_guard<py::gil_scoped_release>());

  // Described in cuda/arrange.h.
  m.def(
      "cuda_arrange",
      [](int dtype, bool transposed, int64_t rows, int64_t columns, int64_t width, Address matrix,
         Address out, Address stream) {
        cuda_arrange({static_cast<Dtype>(dtype), transposed, rows, columns, width}, pointer(matrix),
                     pointer(out), pointer(stream));
      },
      "dtype"_a, "transposed"_a, "rows"_a, "columns"_a, "width"_a, "matrix"_a, "out"_a, "stream"_a,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_sum_rows",
      [](int dtype, Address matrix, int64_t rows, int64_t columns, Address first, Address second,
         Address stream) {
        cuda_sum_rows(static_cast<Dtype>(dtype), pointer(matrix), rows, columns, pointer(first),
                      pointer(second), pointer(stream));
      },
      "dtype"_a, "matrix"_a, "rows"_a, "columns"_a, "first"_a, "second"_a, "stream"_a,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_cell_outputs",
      [](int dtype, const Steps& steps, Address gates, Address c_seq, int64_t H, Address out,
         Address stream) {
        cuda_cell_outputs(static_cast<Dtype>(dtype), steps, pointer(gates), pointer(c_seq), H,
                          pointer(out), pointer(stream));
      },
      "dtype"_a, "steps"_a, "gates"_a, "c_seq"_a, "H"_a, "out"_a, "stream"_a,
      py::call_guard<py::gil_scoped_release>());
  bind_vendor(m, &cuda_make_current);
  bind_second(m);
  bind_cuda_plain(m);
}

}  // namespace lstm_ext
