// One step of the plain cell, straight from the tensors of a module: with a single sequence, to
// look at each of them from Python takes longer than the step.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "bind_cpu.h"

namespace lstm_ext {

class CpuCell {
  using Object = pybind11::object;
  using Handle = pybind11::handle;

 public:
  // types: of tensors without behaviour of their own. codes: enum Dtype by dtype, of dtypes that
  // are their own acc type.
  CpuCell(pybind11::tuple types, pybind11::dict codes, int64_t most_rows)
      : types_(std::move(types)), codes_(std::move(codes)), most_rows_(most_rows) {}

  // x: (B, I). hx: a pair of (B, H), or None for zeros. weights: W_ih (4H, I), W_hh (4H, H), b_ih
  // and b_hh (4H) or None.
  //
  // Returns h_1, c_1 and, if grad and any tensor requires grad, gates, c_seq, h_0 and c_0. Or None,
  // if anything is not a tensor of the types, dense, on the CPU, of its size and of x's dtype, one
  // of the codes; or if B is not in 1..most_rows.
  Object forward(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H,
                 int threads, bool pack_input, bool grad,
                 const pybind11::function& workspace) const {
    namespace py = pybind11;
    Inputs in;
    LstmForward p{};
    try {
      if (!read(x, hx, weights, I, H, in, p)) return py::none();
    } catch (const py::error_already_set&) {  // a tensor without memory
      return py::none();
    }
    const int64_t B = p.steps.B;
    const bool save = grad && in.requires_grad;
    const Object h_1 = make(x, names().new_empty, B, H), c_1 = make(x, names().new_empty, B, H);
    const Object gates = save ? make(x, names().new_empty, B, 4 * H) : py::none();
    const Object c_seq = save ? make(x, names().new_empty, B, H) : py::none();
    p.threads = threads;
    p.pack_input = pack_input;
    p.gates = memory_of(gates);
    p.c_seq = memory_of(c_seq);
    p.y = p.h_n = memory_of(h_1);  // of one step, the output is also the last state
    p.c_n = memory_of(c_1);
    const CpuKernels& kernels = cpu_kernels();
    run_core(kernels.forward, kernels.forward_workspace, p, workspace);
    if (!save) return py::make_tuple(h_1, c_1);
    return py::make_tuple(h_1, c_1, gates, c_seq, in.h_0, in.c_0);
  }

 private:
  struct Names {
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
    PyObject* is_neg = PyUnicode_InternFromString("is_neg");
    PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
    PyObject* contiguous = PyUnicode_InternFromString("contiguous");
    PyObject* new_empty = PyUnicode_InternFromString("new_empty");
    PyObject* new_zeros = PyUnicode_InternFromString("new_zeros");
  };
  static const Names& names() {
    static const Names instance;
    return instance;
  }

  struct Inputs {
    Object h_0, c_0;
    std::array<Object, 7> dense;  // keeps the memory
    int count = 0;
    PyObject* dtype = nullptr;
    bool requires_grad = false;
  };

  bool read(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H, Inputs& in,
            LstmForward& p) const {
    if (!is_plain(x) || weights.size() != 4) return false;
    in.dtype = get(x, names().dtype).ptr();  // dtypes live on
    PyObject* const code = PyDict_GetItem(codes_.ptr(), in.dtype);
    const Object shape = get(x, names().shape);
    if (!code || PyTuple_GET_SIZE(shape.ptr()) != 2) return false;
    const int64_t B = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 0));
    if (B < 1 || B > most_rows_) return false;
    p.dtype = static_cast<Dtype>(PyLong_AsLong(code));
    p.steps = {1, B, B, B, 1, nullptr, nullptr, nullptr, false};
    p.H = p.P = p.y_stride = H;
    p.I = I;
    if (!(p.x = dense(x, in, B, I))) return false;
    if (hx.is_none()) {
      in.h_0 = in.c_0 = make(x, names().new_zeros, B, H);
    } else {
      if (!(PyTuple_Check(hx.ptr()) || PyList_Check(hx.ptr())) ||
          PySequence_Fast_GET_SIZE(hx.ptr()) != 2) {
        return false;
      }
      PyObject** const items = PySequence_Fast_ITEMS(hx.ptr());
      in.h_0 = pybind11::reinterpret_borrow<Object>(items[0]);
      in.c_0 = pybind11::reinterpret_borrow<Object>(items[1]);
    }
    if (!(p.h0 = dense(in.h_0, in, B, H)) || !(p.c0 = dense(in.c_0, in, B, H))) return false;
    const auto weight = [&](int k) { return Handle(PyList_GET_ITEM(weights.ptr(), k)); };
    if (!(p.w_ih = dense(weight(0), in, 4 * H, I))) return false;
    if (!(p.w_hh = dense(weight(1), in, 4 * H, H))) return false;
    if (!weight(2).is_none() && !(p.b_ih = dense(weight(2), in, 4 * H))) return false;
    if (!weight(3).is_none() && !(p.b_hh = dense(weight(3), in, 4 * H))) return false;
    return true;
  }

  bool is_plain(Handle value) const {
    for (const Handle type : types_) {
      if (Py_TYPE(value.ptr()) == reinterpret_cast<PyTypeObject*>(type.ptr())) return true;
    }
    return false;
  }

  // The memory of a tensor, or of its contiguous copy, that is as step says; else null. columns: -1
  // of a tensor of one dimension.
  void* dense(Handle value, Inputs& in, int64_t rows, int64_t columns = -1) const {
    if (!is_plain(value) || get(value, names().dtype).ptr() != in.dtype ||
        get(value, names().is_cpu).ptr() != Py_True) {
      return nullptr;
    }
    const Object shape = get(value, names().shape);
    const int64_t sizes[2] = {rows, columns};
    if (PyTuple_GET_SIZE(shape.ptr()) != (columns < 0 ? 1 : 2)) return nullptr;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(shape.ptr()); ++k) {
      if (PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), k)) != sizes[k]) return nullptr;
    }
    // Lazily negated, the memory is that of the opposite.
    if (call(value, names().is_neg).ptr() != Py_False) return nullptr;
    in.requires_grad |= get(value, names().requires_grad).ptr() == Py_True;
    Object& kept = in.dense[in.count++];
    kept = call(value, names().contiguous);
    return memory_of(kept);
  }

  static Object checked(PyObject* made) {
    if (!made) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<Object>(made);
  }
  static Object get(Handle value, PyObject* name) {
    return checked(PyObject_GetAttr(value.ptr(), name));
  }
  static Object call(Handle value, PyObject* name) {
    return checked(PyObject_CallMethodNoArgs(value.ptr(), name));
  }
  static Object make(Handle like, PyObject* name, int64_t rows, int64_t columns) {
    const pybind11::int_ sizes[2] = {rows, columns};
    return checked(
        PyObject_CallMethodObjArgs(like.ptr(), name, sizes[0].ptr(), sizes[1].ptr(), nullptr));
  }

  pybind11::tuple types_;
  pybind11::dict codes_;
  int64_t most_rows_;
};

inline void bind_cpu_cell(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CpuCell>(m, "CpuCell", py::module_local())
      .def(py::init<py::tuple, py::dict, int64_t>(), "types"_a, "codes"_a, "most_rows"_a)
      .def("cpu_forward", &CpuCell::forward, "x"_a, "hx"_a, "weights"_a, "I"_a, "H"_a, "threads"_a,
           "pack_input"_a, "grad"_a, "workspace"_a);
}

}  // namespace lstm_ext
