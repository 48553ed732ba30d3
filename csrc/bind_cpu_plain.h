// A plain layer or cell on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include "bind_cpu.h"
#include "bind_cpu_plain_backward.h"
#include "bind_plain.h"

namespace lstm_ext {

struct CpuPlain : PlainTensors {
  // What a direction has besides.
  struct More {
    QuantizedWeights quantized{};
    const void* w_hr = nullptr;
  };

  CpuPlain(pybind11::tuple types, pybind11::dict codes, Object half_acc)
      : PlainTensors(std::move(types), std::move(codes), std::move(half_acc),
                     pybind11::str("is_cpu")) {}

  // Arguments as for PlainInputs::read. Returns what PlainOutputs::all has, saved as save says; or
  // None, for what PlainInputs::read refuses.
  Object forward(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H,
                 int64_t T, bool batch_first, int threads, bool pack_input, int save,
                 const pybind11::function& workspace) const {
    PlainInputs in(*this);
    LstmForward p{};
    p.pack_input = pack_input;
    p.threads = threads;
    const auto read = [&] {
      return in.read(x, hx, weights, I, H, T, batch_first, nullptr, true,
                     [&] { return accepts(in, p); });
    };
    if (!answered(read)) return pybind11::none();
    const PlainOutputs out(in, x, in.saves(save));
    run(p, in, out, nullptr, workspace);
    return out.all();
  }

  // As forward, with projections to P features. weights: of each direction those of forward, and
  // W_hr (P, H), which is saved after them.
  Object forward_projected(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H,
                           int64_t P, int64_t T, bool batch_first, int threads, bool pack_input,
                           int save, const pybind11::function& workspace) const {
    constexpr int of_direction = PlainCall::kWeights + 1;
    PlainInputs in(*this);
    LstmForward p{};
    p.pack_input = pack_input;
    p.threads = threads;
    More more[PlainCall::kMostDirections] = {};
    std::array<Object, PlainCall::kMostDirections> kept, given;
    const auto read = [&] {
      in.directions = int(weights.size() / of_direction);
      if (weights.size() % of_direction || !in.read_sizes(x, I, H, T, batch_first, nullptr) ||
          !accepts(in, p)) {
        return false;
      }
      in.P = P;
      if (!in.read_states(x, hx, true) || !in.read_weights(weights, of_direction)) return false;
      for (int d = 0; d < in.directions; ++d) {
        const Handle w_hr(PyList_GET_ITEM(weights.ptr(), (d + 1) * of_direction - 1));
        if (!(more[d].w_hr = in.dense(w_hr, {P, H}, kept[size_t(d)]))) return false;
        in.requires_grad |= get(w_hr, names().requires_grad).ptr() == Py_True;
        given[size_t(d)] = pybind11::reinterpret_borrow<Object>(w_hr);
      }
      return true;
    };
    if (!answered(read)) return pybind11::none();
    const PlainOutputs out(in, x, in.saves(save));
    run(p, in, out, more, workspace);
    return out.all(given.data());
  }

  // With weights of 8 bits, in float32. weights: of each direction W_ih, W_hh and their scales as
  // in QuantizedWeights, and the bias or None; byte: their dtype. The rest as for forward.
  Object forward_quantized(Handle x, Handle hx, const pybind11::list& weights, Handle byte,
                           int row_bits, int64_t I, int64_t H, int64_t T, bool batch_first,
                           int threads, bool grad, const pybind11::function& workspace) const {
    constexpr int of_direction = 5;
    PlainInputs in(*this);
    More more[PlainCall::kMostDirections] = {};
    std::array<Object, of_direction * PlainCall::kMostDirections> kept;
    const auto read = [&] {
      in.directions = int(weights.size() / of_direction);
      if (weights.size() % of_direction || !in.read_sizes(x, I, H, T, batch_first, nullptr) ||
          in.code != Dtype::kFloat32 || std::max(I, H) > QuantizedWeights::kMostColumns ||
          !in.read_states(x, hx, true)) {
        return false;
      }
      const auto codes = [](int64_t rows, int64_t columns) {
        constexpr int64_t block = QuantizedWeights::kRows, depth = QuantizedWeights::kDepth;
        return Sizes{(rows + block - 1) / block, (columns + depth - 1) / depth, 4 * block * depth};
      };
      for (int d = 0; d < in.directions; ++d) {
        QuantizedWeights& scales = more[d].quantized;
        scales.row_bits = row_bits;
        scales.byte_products = cpu_kernels().byte_products;
        const auto take = [&](int k, const Sizes& sizes, PyObject* type = nullptr) -> void* {
          const int n = d * of_direction + k;
          return in.dense(PyList_GET_ITEM(weights.ptr(), n), sizes, kept[size_t(n)], type);
        };
        const void*& bias = in.memory[size_t(PlainCall::at(PlainCall::kBih, d))];
        const bool biased = PyList_GET_ITEM(weights.ptr(), d * of_direction + 4) != Py_None;
        if (!(in.memory[size_t(PlainCall::at(PlainCall::kWih, d))] =
                  take(0, codes(H, I), byte.ptr())) ||
            !(in.memory[size_t(PlainCall::at(PlainCall::kWhh, d))] =
                  take(1, codes(H, H), byte.ptr())) ||
            !(scales.ih_scale = static_cast<float*>(take(2, 4 * H))) ||
            !(scales.hh_scale = static_cast<float*>(take(3, 4 * H))) ||
            (biased && !(bias = take(4, 4 * H)))) {
          return false;
        }
      }
      return true;
    };
    if (!answered(read) || (grad && in.requires_grad)) return pybind11::none();
    const PlainOutputs out(in, x, false);
    LstmForward p{};
    p.threads = threads;
    run(p, in, out, more, workspace);
    return out.all();
  }

 private:
  // Whether the kernels compute as a layer's way would.
  static bool accepts(const PlainInputs& in, LstmForward& p) {
    if (in.code != Dtype::kBFloat16) return true;
    p.bf16_products = cpu_kernels().bf16_products && in.I % 2 == 0 && openmp_grants(p.threads);
    return p.bf16_products;
  }

  // more: of each direction; null: nothing.
  static void run(LstmForward p, const PlainInputs& in, const PlainOutputs& out, const More* more,
                  const pybind11::function& workspace) {
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
      if (more) {
        own.quantized = more[k].quantized;
        own.w_hr = more[k].w_hr;
      }
      return own;
    };
    const LstmForward first = direction(0), second = direction(in.directions - 1);
    run_directions(cpu_kernels().forward, first, in.directions == 2 ? &second : nullptr, workspace);
  }
};

inline void bind_cpu_plain(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CpuPlain>(m, "CpuPlain", py::module_local())
      .def(py::init<py::tuple, py::dict, py::object>(), "types"_a, "codes"_a, "half_acc"_a)
      .def("cpu_forward", &CpuPlain::forward, "x"_a, "hx"_a, "weights"_a, "I"_a, "H"_a, "T"_a,
           "batch_first"_a, "threads"_a, "pack_input"_a, "save"_a, "workspace"_a)
      .def("cpu_forward_projected", &CpuPlain::forward_projected, "x"_a, "hx"_a, "weights"_a, "I"_a,
           "H"_a, "P"_a, "T"_a, "batch_first"_a, "threads"_a, "pack_input"_a, "save"_a,
           "workspace"_a)
      .def("cpu_forward_quantized", &CpuPlain::forward_quantized, "x"_a, "hx"_a, "weights"_a,
           "byte"_a, "row_bits"_a, "I"_a, "H"_a, "T"_a, "batch_first"_a, "threads"_a, "grad"_a,
           "workspace"_a)
      .def(
          "cpu_backward",
          [](const CpuPlain& tensors, const py::tuple& gradients, const py::tuple& saved,
             const py::tuple& wanted, int64_t T, bool batch_first, int threads, int64_t most_rows,
             const py::function& workspace) {
            return CpuPlainBackward::run(tensors, gradients, saved, wanted, T, batch_first, threads,
                                         most_rows, workspace);
          },
          "gradients"_a, "saved"_a, "wanted"_a, "T"_a, "batch_first"_a, "threads"_a, "most_rows"_a,
          "workspace"_a);
}

}  // namespace lstm_ext
