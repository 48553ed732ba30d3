// A plain layer or cell on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "bind_cpu.h"
#include "bind_cpu_plain_backward.h"
#include "bind_plain.h"
#include "bind_surroundings.h"

namespace lstm_ext {

struct CpuPlain : PlainTensors {
  // Arguments as of PlainTensors.
  CpuPlain(pybind11::tuple types, const pybind11::dict& codes, Object half_acc, Object bytes,
           const Object& exchange, const Surroundings& surroundings)
      : PlainTensors(std::move(types), codes, std::move(half_acc), std::move(bytes),
                     pybind11::str("is_cpu"), dlpack::kCpu, exchange),
        surroundings_(surroundings) {}

  // Arguments as for PlainInputs::read. Returns what PlainOutputs::all has, saved as save says, but
  // -1: 1 where autograd records, else 0; or None, for what PlainInputs::read refuses.
  Object forward(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H,
                 int64_t P, int64_t T, bool batch_first, int save,
                 const pybind11::function& workspace) const {
    PlainInputs in(*this);
    LstmForward p{};
    p.pack_input = surroundings_.deterministic();
    p.threads = surroundings_.threads();
    if (save < 0) save = surroundings_.recording();
    const auto read = [&] {
      return in.read(x, hx, weights, I, H, P, T, batch_first, nullptr, true,
                     [&] { return accepts(in, p); });
    };
    if (!answered(read)) return pybind11::none();
    const PlainOutputs out(in, x, in.saves(save));
    run(p, in, out, nullptr, workspace);
    return out.all();
  }

  // A step of a cell, as forward; or None as well if something surrounds the call, if x is
  // elsewhere, or if variants take part, or it has more parameters, or a weight in another place.
  Object cell(Handle cell, Handle x, Handle hx, const pybind11::function& workspace) const {
    if (!surroundings_.none()) return pybind11::none();
    Look found;
    if (!answered([&] { return look(x, found) && found.here; })) return pybind11::none();
    // As Variants._varied.
    const auto any = [&](const auto& names) {
      return std::any_of(names.begin(), names.end(), [&](PyObject* name) {
        const int truth = PyObject_IsTrue(get(cell, name).ptr());
        if (truth < 0) throw pybind11::error_already_set();
        return truth == 1;
      });
    };
    const CellNames& names = cell_names();
    if (any(names.variants) || (any(names.dropouts) && any(names.training))) {
      return pybind11::none();
    }
    const Object parameters = get(cell, names.parameters);
    // A dict of another class may make what is taken out of it, as DeepSpeed's gathers weights.
    if (!PyDict_CheckExact(parameters.ptr()) ||
        size_t(PyDict_Size(parameters.ptr())) != names.weights.size()) {
      return pybind11::none();
    }
    pybind11::list weights(PlainCall::kWeights);
    for (size_t k = 0; k < names.weights.size(); ++k) {
      PyObject* const weight = PyDict_GetItemWithError(parameters.ptr(), names.weights[k]);
      if (!weight && PyErr_Occurred()) throw pybind11::error_already_set();
      if (!weight) return pybind11::none();
      weights[k] = Handle(weight);
    }
    weights[PlainCall::kWeights - 1] = pybind11::none();
    const auto size = [&](PyObject* name) { return get(cell, name).cast<int64_t>(); };
    const int64_t I = size(names.input_size), H = size(names.hidden_size);
    return forward(x, hx, weights, I, H, 0, 0, false, -1, workspace);
  }

  // With weights of 8 bits, in float32. weights: of each direction W_ih, W_hh and their scales as
  // in QuantizedWeights, the bias or None, and W_hr and its scale, without a projection None. The
  // rest as for forward.
  Object forward_quantized(Handle x, Handle hx, const pybind11::list& weights, int row_bits,
                           int64_t I, int64_t H, int64_t P, int64_t T, bool batch_first,
                           const pybind11::function& workspace) const {
    constexpr int of_direction = 7;
    PlainInputs in(*this);
    QuantizedWeights quantized[PlainCall::kMostDirections] = {};
    std::array<Object, of_direction * PlainCall::kMostDirections> kept;
    const auto read = [&] {
      in.directions = int(weights.size() / of_direction);
      if (weights.size() % of_direction || !in.read_sizes(x, I, H, P, T, batch_first, nullptr) ||
          in.code != Dtype::kFloat32 || std::max({I, H, in.P}) > QuantizedWeights::kMostColumns ||
          !in.read_states(x, hx, true)) {
        return false;
      }
      for (int d = 0; d < in.directions; ++d) {
        const auto given = [&](int k) {
          return Handle(PyList_GET_ITEM(weights.ptr(), d * of_direction + k));
        };
        const auto take = [&](int k, const Sizes& sizes, PyObject* type = nullptr) {
          return in.dense(given(k), sizes, kept[size_t(d * of_direction + k)], type);
        };
        const auto codes = [&](int k, int weight, int64_t rows, int64_t columns, int64_t gates) {
          constexpr int64_t block = QuantizedWeights::kRows, depth = QuantizedWeights::kDepth;
          const Sizes sizes{(rows + block - 1) / block, (columns + depth - 1) / depth,
                            gates * block * depth};
          void* const memory = take(k, sizes, bytes().ptr());
          in.memory[size_t(PlainCall::at(weight, d))] = memory;
          return memory != nullptr;
        };
        const auto scale = [&](int k, int64_t rows, const float*& to) {
          to = static_cast<float*>(take(k, rows));
          return to != nullptr;
        };
        QuantizedWeights& own = quantized[d];
        own.row_bits = row_bits;
        own.byte_products = cpu_kernels().byte_products;
        const void*& bias = in.memory[size_t(PlainCall::at(PlainCall::kBih, d))];
        if (!codes(0, PlainCall::kWih, H, I, 4) || !codes(1, PlainCall::kWhh, H, in.P, 4) ||
            !scale(2, 4 * H, own.ih_scale) || !scale(3, 4 * H, own.hh_scale) ||
            (!given(4).is_none() && !(bias = take(4, 4 * H)))) {
          return false;
        }
        const bool as_said = in.projected
                                 ? codes(5, PlainCall::kWhr, P, H, 1) && scale(6, P, own.hr_scale)
                                 : given(5).is_none() && given(6).is_none();
        if (!as_said) return false;
      }
      return true;
    };
    if (!answered(read) || (in.requires_grad && surroundings_.recording())) return pybind11::none();
    const PlainOutputs out(in, x, false);
    LstmForward p{};
    p.threads = surroundings_.threads();
    run(p, in, out, quantized, workspace);
    return out.all();
  }

  // As CpuPlainBackward::run.
  Object backward(const pybind11::tuple& gradients, const pybind11::tuple& saved,
                  const pybind11::tuple& wanted, int64_t T, bool batch_first, bool with_dgates,
                  int64_t most_rows, const pybind11::function& workspace) const {
    return CpuPlainBackward::run(*this, gradients, saved, wanted, T, batch_first, with_dgates,
                                 surroundings_.threads(), most_rows, workspace);
  }

 private:
  struct CellNames {
    std::array<PyObject*, 3> variants{PyUnicode_InternFromString("peephole"),
                                      PyUnicode_InternFromString("layer_norm"),
                                      PyUnicode_InternFromString("zoneout")};
    std::array<PyObject*, 2> dropouts{PyUnicode_InternFromString("recurrent_dropout"),
                                      PyUnicode_InternFromString("weight_dropout")};
    std::array<PyObject*, 1> training{PyUnicode_InternFromString("training")};
    std::array<PyObject*, 4> weights{
        PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
        PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
    PyObject* parameters = PyUnicode_InternFromString("_parameters");
    PyObject* input_size = PyUnicode_InternFromString("input_size");
    PyObject* hidden_size = PyUnicode_InternFromString("hidden_size");
  };
  static const CellNames& cell_names() {
    static const CellNames instance;
    return instance;
  }

  // Whether the kernels compute as a layer's way would.
  static bool accepts(const PlainInputs& in, LstmForward& p) {
    if (in.code != Dtype::kBFloat16) return true;
    p.bf16_products = cpu_kernels().bf16_products && in.I % 2 == 0 && openmp_grants(p.threads);
    return p.bf16_products;
  }

  // quantized: of each direction; null: none.
  static void run(LstmForward p, const PlainInputs& in, const PlainOutputs& out,
                  const QuantizedWeights* quantized, const pybind11::function& workspace) {
    p.dtype = in.code;
    p.steps = in.steps;
    p.H = in.H;
    p.P = in.P;
    p.y_stride = in.directions * in.P;
    p.I = in.I;
    p.x = in.memory[PlainCall::kX];
    const auto direction = [&](int k) {
      LstmForward own = p;
      own.steps.reverse = k == 1;
      own.y = PlainCall::part(memory_of(out.y), k * in.P * storage_bytes(in.code));
      out.put(own, k);
      if (quantized) own.quantized = quantized[k];
      return own;
    };
    const LstmForward first = direction(0), second = direction(in.directions - 1);
    run_directions(cpu_kernels().forward, first, in.directions == 2 ? &second : nullptr, workspace);
  }

  const Surroundings surroundings_;
};

inline void bind_cpu_plain(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CpuPlain>(m, "CpuPlain", py::module_local())
      .def(py::init<py::tuple, const py::dict&, py::object, py::object, const py::object&,
                    const Surroundings&>(),
           "types"_a, "codes"_a, "half_acc"_a, "bytes"_a, "exchange"_a, "surroundings"_a)
      .def("cpu_forward", &CpuPlain::forward, "x"_a, "hx"_a, "weights"_a, "I"_a, "H"_a, "P"_a,
           "T"_a, "batch_first"_a, "save"_a, "workspace"_a)
      .def("cpu_cell", &CpuPlain::cell, "cell"_a, "x"_a, "hx"_a, "workspace"_a)
      .def("cpu_forward_quantized", &CpuPlain::forward_quantized, "x"_a, "hx"_a, "weights"_a,
           "row_bits"_a, "I"_a, "H"_a, "P"_a, "T"_a, "batch_first"_a, "workspace"_a)
      .def("cpu_backward", &CpuPlain::backward, "gradients"_a, "saved"_a, "wanted"_a, "T"_a,
           "batch_first"_a, "with_dgates"_a, "most_rows"_a, "workspace"_a);
}

}  // namespace lstm_ext
