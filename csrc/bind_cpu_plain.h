// A plain layer or cell, straight from the tensors of a module: with a single sequence and few
// steps, to look at each of them from Python takes longer than the steps.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "bind_cpu.h"
#include "bind_cpu_plain_backward.h"
#include "bind_tensors.h"

namespace lstm_ext {

class PlainForward {
  using Object = pybind11::object;
  using Handle = pybind11::handle;
  using Sizes = PlainTensors::Sizes;

 public:
  // T: steps; 0 for a cell's only one. x: of a cell (B, I), else (T * B, I), or as a module has it,
  // (T, B, I) or (B, T, I). hx: a pair of (B, H), of a module (1, B, H); or None for zeros.
  // weights: W_ih (4H, I), W_hh (4H, H), b_ih and b_hh (4H) or None.
  //
  // Returns y, unless of a cell, h_n and c_n and, if grad and any tensor requires grad, gates,
  // c_seq, h_0 and c_0. Or None, if anything is not a tensor of the types, dense, on the CPU, of
  // its size and of x's dtype, one of the codes; if there is no row; or if it is a single step of
  // more than most_rows.
  static Object run(const PlainTensors& tensors, Handle x, Handle hx, const pybind11::list& weights,
                    int64_t I, int64_t H, int64_t T, bool batch_first, int threads, bool pack_input,
                    bool grad, const pybind11::function& workspace) {
    namespace py = pybind11;
    PlainForward in(tensors);
    LstmForward p{};
    p.pack_input = pack_input;
    p.threads = threads;
    const auto read = [&] { return in.read(x, hx, weights, I, H, T, batch_first, p); };
    if (!PlainTensors::answered(read)) return py::none();
    const int64_t B = p.steps.B, rows = p.steps.rows;
    const bool save = grad && in.requires_grad_, module = in.x_dims_ == 3;
    const auto empty = [&](const Sizes& sizes, Handle dtype = {}) {
      return PlainTensors::make(x, PlainTensors::names().new_empty, sizes, dtype);
    };
    const Sizes states = module ? Sizes{1, B, H} : Sizes{B, H};
    const Object h_n = empty(states), c_n = empty(states);
    const Handle acc = p.bf16_products ? Handle(tensors.acc_of(in.dtype_, p.dtype)) : Handle();
    const auto saved = [&](const Sizes& sizes) -> Object {
      if (!save) return py::none();
      return empty(sizes, acc);
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
    return outputs + py::make_tuple(gates, c_seq, in.h_0_, in.c_0_);
  }

 private:
  explicit PlainForward(const PlainTensors& tensors) : tensors_(tensors) {}

  bool read(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H, int64_t T,
            bool batch_first, LstmForward& p) {
    if (weights.size() != 4 || !(dtype_ = tensors_.dtype_of(x, p.dtype))) return false;
    const Sizes size(x);
    x_dims_ = size.count;
    if (!(x_dims_ == 2 || (T && x_dims_ == 3))) return false;
    const bool module = x_dims_ == 3;
    const int64_t steps = T ? T : 1;
    const int64_t B = module ? size.of[batch_first ? 0 : 1] : size.of[0] / steps;
    if (p.dtype == Dtype::kBFloat16) {
      p.bf16_products = cpu_kernels().bf16_products && I % 2 == 0 && openmp_grants(p.threads);
      if (!p.bf16_products) return false;
    }
    const bool any_rows = steps > 1 || p.pack_input || p.bf16_products;
    if (B < 1 || (B > tensors_.most_rows && !any_rows)) return false;
    p.steps = plain_steps(steps, B, batch_first);
    p.H = p.P = p.y_stride = H;
    p.I = I;
    const Sizes states = module ? Sizes{1, B, H} : Sizes{B, H};
    p.x = dense(x, !module ? Sizes{steps * B, I} : batch_first ? Sizes{B, T, I} : Sizes{T, B, I});
    if (!p.x) return false;
    if (hx.is_none()) {
      h_0_ = c_0_ = PlainTensors::make(x, PlainTensors::names().new_zeros, states);
    } else {
      if (!(PyTuple_Check(hx.ptr()) || PyList_Check(hx.ptr())) ||
          PySequence_Fast_GET_SIZE(hx.ptr()) != 2) {
        return false;
      }
      PyObject** const items = PySequence_Fast_ITEMS(hx.ptr());
      h_0_ = pybind11::reinterpret_borrow<Object>(items[0]);
      c_0_ = pybind11::reinterpret_borrow<Object>(items[1]);
    }
    if (!(p.h0 = dense(h_0_, states)) || !(p.c0 = dense(c_0_, states))) return false;
    const auto weight = [&](int k) { return Handle(PyList_GET_ITEM(weights.ptr(), k)); };
    if (!(p.w_ih = dense(weight(0), {4 * H, I}))) return false;
    if (!(p.w_hh = dense(weight(1), {4 * H, H}))) return false;
    if (!weight(2).is_none() && !(p.b_ih = dense(weight(2), 4 * H))) return false;
    if (!weight(3).is_none() && !(p.b_hh = dense(weight(3), 4 * H))) return false;
    return true;
  }

  void* dense(Handle value, const Sizes& sizes) {
    void* const memory = tensors_.dense(value, dtype_, sizes, kept_[count_++]);
    requires_grad_ |=
        memory && PlainTensors::get(value, PlainTensors::names().requires_grad).ptr() == Py_True;
    return memory;
  }

  const PlainTensors& tensors_;
  PyObject* dtype_ = nullptr;
  Py_ssize_t x_dims_ = 0;
  Object h_0_, c_0_;
  bool requires_grad_ = false;
  std::array<Object, 7> kept_;
  int count_ = 0;
};

inline void bind_cpu_plain(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<PlainTensors>(m, "CpuPlain", py::module_local())
      .def(py::init<py::tuple, py::dict, py::object, int64_t>(), "types"_a, "codes"_a, "bf16_acc"_a,
           "most_rows"_a)
      .def("cpu_forward", &PlainForward::run, "x"_a, "hx"_a, "weights"_a, "I"_a, "H"_a, "T"_a,
           "batch_first"_a, "threads"_a, "pack_input"_a, "grad"_a, "workspace"_a)
      .def("cpu_backward", &PlainBackward::run, "gradients"_a, "saved"_a, "wanted"_a, "T"_a,
           "batch_first"_a, "threads"_a, "most_rows"_a, "workspace"_a);
}

}  // namespace lstm_ext
