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

  // Arguments as for PlainInputs::read. Returns what PlainOutputs::all has, saved if grad and any
  // tensor requires grad; or None, for what PlainInputs::read refuses.
  Object forward(Handle x, Handle hx, const pybind11::list& weights, int64_t I, int64_t H,
                 int64_t T, bool batch_first, int threads, bool pack_input, bool grad,
                 const pybind11::function& workspace) const {
    PlainInputs in(*this);
    LstmForward p{};
    p.pack_input = pack_input;
    p.threads = threads;
    const auto accepts = [&] {
      if (in.code != Dtype::kBFloat16) return true;
      p.bf16_products = cpu_kernels().bf16_products && I % 2 == 0 && openmp_grants(threads);
      return p.bf16_products;
    };
    const auto read = [&] {
      return in.read(x, hx, weights, I, H, T, batch_first, nullptr, true, accepts);
    };
    if (!answered(read)) return pybind11::none();
    const PlainOutputs out(in, x, grad && in.requires_grad);
    p.dtype = in.code;
    p.steps = in.steps;
    p.H = p.P = H;
    p.y_stride = in.directions * H;
    p.I = I;
    p.x = in.memory[PlainCall::kX];
    const LstmForward first = direction(p, in, out, 0);
    const LstmForward second = in.directions == 2 ? direction(p, in, out, 1) : LstmForward{};
    run_directions(cpu_kernels().forward, first, in.directions == 2 ? &second : nullptr, workspace);
    return out.all();
  }

 private:
  // p with what is a direction's own.
  static LstmForward direction(LstmForward p, const PlainInputs& in, const PlainOutputs& out,
                               int d) {
    const auto input = [&](int k) { return in.memory[PlainCall::at(k, d)]; };
    // Of a tensor of all directions, each of so many numbers.
    const auto part = [&](const Object& tensor, int64_t numbers, int64_t bytes) -> char* {
      char* const memory = static_cast<char*>(memory_of(tensor));
      return memory ? memory + d * numbers * bytes : nullptr;
    };
    const int64_t B = p.steps.B, rows = p.steps.rows, H = p.H;
    const int64_t bytes = storage_bytes(p.dtype), acc = acc_bytes(p.dtype);
    p.steps.reverse = d == 1;
    p.w_ih = input(PlainCall::kWih);
    p.w_hh = input(PlainCall::kWhh);
    p.b_ih = input(PlainCall::kBih);
    p.b_hh = input(PlainCall::kBhh);
    p.gates = part(out.gates, rows * 4 * H, acc);
    p.c_seq = part(out.c_seq, rows * H, acc);
    p.y = part(out.y, H, bytes);
    if (in.states() == 1) {  // of all directions
      const auto state = [&](int k) {
        return static_cast<const char*>(in.memory[k]) + d * B * H * bytes;
      };
      p.h0 = state(PlainCall::kH0);
      p.c0 = state(PlainCall::kC0);
      p.h_n = part(out.h_n[0], B * H, bytes);
      p.c_n = part(out.c_n[0], B * H, bytes);
    } else {
      p.h0 = input(PlainCall::kH0);
      p.c0 = input(PlainCall::kC0);
      p.h_n = memory_of(out.h_n[size_t(d)]);
      p.c_n = memory_of(out.c_n[size_t(d)]);
    }
    return p;
  }
};

inline void bind_cpu_plain(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CpuPlain>(m, "CpuPlain", py::module_local())
      .def(py::init<py::tuple, py::dict, py::object>(), "types"_a, "codes"_a, "half_acc"_a)
      .def("cpu_forward", &CpuPlain::forward, "x"_a, "hx"_a, "weights"_a, "I"_a, "H"_a, "T"_a,
           "batch_first"_a, "threads"_a, "pack_input"_a, "grad"_a, "workspace"_a)
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
