// A plain layer or cell, straight from the tensors of a module: with a single sequence and few
// steps, to look at each of them from Python takes longer than the steps.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "bind_cpu.h"

namespace lstm_ext {

class CpuPlain {
  using Object = pybind11::object;
  using Handle = pybind11::handle;

 public:
  // types: of tensors without behaviour of their own. codes: enum Dtype by dtype: of dtypes that
  // are their own acc type, and of bf16. bf16_acc: its acc type. most_rows: of a single step,
  // unless its input is packed or products multiply bf16.
  CpuPlain(pybind11::tuple types, pybind11::dict codes, Object bf16_acc, int64_t most_rows)
      : types_(std::move(types)),
        codes_(std::move(codes)),
        bf16_acc_(std::move(bf16_acc)),
        most_rows_(most_rows) {}

  // T: steps; 0 for a cell's only one. x: of a cell (B, I), else (T * B, I), or as a module has it,
  // (T, B, I) or (B, T, I). hx: a pair of (B, H), of a module (1, B, H); or None for zeros.
  // weights: W_ih (4H, I), W_hh (4H, H), b_ih and b_hh (4H) or None.
  //
  // Returns y, unless of a cell, h_n and c_n and, if grad and any tensor requires grad, gates,
  // c_seq, h_0 and c_0. Or None, if anything is not a tensor of the types, dense, on the CPU, of
  // its size and of x's dtype, one of the codes; if there is no row; or if it is a single step of
  // more than most_rows.
  Object forward(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H,
                 int64_t T, bool batch_first, int threads, bool pack_input, bool grad,
                 const pybind11::function& workspace) const {
    namespace py = pybind11;
    Inputs in;
    LstmForward p{};
    p.pack_input = pack_input;
    p.threads = threads;
    try {
      if (!read(x, hx, weights, I, H, T, batch_first, in, p)) return py::none();
    } catch (const py::error_already_set&) {  // a tensor without memory
      return py::none();
    }
    const int64_t B = p.steps.B, rows = p.steps.rows;
    const bool save = grad && in.requires_grad, module = in.x_dims == 3;
    const auto empty = [&](const Sizes& sizes) { return make(x, names().new_empty, sizes); };
    const Sizes states = module ? Sizes{1, B, H} : Sizes{B, H};
    const Object h_n = empty(states), c_n = empty(states);
    const Handle acc = p.bf16_products ? Handle(bf16_acc_) : Handle();
    const auto saved = [&](const Sizes& sizes) -> Object {
      if (!save) return py::none();
      return make(x, names().new_empty, sizes, acc);
    };
    const Object gates = saved({rows, 4 * H}), c_seq = saved({rows, H});
    Object y = h_n;  // of one step, the output is also the last state
    if (T) {
      y = empty(!module ? Sizes{rows, H} : batch_first ? Sizes{B, T, H} : Sizes{T, B, H});
    }
    p.gates = memory_of(gates);
    p.c_seq = memory_of(c_seq);
    p.y = memory_of(y);
    p.h_n = memory_of(h_n);
    p.c_n = memory_of(c_n);
    const CpuKernels& kernels = cpu_kernels();
    run_core(kernels.forward, kernels.forward_workspace, p, workspace);
    py::tuple outputs = py::make_tuple(h_n, c_n);
    if (T) outputs = py::make_tuple(y, h_n, c_n);
    if (!save) return outputs;
    return outputs + py::make_tuple(gates, c_seq, in.h_0, in.c_0);
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

  // Of up to three dimensions.
  struct Sizes {
    int64_t of[3];
    Py_ssize_t count;
    Sizes(int64_t a) : of{a}, count(1) {}
    Sizes(int64_t a, int64_t b) : of{a, b}, count(2) {}
    Sizes(int64_t a, int64_t b, int64_t c) : of{a, b, c}, count(3) {}
  };

  struct Inputs {
    Object h_0, c_0;
    Py_ssize_t x_dims = 0;
    std::array<Object, 7> dense;  // keeps the memory
    int count = 0;
    PyObject* dtype = nullptr;
    bool requires_grad = false;
  };

  bool read(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H, int64_t T,
            bool batch_first, Inputs& in, LstmForward& p) const {
    if (!is_plain(x) || weights.size() != 4) return false;
    in.dtype = get(x, names().dtype).ptr();  // dtypes live on
    PyObject* const code = PyDict_GetItem(codes_.ptr(), in.dtype);
    const Object shape = get(x, names().shape);
    in.x_dims = PyTuple_GET_SIZE(shape.ptr());
    if (!code || !(in.x_dims == 2 || (T && in.x_dims == 3))) return false;
    const auto size = [&](int k) {
      return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), k)));
    };
    const bool module = in.x_dims == 3;
    const int64_t steps = T ? T : 1;
    const int64_t B = module ? size(batch_first ? 0 : 1) : size(0) / steps;
    p.dtype = static_cast<Dtype>(PyLong_AsLong(code));
    if (p.dtype == Dtype::kBFloat16) {
      p.bf16_products = cpu_kernels().bf16_products && I % 2 == 0 && openmp_grants(p.threads);
      if (!p.bf16_products) return false;
    }
    const bool any_rows = steps > 1 || p.pack_input || p.bf16_products;
    if (B < 1 || (B > most_rows_ && !any_rows)) return false;
    p.steps = {steps,   B,       steps * B, batch_first ? 1 : B, batch_first ? steps : 1, nullptr,
               nullptr, nullptr, false};
    p.H = p.P = p.y_stride = H;
    p.I = I;
    const Sizes states = module ? Sizes{1, B, H} : Sizes{B, H};
    p.x = dense(x, in,
                !module       ? Sizes{steps * B, I}
                : batch_first ? Sizes{B, T, I}
                              : Sizes{T, B, I});
    if (!p.x) return false;
    if (hx.is_none()) {
      in.h_0 = in.c_0 = make(x, names().new_zeros, states);
    } else {
      if (!(PyTuple_Check(hx.ptr()) || PyList_Check(hx.ptr())) ||
          PySequence_Fast_GET_SIZE(hx.ptr()) != 2) {
        return false;
      }
      PyObject** const items = PySequence_Fast_ITEMS(hx.ptr());
      in.h_0 = pybind11::reinterpret_borrow<Object>(items[0]);
      in.c_0 = pybind11::reinterpret_borrow<Object>(items[1]);
    }
    if (!(p.h0 = dense(in.h_0, in, states)) || !(p.c0 = dense(in.c_0, in, states))) return false;
    const auto weight = [&](int k) { return Handle(PyList_GET_ITEM(weights.ptr(), k)); };
    if (!(p.w_ih = dense(weight(0), in, {4 * H, I}))) return false;
    if (!(p.w_hh = dense(weight(1), in, {4 * H, H}))) return false;
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

  // The memory of a tensor, or of its contiguous copy, that is as forward says; else null.
  void* dense(Handle value, Inputs& in, const Sizes& sizes) const {
    if (!is_plain(value) || get(value, names().dtype).ptr() != in.dtype ||
        get(value, names().is_cpu).ptr() != Py_True) {
      return nullptr;
    }
    const Object shape = get(value, names().shape);
    if (PyTuple_GET_SIZE(shape.ptr()) != sizes.count) return nullptr;
    for (Py_ssize_t k = 0; k < sizes.count; ++k) {
      if (PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), k)) != sizes.of[k]) return nullptr;
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
  // dtype: of the new tensor; null: that of like.
  static Object make(Handle like, PyObject* name, const Sizes& sizes, Handle dtype = {}) {
    static PyObject* const keywords = PyTuple_Pack(1, names().dtype);
    Object numbers[3];
    PyObject* arguments[5] = {like.ptr()};
    for (Py_ssize_t k = 0; k < sizes.count; ++k) {
      numbers[k] = checked(PyLong_FromLongLong(sizes.of[k]));
      arguments[k + 1] = numbers[k].ptr();
    }
    arguments[sizes.count + 1] = dtype.ptr();
    return checked(PyObject_VectorcallMethod(name, arguments, size_t(sizes.count) + 1,
                                             dtype ? keywords : nullptr));
  }

  pybind11::tuple types_;
  pybind11::dict codes_;
  Object bf16_acc_;
  int64_t most_rows_;
};

inline void bind_cpu_plain(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CpuPlain>(m, "CpuPlain", py::module_local())
      .def(py::init<py::tuple, py::dict, py::object, int64_t>(), "types"_a, "codes"_a, "bf16_acc"_a,
           "most_rows"_a)
      .def("cpu_forward", &CpuPlain::forward, "x"_a, "hx"_a, "weights"_a, "I"_a, "H"_a, "T"_a,
           "batch_first"_a, "threads"_a, "pack_input"_a, "grad"_a, "workspace"_a);
}

}  // namespace lstm_ext
