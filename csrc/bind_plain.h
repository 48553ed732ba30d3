// What a plain layer or cell is called with, straight from the tensors of a module, and straight
// from what autograd hands to a Function: looked at one by one from Python, they take longer than a
// short layer. For every engine; params.h has the letters.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "bind_tensors.h"

namespace lstm_ext {

inline Steps plain_steps(int64_t T, int64_t B, bool batch_first) {
  return {T, B, T * B, batch_first ? 1 : B, batch_first ? T : 1, nullptr, nullptr, nullptr, false};
}

// What forward and backward have in common.
struct PlainCall {
  using Object = pybind11::object;
  using Handle = pybind11::handle;
  using Sizes = PlainTensors::Sizes;

  enum { kX, kH0, kC0, kWih, kWhh, kBih, kBhh, kInputs };

  explicit PlainCall(const PlainTensors& tensors) : tensors(tensors) {}

  // T: steps; 0 for a cell's only one. Whether x's type, dtype and number of dimensions are right.
  bool read_sizes(Handle x, int64_t inputs, int64_t hidden, int64_t T, bool batch_first) {
    if (!(dtype = tensors.dtype_of(x, code))) return false;
    acc = tensors.acc_of(dtype, code);
    const Sizes size(x);
    module = size.count == 3;
    if (!(size.count == 2 || (T && module))) return false;
    device = PlainTensors::device_of(x);
    const int64_t count = T ? T : 1;
    I = inputs;
    H = hidden;
    cell = !T;
    first = batch_first;
    const int64_t B = module ? size.of[batch_first ? 0 : 1] : size.of[0] / count;
    steps = plain_steps(count, B, batch_first);
    return B > 0;
  }

  // Of what has a row for each step and sequence, and of a state.
  Sizes layer_size(int64_t width) const {
    if (!module) return {steps.rows, width};
    return first ? Sizes{steps.B, steps.T, width} : Sizes{steps.T, steps.B, width};
  }
  Sizes state_size() const { return module ? Sizes{1, steps.B, H} : Sizes{steps.B, H}; }
  Sizes input_size(int k) const {
    switch (k) {
      case kX:
        return layer_size(I);
      case kWih:
        return {4 * H, I};
      case kWhh:
        return {4 * H, H};
      case kBih:
      case kBhh:
        return 4 * H;
      default:
        return state_size();
    }
  }
  static bool is_bias(int k) { return k == kBih || k == kBhh; }

  void* dense(Handle value, const Sizes& sizes, Object& kept, PyObject* type = nullptr) const {
    return tensors.dense(value, type ? type : dtype, device, sizes, kept);
  }
  // Beside a tensor. type: null: as it.
  static Object empty(Handle like, const Sizes& sizes, Handle type = {}) {
    return PlainTensors::make(like, PlainTensors::names().new_empty, sizes, type);
  }

  const PlainTensors& tensors;
  Dtype code{};
  PyObject* dtype = nullptr;
  PyObject* acc = nullptr;  // of sums, gates and cell states
  int64_t device = -1;      // as PlainTensors::device_of
  Steps steps{};
  int64_t I = 0, H = 0;
  bool module = false;  // sizes as a module has them, else as a layer: see PlainInputs::read
  bool cell = false, first = false;
  std::array<Object, kInputs> kept;  // contiguous
  std::array<const void*, kInputs> memory{};
};

// Of forward.
struct PlainInputs : PlainCall {
  using PlainCall::PlainCall;

  // x: of a cell (B, I), else (T * B, I), or as a module has it, (T, B, I) or (B, T, I). hx: a pair
  // of (B, H), of a module (1, B, H); or None for zeros, of which one tensor is made if
  // `makes_zeros`, else none. weights: W_ih (4H, I), W_hh (4H, H), b_ih and b_hh (4H) or None.
  //
  // False if anything is not a tensor of the types, dense, where it should be, of its size and of
  // x's dtype, one of the codes; if there is no row; or if accepts() of what is known says no,
  // before any memory is asked for.
  template <class Accepts>
  bool read(Handle x, Handle hx, const pybind11::list& weights, int64_t inputs, int64_t hidden,
            int64_t T, bool batch_first, bool makes_zeros, const Accepts& accepts) {
    if (weights.size() != 4 || !read_sizes(x, inputs, hidden, T, batch_first) || !accepts())
      return false;
    if (!input(kX, x)) return false;
    const bool given = !hx.is_none();
    if (given) {
      if (!(PyTuple_Check(hx.ptr()) || PyList_Check(hx.ptr())) ||
          PySequence_Fast_GET_SIZE(hx.ptr()) != 2) {
        return false;
      }
      PyObject** const items = PySequence_Fast_ITEMS(hx.ptr());
      h_0 = pybind11::reinterpret_borrow<Object>(items[0]);
      c_0 = pybind11::reinterpret_borrow<Object>(items[1]);
    } else if (makes_zeros) {
      h_0 = c_0 = PlainTensors::make(x, PlainTensors::names().new_zeros, state_size());
    }
    if ((given || makes_zeros) && !(input(kH0, h_0) && input(kC0, c_0))) return false;
    for (int k = kWih; k < kInputs; ++k) {
      const Handle weight(PyList_GET_ITEM(weights.ptr(), k - kWih));
      if (!(is_bias(k) && weight.is_none()) && !input(k, weight)) return false;
    }
    return true;
  }

  bool input(int k, Handle value) {
    memory[k] = dense(value, input_size(k), kept[k]);
    requires_grad |=
        memory[k] && PlainTensors::get(value, PlainTensors::names().requires_grad).ptr() == Py_True;
    return memory[k];
  }

  bool requires_grad = false;  // any of them
  Object h_0 = pybind11::none(), c_0 = pybind11::none();
};

// What forward makes.
struct PlainOutputs {
  using Object = pybind11::object;

  // save: what backward needs, too.
  PlainOutputs(const PlainInputs& in, pybind11::handle x, bool save) : in_(in), save_(save) {
    h_n = PlainCall::empty(x, in.state_size());
    c_n = PlainCall::empty(x, in.state_size());
    if (save) {
      const pybind11::handle acc = in.acc == in.dtype ? pybind11::handle() : in.acc;
      gates = PlainCall::empty(x, {in.steps.rows, 4 * in.H}, acc);
      c_seq = PlainCall::empty(x, {in.steps.rows, in.H}, acc);
    }
    // Of one step, the output is also the last state.
    y = in.cell ? h_n : PlainCall::empty(x, in.layer_size(in.H));
  }

  // y, unless of a cell, h_n and c_n and, if saved, gates, c_seq, h_0 and c_0.
  pybind11::tuple all() const {
    namespace py = pybind11;
    py::tuple outputs = py::make_tuple(h_n, c_n);
    if (!in_.cell) outputs = py::make_tuple(y, h_n, c_n);
    if (!save_) return outputs;
    return outputs + py::make_tuple(gates, c_seq, in_.h_0, in_.c_0);
  }

  Object y, h_n, c_n;
  Object gates = pybind11::none(), c_seq = pybind11::none();

 private:
  const PlainInputs& in_;
  const bool save_;
};

// Of backward.
struct PlainSaved : PlainCall {
  enum { kGates = kInputs, kCSeq, kY, kSaved };

  using PlainCall::PlainCall;

  // gradients: of y, unless of a cell, h_n and c_n; None for zero. saved: x, h_0, c_0, W_ih, W_hh,
  // b_ih, b_hh, gates, c_seq and, of several steps, y, as forward took and made them. wanted: for
  // each of the first seven, whether its gradient is. T: steps, 0 for a cell's only one.
  //
  // False if anything is not a tensor of the types, dense, where it should be, of its size and
  // dtype, but that h_0 and c_0 may both be None, if `null_states`; or if accepts() of what is
  // known says no, before any memory is asked for.
  template <class Accepts>
  bool read(const pybind11::tuple& gradients, const pybind11::tuple& saved,
            const pybind11::tuple& wanted_ones, int64_t T, bool batch_first, bool null_states,
            const Accepts& accepts) {
    if (saved.size() != kSaved || gradients.size() != size_t(T ? 3 : 2)) return false;
    for (int k = 0; k < kInputs; ++k) wanted[k] = wanted_ones[k].ptr() == Py_True;
    if (!tensors.is_plain(saved[kX]) || !tensors.is_plain(saved[kWhh])) return false;
    const Sizes x_size(saved[kX]), w_size(saved[kWhh]);
    if (w_size.count != 2 || x_size.count < 2 || x_size.count > 3) return false;
    const int64_t inputs = x_size.of[x_size.count - 1];
    if (!read_sizes(saved[kX], inputs, w_size.of[1], T, batch_first) || !accepts()) return false;
    const bool zeros = null_states && saved[kH0].is_none() && saved[kC0].is_none();
    for (int k = 0; k < kInputs; ++k) {
      const bool none = is_bias(k) ? saved[k].is_none() : zeros && (k == kH0 || k == kC0);
      if (!none && !(memory[k] = dense(saved[k], input_size(k), kept[k]))) return false;
    }
    if (!(gates = dense(saved[kGates], {steps.rows, 4 * H}, kept_gates_, acc))) return false;
    if (!(c_seq = dense(saved[kCSeq], {steps.rows, H}, kept_c_seq_, acc))) return false;
    if (steps.T > 1 && !(y = dense(saved[kY], layer_size(H), kept_y_))) return false;
    const auto gradient = [&](int k, const Sizes& size, const void*& to) {
      const Handle value = gradients[k];
      return value.is_none() || (to = dense(value, size, gradients_[k]));
    };
    return (!T || gradient(0, layer_size(H), dy)) && gradient(T ? 1 : 0, state_size(), dh_n) &&
           gradient(T ? 2 : 1, state_size(), dc_n);
  }

  // Of the size of an input, and beside it.
  Object like(int k) const { return empty(kept[k], input_size(k)); }
  // The gradients that are wanted, else None.
  pybind11::tuple all(const std::array<Object, kInputs>& made) const {
    pybind11::tuple result(static_cast<size_t>(kInputs));
    for (int k = 0; k < kInputs; ++k)
      result[size_t(k)] = wanted[k] ? made[k] : Object(pybind11::none());
    return result;
  }

  bool wanted[kInputs] = {};
  const void *gates = nullptr, *c_seq = nullptr, *y = nullptr;
  const void *dy = nullptr, *dh_n = nullptr, *dc_n = nullptr;

 private:
  Object kept_gates_, kept_c_seq_, kept_y_;
  std::array<Object, 3> gradients_;
};

}  // namespace lstm_ext
