// A plain layer or cell on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include "bind_cpu.h"
#include "bind_cpu_plain_backward.h"
#include "bind_plain.h"

namespace lstm_ext {

struct CpuPlain : PlainTensors {
  CpuPlain(pybind11::tuple types, pybind11::dict codes, Object half_acc)
      : PlainTensors(std::move(types), std::move(codes), std::move(half_acc),
                     pybind11::str("is_cpu")) {}

  // Arguments as for PlainInputs::read. Returns what PlainOutputs::all has, saved as save says; or
  // None, for what PlainInputs::read refuses.
  Object forward(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H,
                 int64_t P, int64_t T, bool batch_first, int threads, bool pack_input, int save,
                 const pybind11::function& workspace) const {
    PlainInputs in(*this);
    LstmForward p{};
    p.pack_input = pack_input;
    p.threads = threads;
    const auto read = [&] {
      return in.read(x, hx, weights, I, H, P, T, batch_first, nullptr, true,
                     [&] { return accepts(in, p); });
    };
    if (!answered(read)) return pybind11::none();
    const PlainOutputs out(in, x, in.saves(save));
    run(p, in, out, nullptr, workspace);
    return out.all();
  }

  // With weights of 8 bits, in float32. weights: of each direction W_ih, W_hh and their scales as
  // in QuantizedWeights, the bias or None, and W_hr and its scale, without a projection None; byte:
  // their dtype. The rest as for forward.
  Object forward_quantized(Handle x, Handle hx, const pybind11::list& weights, Handle byte,
                           int row_bits, int64_t I, int64_t H, int64_t P, int64_t T,
                           bool batch_first, int threads, bool grad,
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
          void* const memory = take(k, sizes, byte.ptr());
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
    if (!answered(read) || (grad && in.requires_grad)) return pybind11::none();
    const PlainOutputs out(in, x, false);
    LstmForward p{};
    p.threads = threads;
    run(p, in, out, quantized, workspace);
    return out.all();
  }

 private:
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
};

inline void bind_cpu_plain(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CpuPlain>(m, "CpuPlain", py::module_local())
      .def(py::init<py::tuple, py::dict, py::object>(), "types"_a, "codes"_a, "half_acc"_a)
      .def("cpu_forward", &CpuPlain::forward, "x"_a, "hx"_a, "weights"_a, "I"_a, "H"_a, "P"_a,
           "T"_a, "batch_first"_a, "threads"_a, "pack_input"_a, "save"_a, "workspace"_a)
      .def("cpu_forward_quantized", &CpuPlain::forward_quantized, "x"_a, "hx"_a, "weights"_a,
           "byte"_a, "row_bits"_a, "I"_a, "H"_a, "P"_a, "T"_a, "batch_first"_a, "threads"_a,
           "grad"_a, "workspace"_a)
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
