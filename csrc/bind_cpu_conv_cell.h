// A step of a ConvLSTM's cell on the CPU, straight from the tensors, as a plain layer's way
// (bind_plain.h): looked at one by one from Python, they take longer than a small step.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <optional>

#include "bind_cpu.h"
#include "bind_surroundings.h"
#include "bind_tensors.h"
#include "cpu/conv_cell.h"

namespace lstm_ext {

class CpuConvCell : PlainTensors {
 public:
  enum { kX, kH0, kC0, kWih, kWhh, kBih, kBhh, kWch, kTensors };
  static constexpr int kFirstWeight = kWih;

  // What a step is but for its tensors.
  struct Step {
    // dims: of an image. dtype: of the results. casts: whether autocast makes what is given that
    // dtype: float32 and x's, too.
    Step(const ConvWindow& of_x, const ConvWindow& of_h, int64_t N, int dims, bool bias,
         bool peephole, Object dtype, bool casts)
        : of_x(of_x), of_h(of_h), N(N), dtype(std::move(dtype)), casts(casts) {
      const int64_t C = of_h.channels;
      const auto of = [dims](int64_t first, int64_t channels, const ConvWindow::Sizes& pixels) {
        Sizes sizes(first, channels);
        for (int k = 3 - dims; k < 3; ++k) sizes.of[sizes.count++] = pixels[size_t(k)];
        return sizes;
      };
      sizes[kX] = of(N, of_x.channels, of_x.size);
      sizes[kH0] = sizes[kC0] = of(N, C, of_h.size);
      sizes[kWih] = of(4 * C, of_x.channels, of_x.kernel);
      sizes[kWhh] = of(4 * C, C, of_h.kernel);
      if (bias) sizes[kBih] = sizes[kBhh] = Sizes(4 * C);
      if (peephole) sizes[kWch] = Sizes(3 * C);
      image = tuples(*sizes[kX]);
      state = tuples(*sizes[kH0]);
    }

    int64_t rows() const { return N * of_h.places(); }
    int64_t C() const { return of_h.channels; }

    ConvWindow of_x, of_h;
    int64_t N;
    Object dtype;
    bool casts;
    std::array<std::optional<Sizes>, kTensors> sizes;  // none: there is no such tensor
    struct Tuples {
      pybind11::tuple sizes, strides;  // channels last
    } image, state;

   private:
    static Tuples tuples(const Sizes& sizes) {
      const auto count = size_t(sizes.count);
      pybind11::tuple size(count), strides(count);
      int64_t stride = sizes.of[1];
      strides[1] = 1;
      for (size_t k = count; k-- > 2; stride *= sizes.of[k]) strides[k] = stride;
      strides[0] = stride;
      for (size_t k = 0; k < count; ++k) size[k] = sizes.of[k];
      return {size, strides};
    }
  };

  // Arguments as of PlainTensors.
  CpuConvCell(pybind11::tuple types, const pybind11::dict& codes, Object half_acc, Object bytes,
              const Object& exchange, const Surroundings& surroundings)
      : PlainTensors(std::move(types), codes, std::move(half_acc), std::move(bytes),
                     pybind11::str("is_cpu"), dlpack::kCpu, exchange),
        surroundings_(surroundings) {}

  // What forward reads: (the eight tensors, None for those that there are not; whether autograd
  // records). Arguments as forward's; None for what that would refuse.
  Object given(const Step& step, Handle parameters, Handle x, Handle hx) const {
    std::array<Object, kTensors> given;
    std::array<Place, kTensors> at;
    if (!read(step, parameters, x, hx, given, at)) return pybind11::none();
    pybind11::tuple all(static_cast<size_t>(kTensors));
    put(given, all);
    return pybind11::make_tuple(all, records(given));
  }

  // ((h_1, c_1), saved), where saved is None unless autograd records, else the eight tensors, None
  // for those that there are not, gates, c_seq and h_before, as ConvCellStep has them. parameters:
  // a cell's. hx: None for zeros. None for what is not tensors of the types, of their sizes and
  // dtypes, here; or if there is no number.
  Object forward(const Step& step, Handle parameters, Handle x, Handle hx,
                 const pybind11::function& workspace) const {
    std::array<Object, kTensors> given;
    std::array<Place, kTensors> at;
    if (!read(step, parameters, x, hx, given, at)) return pybind11::none();
    ConvCellStep call = call_of(step, at);
    const Object h = make_strided(x, step.state.sizes, step.state.strides, step.dtype);
    const Object c = make_strided(x, step.state.sizes, step.state.strides, step.dtype);
    call.h = written(h, call.dtype, at[kH0].tensor.count);
    call.c = written(c, call.dtype, at[kC0].tensor.count);
    Object saved = pybind11::none();
    if (records(given)) {
      const auto keep = [&](const Sizes& sizes, void*& to) {
        Object made = make(x, names().new_empty, sizes, acc_of(step.dtype.ptr(), call.dtype));
        to = memory_of(made);
        return made;
      };
      pybind11::tuple all(size_t(kTensors) + 3);
      put(given, all);
      const int64_t rows = step.rows(), C = step.C();
      all[size_t(kTensors)] = keep({rows, 4 * C}, call.gates);
      all[size_t(kTensors) + 1] = keep({2, rows, C}, call.c_seq);
      all[size_t(kTensors) + 2] = keep({rows, C}, call.h_before);
      saved = all;
    }
    run(call, workspace, [](auto& cell) { return cell.forward(); });
    return pybind11::make_tuple(pybind11::make_tuple(h, c), saved);
  }

  // The gradients of the eight tensors, None where they are not wanted. gradients: of h_1 and c_1,
  // None for zero. saved: as forward's. None for what forward would refuse.
  Object backward(const Step& step, const pybind11::tuple& gradients, const pybind11::tuple& saved,
                  const pybind11::tuple& wanted, const pybind11::function& workspace) const {
    std::array<Place, kTensors> at;
    std::array<Place, 2> of_states;
    std::array<Object, 3> kept;
    std::array<void*, 3> results{};
    const int64_t rows = step.rows(), C = step.C();
    if (saved.size() != size_t(kTensors) + kept.size() || gradients.size() != of_states.size() ||
        wanted.size() != size_t(kTensors)) {
      return pybind11::none();
    }
    const auto read = [&] {
      PyObject* own = nullptr;
      for (int k = 0; k < kTensors; ++k) {
        const Object value = saved[size_t(k)];
        if (bool(step.sizes[k]) == value.is_none()) return false;
        if (!value.is_none() && !place(value, step, k, own, at[k])) return false;
      }
      for (size_t k = 0; k < of_states.size(); ++k) {
        const Object value = gradients[k];
        PyObject* type = step.dtype.ptr();
        if (!value.is_none() &&
            !place(
                value, *step.sizes[kH0], [&](const Look& found) { return found.dtype == type; },
                of_states[k])) {
          return false;
        }
      }
      PyObject* const acc = acc_of(step.dtype.ptr(), code_of(step.dtype));
      const std::array<Sizes, 3> sizes{Sizes(rows, 4 * C), Sizes(2, rows, C), Sizes(rows, C)};
      for (size_t k = 0; k < kept.size(); ++k) {
        results[k] = dense(saved[kTensors + k], acc, -1, sizes[k], kept[k]);
        if (!results[k]) return false;
      }
      return true;
    };
    if (!answered(read)) return pybind11::none();
    ConvCellStep call = call_of(step, at);
    call.gates = results[0];
    call.c_seq = results[1];
    call.h_before = results[2];
    call.h = of_states[0].tensor;
    call.c = of_states[1].tensor;
    pybind11::tuple made(static_cast<size_t>(kTensors));
    ConvTensor* const to[] = {&call.dx,    &call.dh0,   &call.dc0,   &call.dw_ih,
                              &call.dw_hh, &call.db_ih, &call.db_hh, &call.dw_ch};
    for (int k = 0; k < kTensors; ++k) {
      if (Object(wanted[size_t(k)]).ptr() != Py_True) {
        made[size_t(k)] = pybind11::none();
        continue;
      }
      if (!at[k].tensor.memory) return pybind11::none();
      const Object like = saved[size_t(k)];
      const auto& tuples = k == kX ? step.image : step.state;
      const Object gradient = k < kFirstWeight
                                  ? make_strided(like, tuples.sizes, tuples.strides, {})
                                  : make(like, names().new_empty, *step.sizes[k]);
      *to[k] = written(gradient, at[k].tensor.own, at[k].tensor.count);
      made[size_t(k)] = gradient;
    }
    run(call, workspace, [](auto& cell) { return cell.backward(); });
    return made;
  }

 private:
  struct Place {
    ConvTensor tensor;
    Object kept;  // has its memory
  };

  // All of them, and where their numbers are; false for what is not for this way.
  bool read(const Step& step, Handle parameters, Handle x, Handle hx,
            std::array<Object, kTensors>& given, std::array<Place, kTensors>& at) const {
    return answered([&] {
      if (!take(parameters, x, hx, step, given)) return false;
      PyObject* own = nullptr;  // x's dtype
      for (int k = 0; k < kTensors; ++k) {
        if (given[k] && !place(given[k], step, k, own, at[k])) return false;
      }
      return true;
    });
  }

  static void put(const std::array<Object, kTensors>& given, pybind11::tuple& to) {
    for (int k = 0; k < kTensors; ++k)
      to[size_t(k)] = given[k] ? given[k] : Object(pybind11::none());
  }

  // The tensors, as they are given.
  bool take(Handle parameters, Handle x, Handle hx, const Step& step,
            std::array<Object, kTensors>& given) const {
    static PyObject* const roles[] = {
        PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
        PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh"),
        PyUnicode_InternFromString("weight_ch")};
    // A dict of another class may make what is taken out of it.
    if (!PyDict_CheckExact(parameters.ptr())) return false;
    given[kX] = pybind11::reinterpret_borrow<Object>(x);
    if (hx.is_none()) {
      given[kH0] = given[kC0] = make(x, names().new_zeros, *step.sizes[kH0]);
    } else {
      if (!(PyTuple_CheckExact(hx.ptr()) || PyList_CheckExact(hx.ptr())) ||
          PySequence_Fast_GET_SIZE(hx.ptr()) != 2) {
        return false;
      }
      for (int k : {kH0, kC0}) {
        PyObject* const state = PySequence_Fast_GET_ITEM(hx.ptr(), k - kH0);
        given[k] = pybind11::reinterpret_borrow<Object>(state);
      }
    }
    for (int k = kFirstWeight; k < kTensors; ++k) {
      PyObject* const weight = PyDict_GetItemWithError(parameters.ptr(), roles[k - kFirstWeight]);
      if (!weight && PyErr_Occurred()) throw pybind11::error_already_set();
      const bool is_there = weight && weight != Py_None;
      if (is_there != bool(step.sizes[k])) return false;
      if (is_there) given[k] = pybind11::reinterpret_borrow<Object>(weight);
    }
    return true;
  }

  // Where the numbers of one of the eight are; false for what is not for this way. own: x's dtype,
  // which is looked at first.
  bool place(Handle value, const Step& step, int k, PyObject*& own, Place& to) const {
    const auto is_right = [&](const Look& found) {
      if (!own) own = found.dtype;
      return found.dtype == step.dtype.ptr() ||
             (step.casts && found.dtype && (found.dtype == own || found.code == Dtype::kFloat32));
    };
    return place(value, *step.sizes[k], is_right, to);
  }
  template <class IsRight>
  bool place(Handle value, const Sizes& sizes, const IsRight& is_right, Place& to) const {
    Look found;
    if (!look(value, found) || !is_number(found.dtype) || !is_right(found) || !found.here ||
        !(found.sizes == sizes)) {
      return false;
    }
    void* const memory =
        taken(value, found.contiguous ? found.contiguous : found.channels_last, to.kept);
    if (!memory) return false;
    int64_t count = 1;
    for (Py_ssize_t d = 0; d < sizes.count; ++d) count *= sizes.of[d];
    to.tensor = {memory, found.code, !found.channels_last, count};
    return true;
  }

  bool records(const std::array<Object, kTensors>& given) const {
    return surroundings_.recording() &&
           std::any_of(given.begin(), given.end(), [](const Object& tensor) {
             return tensor && get(tensor, names().requires_grad).ptr() == Py_True;
           });
  }

  static ConvTensor written(const Object& tensor, Dtype own, int64_t count) {
    return {memory_of(tensor), own, false, count};
  }

  ConvCellStep call_of(const Step& step, const std::array<Place, kTensors>& at) const {
    ConvCellStep call{};
    call.dtype = code_of(step.dtype);
    call.threads = surroundings_.threads();
    call.N = step.N;
    call.C = step.C();
    call.of_x = step.of_x;
    call.of_h = step.of_h;
    ConvTensor* const to[] = {&call.x,    &call.h0,   &call.c0,   &call.w_ih,
                              &call.w_hh, &call.b_ih, &call.b_hh, &call.w_ch};
    for (int k = 0; k < kTensors; ++k) *to[k] = at[size_t(k)].tensor;
    return call;
  }

  // made(cell) with the memory that it takes, without the interpreter's lock.
  template <class Made>
  static void run(const ConvCellStep& call, const pybind11::function& workspace, const Made& made) {
    const CpuKernels& kernels = cpu_kernels();
    of_dtype(call.dtype, [&](auto element) {
      using Call = ConvCellCall<decltype(element)>;
      Call sized(call, kernels, nullptr);
      const Object scratch = workspace(made(sized));
      Call cell(call, kernels, memory_of(scratch));
      const pybind11::gil_scoped_release release;
      made(cell);
    });
  }

  const Surroundings surroundings_;
};

inline void bind_cpu_conv_cell(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CpuConvCell::Step>(m, "ConvCellStep", py::module_local())
      .def(py::init<const ConvWindow&, const ConvWindow&, int64_t, int, bool, bool, py::object,
                    bool>(),
           "of_x"_a, "of_h"_a, "N"_a, "dims"_a, "bias"_a, "peephole"_a, "dtype"_a, "casts"_a);
  py::class_<CpuConvCell>(m, "CpuConvCell", py::module_local())
      .def(py::init<py::tuple, const py::dict&, py::object, py::object, const py::object&,
                    const Surroundings&>(),
           "types"_a, "codes"_a, "half_acc"_a, "bytes"_a, "exchange"_a, "surroundings"_a)
      .def("given", &CpuConvCell::given, "step"_a, "parameters"_a, "x"_a, "hx"_a)
      .def("cpu_conv_cell", &CpuConvCell::forward, "step"_a, "parameters"_a, "x"_a, "hx"_a,
           "workspace"_a)
      .def("cpu_conv_cell_backward", &CpuConvCell::backward, "step"_a, "gradients"_a, "saved"_a,
           "wanted"_a, "workspace"_a);
}

}  // namespace lstm_ext
