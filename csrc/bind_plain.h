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

  // The inputs of one direction; all but x again for a second one: see at().
  enum { kX, kH0, kC0, kWih, kWhh, kBih, kBhh, kWhr, kInputs };
  static constexpr int kOfDirection = kInputs - kH0;
  static constexpr int kWeights = kInputs - kWih;
  static constexpr int kMostDirections = 2;
  static constexpr int kMostInputs = kH0 + kMostDirections * kOfDirection;

  using Objects = std::array<Object, kMostInputs>;

  explicit PlainCall(const PlainTensors& tensors) : tensors(tensors) {}

  // features: of h, as projected; 0: no projection. T: steps; 0 for a cell's only one. rows: where
  // the rows of a layer's T steps lie; null: all sequences take every step. `directions` is set.
  // Whether there are one or two of them, and x's type, dtype and number of dimensions are right.
  bool read_sizes(Handle x, int64_t inputs, int64_t hidden, int64_t features, int64_t T,
                  bool batch_first, const Steps* rows) {
    if (directions < 1 || directions > (T ? kMostDirections : 1)) return false;
    PlainTensors::Look found;
    if (!tensors.look(x, found) || !tensors.is_number(found.dtype)) return false;
    dtype = found.dtype;
    code = found.code;
    acc = tensors.acc_of(dtype, code);
    const Sizes& size = found.sizes;
    module = size.count == 3;
    cell = !T;
    unbatched = cell && size.count == 1;
    if (!(size.count == 2 || unbatched || (T && module && !rows))) return false;
    device = found.device;
    const int64_t count = T ? T : 1;
    I = inputs;
    H = hidden;
    projected = features > 0;
    P = projected ? features : hidden;
    first = batch_first;
    const int64_t B = module ? size.of[batch_first ? 0 : 1] : unbatched ? 1 : size.of[0] / count;
    steps = rows ? *rows : plain_steps(count, B, batch_first);
    return steps.B > 0 && steps.T == count;
  }

  // Where an input of a direction is, of all inputs; and the inverse, without the direction.
  static constexpr int at(int k, int direction) { return k + direction * kOfDirection; }
  static constexpr int kind(int k) { return k < kInputs ? k : k - kOfDirection; }
  int inputs() const { return at(kInputs, directions - 1); }
  // A weight that is None where it may be, or, of a projection, must be.
  bool is_absent(int k, Handle weight) const {
    switch (kind(k)) {
      case kBih:
      case kBhh:
        return weight.is_none();
      case kWhr:
        return !projected && weight.is_none();
      default:
        return false;
    }
  }
  static bool is_state(int k) { return kind(k) == kH0 || kind(k) == kC0; }

  // Tensors of h_0, as of c_0, h_n and c_n: a module has one for all directions.
  int states() const { return module ? 1 : directions; }

  // Of what has a row for each step and sequence, and of a state.
  Sizes layer_size(int64_t width) const {
    if (unbatched) return width;
    if (!module) return {steps.rows, width};
    return first ? Sizes{steps.B, steps.T, width} : Sizes{steps.T, steps.B, width};
  }
  Sizes state_size(int64_t width) const {
    if (unbatched) return width;
    return module ? Sizes{directions, steps.B, width} : Sizes{steps.B, width};
  }
  Sizes input_size(int k) const {
    switch (kind(k)) {
      case kX:
        return layer_size(I);
      case kWih:
        return {4 * H, I};
      case kWhh:
        return {4 * H, P};
      case kBih:
      case kBhh:
        return 4 * H;
      case kWhr:
        return {P, H};
      case kH0:
        return state_size(P);
      default:
        return state_size(H);
    }
  }

  // A direction's part of a tensor: of a state as a module has it, whose directions lie one after
  // the other; and of so many columns of acc with rows for each. Null of null.
  template <class Void>
  Void* state(Void* tensor, int direction, int64_t width) const {
    return module ? part(tensor, direction * steps.B * width * storage_bytes(code)) : tensor;
  }
  template <class Void>
  Void* rows_of(Void* tensor, int64_t columns, int direction) const {
    return part(tensor, direction * steps.rows * columns * acc_bytes(code));
  }
  template <class Void>
  static Void* part(Void* tensor, int64_t bytes) {
    if (!tensor) return nullptr;
    return reinterpret_cast<Void*>(reinterpret_cast<uintptr_t>(tensor) + uintptr_t(bytes));
  }

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
  int64_t device = -1;      // as of PlainTensors::Look
  Steps steps{};
  int64_t I = 0, H = 0;
  int64_t P = 0;  // features of h: H, unless they are projected
  bool projected = false;
  int directions = 1;   // the second is the reversed one
  bool module = false;  // sizes as a module has them, else as a layer: see PlainInputs::read
  bool cell = false, first = false;
  bool unbatched = false;  // a cell's x is (I), its states (H)
  Objects kept;            // contiguous
  std::array<const void*, kMostInputs> memory{};
};

// Of forward.
struct PlainInputs : PlainCall {
  using PlainCall::PlainCall;

  // x: of a cell (B, I) or (I), else (T * B, I), or as a module has it, (T, B, I) or (B, T, I). hx:
  // a pair of (B, H) for each direction in turn, of a module one pair of (directions, B, H); or
  // None for zeros, of which one tensor is made if `makes_zeros`, else none; with a projection h
  // has P features. weights: W_ih (4H, I), W_hh (4H, P), b_ih and b_hh (4H) or None, and W_hr (P,
  // H) or, without a projection, None, of each direction.
  //
  // features, rows: as for read_sizes.
  //
  // False if anything is not a tensor of the types, dense, where it should be, of its size and of
  // x's dtype, one of the codes; if there is no row; or if accepts() of what is known says no,
  // before any memory is asked for.
  template <class Accepts>
  bool read(Handle x, Handle hx, const pybind11::list& weights, int64_t inputs, int64_t hidden,
            int64_t features, int64_t T, bool batch_first, const Steps* rows, bool makes_zeros,
            const Accepts& accepts) {
    directions = int(weights.size() / kWeights);
    if (weights.size() % kWeights ||
        !read_sizes(x, inputs, hidden, features, T, batch_first, rows) || !accepts() ||
        !read_states(x, hx, makes_zeros)) {
      return false;
    }
    for (int d = 0; d < directions; ++d) {
      for (int k = kWih; k < kInputs; ++k) {
        const Handle weight(PyList_GET_ITEM(weights.ptr(), d * kWeights + k - kWih));
        if (!is_absent(k, weight) && !input(at(k, d), weight)) return false;
      }
    }
    return true;
  }

  // x and hx of that.
  bool read_states(Handle x, Handle hx, bool makes_zeros) {
    if (!input(kX, x)) return false;
    std::array<Object, 2> zeros;  // of h and of c
    PyObject** items = nullptr;
    if (!hx.is_none()) {
      if (!(PyTuple_Check(hx.ptr()) || PyList_Check(hx.ptr())) ||
          PySequence_Fast_GET_SIZE(hx.ptr()) != 2 * states()) {
        return false;
      }
      items = PySequence_Fast_ITEMS(hx.ptr());
    } else if (makes_zeros) {
      const auto make = [&](int64_t width) {
        return PlainTensors::make(x, PlainTensors::names().new_zeros, state_size(width));
      };
      zeros[1] = make(H);
      zeros[0] = P == H ? zeros[1] : make(P);
    }
    // All are taken before one is looked at: a list may change meanwhile.
    for (int k = 0; k < 2 * states(); ++k) {
      given[at(kH0 + k % 2, k / 2)] =
          items ? pybind11::reinterpret_borrow<Object>(items[k]) : zeros[size_t(k % 2)];
    }
    for (int d = 0; d < directions; ++d) {
      for (int k = at(kH0, d); k < at(kWih, d); ++k)
        if (given[k] && !input(k, given[k])) return false;
    }
    return true;
  }

  bool input(int k, Handle value) {
    given[k] = pybind11::reinterpret_borrow<Object>(value);
    memory[k] = dense(value, input_size(k), kept[k]);
    if (memory[k] && !requires_grad) {
      requires_grad =
          PlainTensors::get(value, PlainTensors::names().requires_grad).ptr() == Py_True;
    }
    return memory[k];
  }

  // save: whether what backward needs is to be saved: 0: no; 1: if any of them requires grad; 2: in
  // any case.
  bool saves(int save) const { return save > 1 || (save && requires_grad); }

  bool requires_grad = false;  // any of them
  Objects given;               // as the caller has them; null: none
};

// What forward makes.
struct PlainOutputs {
  using Object = pybind11::object;

  // save: what backward needs, too.
  PlainOutputs(const PlainInputs& in, pybind11::handle x, bool save) : in_(in), save_(save) {
    for (int k = 0; k < in.states(); ++k) {
      h_n[k] = PlainCall::empty(x, in.state_size(in.P));
      c_n[k] = PlainCall::empty(x, in.state_size(in.H));
    }
    if (save) {
      const pybind11::handle acc = in.acc == in.dtype ? pybind11::handle() : in.acc;
      const int64_t rows = in.directions * in.steps.rows;
      gates = PlainCall::empty(x, {rows, 4 * in.H}, acc);
      c_seq = PlainCall::empty(x, {rows, in.H}, acc);
    }
    // Of one step, the output is also the last state.
    y = in.cell ? h_n[0] : PlainCall::empty(x, in.layer_size(in.directions * in.P));
  }

  // (y, unless of a cell, each h_n and each c_n), and what is saved, else None: gates, c_seq and
  // the inputs, None where there is none.
  pybind11::tuple all() const {
    namespace py = pybind11;
    const auto size = [](int n) { return static_cast<size_t>(n); };
    const int states = in_.states(), first = !in_.cell;
    py::tuple outputs(size(first + 2 * states));
    if (first) outputs[0] = y;
    for (int k = 0; k < states; ++k) {
      outputs[size(first + k)] = h_n[k];
      outputs[size(first + states + k)] = c_n[k];
    }
    if (!save_) return py::make_tuple(outputs, py::none());
    py::tuple saved(size(2 + in_.inputs()));
    saved[0] = gates;
    saved[1] = c_seq;
    for (int k = 0; k < in_.inputs(); ++k)
      saved[size(2 + k)] = in_.given[k] ? in_.given[k] : Object(py::none());
    return py::make_tuple(outputs, saved);
  }

  // What a direction reads and writes, but for x and y.
  template <class Direction>
  void put(Direction& d, int k) const {
    const int of = in_.module ? 0 : k;  // the tensors that have its states
    d.w_ih = in_.memory[PlainCall::at(PlainCall::kWih, k)];
    d.w_hh = in_.memory[PlainCall::at(PlainCall::kWhh, k)];
    d.w_hr = in_.memory[PlainCall::at(PlainCall::kWhr, k)];
    d.b_ih = in_.memory[PlainCall::at(PlainCall::kBih, k)];
    d.b_hh = in_.memory[PlainCall::at(PlainCall::kBhh, k)];
    d.h0 = in_.state(in_.memory[PlainCall::at(PlainCall::kH0, of)], k, in_.P);
    d.c0 = in_.state(in_.memory[PlainCall::at(PlainCall::kC0, of)], k, in_.H);
    d.gates = in_.rows_of(memory_of(gates), 4 * in_.H, k);
    d.c_seq = in_.rows_of(memory_of(c_seq), in_.H, k);
    d.h_n = in_.state(memory_of(h_n[of]), k, in_.P);
    d.c_n = in_.state(memory_of(c_n[of]), k, in_.H);
  }

  Object y;
  std::array<Object, PlainCall::kMostDirections> h_n, c_n;
  // Of the directions one after the other.
  Object gates = pybind11::none(), c_seq = pybind11::none();

 private:
  const PlainInputs& in_;
  const bool save_;
};

// Of backward.
struct PlainSaved : PlainCall {
  enum { kGates, kCSeq, kY, kResults };  // after the inputs

  using PlainCall::PlainCall;

  // gradients: of y, unless of a cell, each h_n and each c_n; None for zero. saved: x and, of each
  // direction, h_0, c_0, W_ih, W_hh, b_ih, b_hh, W_hr; gates, c_seq and, of several steps, y, as
  // forward took and made them. wanted: for each of the inputs, whether its gradient is. T, rows:
  // as for read_sizes.
  //
  // False if anything is not a tensor of the types, dense, where it should be, of its size and
  // dtype, but that the states may all be None, if `null_states`; or if accepts() of what is known
  // says no, before any memory is asked for.
  template <class Accepts>
  bool read(const pybind11::tuple& gradients, const pybind11::tuple& saved,
            const pybind11::tuple& wanted_ones, int64_t T, bool batch_first,
            const Steps* rows_given, bool null_states, const Accepts& accepts) {
    const int count = int(saved.size()) - kResults;
    directions = (count - kH0) / kOfDirection;
    if (directions < 1 || directions > kMostDirections || count != inputs()) return false;
    for (int k = 0; k < count; ++k) wanted[k] = wanted_ones[k].ptr() == Py_True;
    const Handle w_hr = saved[kWhr];
    PlainTensors::Look x, w, projection;
    if (!tensors.look(saved[kX], x) || !tensors.look(saved[kWhh], w) ||
        !(w_hr.is_none() || tensors.look(w_hr, projection))) {
      return false;
    }
    if (w.sizes.count != 2 || x.sizes.count < 1 || x.sizes.count > 3) return false;
    const int64_t width = x.sizes.of[x.sizes.count - 1], hidden = w.sizes.of[0] / 4;
    const int64_t features = w_hr.is_none() ? 0 : projection.sizes.of[0];
    if (!read_sizes(saved[kX], width, hidden, features, T, batch_first, rows_given) || !accepts())
      return false;
    if (gradients.size() != size_t(!cell + 2 * states())) return false;
    const bool zeros = null_states && saved[kH0].is_none();
    for (int k = 0; k < count; ++k) {
      const Handle value = saved[k];
      const bool absent = is_state(k) ? zeros || k >= at(kH0, states()) : is_absent(k, value);
      if (absent ? !value.is_none() : !(memory[k] = dense(value, input_size(k), kept[k])))
        return false;
    }
    const int64_t rows = directions * steps.rows;
    const auto result = [&](int k, const Sizes& sizes, const void*& to, PyObject* type = nullptr) {
      return (to = dense(saved[count + k], sizes, kept_results_[k], type)) != nullptr;
    };
    if (!result(kGates, {rows, 4 * H}, gates, acc) || !result(kCSeq, {rows, H}, c_seq, acc) ||
        (steps.T > 1 && !result(kY, layer_size(directions * P), y))) {
      return false;
    }
    const auto gradient = [&](int k, const Sizes& sizes, const void*& to) {
      const Handle value = gradients[k];
      return value.is_none() || (to = dense(value, sizes, gradients_[k]));
    };
    if (!cell && !gradient(0, layer_size(directions * P), dy)) return false;
    for (int k = 0; k < states(); ++k) {
      const int h = !cell + k;
      if (!gradient(h, state_size(P), dh_n[k]) || !gradient(h + states(), state_size(H), dc_n[k]))
        return false;
    }
    return true;
  }

  // Of the size of an input, and beside it.
  Object like(int k) const { return empty(kept[k], input_size(k)); }
  // The gradients that are wanted, else None; and last `more`, if there is.
  pybind11::tuple all(const Objects& made, const Object& more = {}) const {
    pybind11::tuple result(size_t(inputs()) + bool(more));
    if (more) result[size_t(inputs())] = more;
    for (int k = 0; k < inputs(); ++k)
      result[size_t(k)] = wanted[k] ? made[k] : Object(pybind11::none());
    return result;
  }

  std::array<bool, kMostInputs> wanted{};
  const void *gates = nullptr, *c_seq = nullptr, *y = nullptr, *dy = nullptr;
  std::array<const void*, kMostDirections> dh_n{}, dc_n{};  // states() of them

 private:
  std::array<Object, kResults> kept_results_;
  std::array<Object, 1 + 2 * kMostDirections> gradients_;
};

}  // namespace lstm_ext
