// A plain layer or cell on the CUDA engine, in one call each way.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <tuple>

#include "bind_plain.h"
#include "cuda/plain.h"

namespace lstm_ext {

class CudaPlain : public PlainTensors {
 public:
  // is_cpu: the device is emulated. The rest as of PlainTensors.
  CudaPlain(pybind11::tuple types, const pybind11::dict& codes, Object half_acc, Object bytes,
            bool is_cpu, const Object& exchange)
      : PlainTensors(std::move(types), codes, std::move(half_acc), std::move(bytes),
                     pybind11::str(is_cpu ? "is_cpu" : "is_cuda"),
                     is_cpu ? dlpack::kCpu : dlpack::kCuda, exchange) {}

  // engine: a cuda.engine.CudaEngine, always the same. The rest as for PlainInputs::read. Returns
  // what PlainOutputs::all has, saved as save says; or None, for what PlainInputs::read refuses, or
  // if a size is 0.
  Object forward(Handle engine, Handle x, Handle hx, const pybind11::list& weights, int64_t I,
                 int64_t H, int64_t P, int64_t T, bool batch_first, Handle rows, int save) {
    PlainInputs in(*this);
    const Steps* const where = steps_of(rows);
    const auto accepts = [&] { return I > 0 && H > 0; };
    const auto read = [&] {
      return in.read(x, hx, weights, I, H, P, T, batch_first, where, false, accepts);
    };
    if (!answered(read)) return pybind11::none();
    const Guard guard(engine, x, in.device);
    const PlainOutputs out(in, x, in.saves(save));
    CudaPlainForward p{};
    p.layer = layer(engine, x, in, false);
    p.I = I;
    p.x = in.memory[PlainCall::kX];
    p.y = memory_of(out.y);
    for (int k = 0; k < in.directions; ++k) out.put(p.direction[k], k);
    run(CudaPlainForwardRun(p), x);
    return out.all();
  }

  // Arguments as for PlainSaved::read. Returns the gradients of the inputs, None where not wanted;
  // or None, for what PlainSaved::read refuses.
  Object backward(Handle engine, const pybind11::tuple& gradients, const pybind11::tuple& saved,
                  const pybind11::tuple& wanted, int64_t T, bool batch_first, Handle rows) {
    PlainSaved in(*this);
    const Steps* const where = steps_of(rows);
    const auto accepts = [&] { return in.I > 0 && in.H > 0; };
    const auto read = [&] {
      return in.read(gradients, saved, wanted, T, batch_first, where, true, accepts);
    };
    if (!answered(read)) return pybind11::none();
    const Handle x = in.kept[PlainCall::kX];
    const Guard guard(engine, x, in.device);
    PlainCall::Objects made;
    std::array<void*, PlainCall::kMostInputs> outputs{};
    for (int k = 0; k < in.inputs(); ++k) {
      if (!in.wanted[k]) continue;
      // Beside x: a state that is not there has no gradient.
      made[k] = PlainCall::empty(x, in.input_size(k));
      outputs[k] = memory_of(made[k]);
    }
    CudaPlainBackward p{};
    p.layer = layer(engine, x, in, true);
    p.I = in.I;
    p.x = in.memory[PlainCall::kX];
    p.y = in.y;
    p.dy = in.dy;
    p.dx = outputs[PlainCall::kX];
    for (int k = 0; k < in.directions; ++k) {
      auto& d = p.direction[k];
      const int of = in.module ? 0 : k;  // the tensors that have its states
      d.w_ih = in.memory[in.at(PlainCall::kWih, k)];
      d.w_hh = in.memory[in.at(PlainCall::kWhh, k)];
      d.w_hr = in.memory[in.at(PlainCall::kWhr, k)];
      d.h0 = in.state(in.memory[in.at(PlainCall::kH0, of)], k, in.P);
      d.c0 = in.state(in.memory[in.at(PlainCall::kC0, of)], k, in.H);
      d.gates = in.rows_of(in.gates, 4 * in.H, k);
      d.c_seq = in.rows_of(in.c_seq, in.H, k);
      d.dh_n = in.state(in.dh_n[of], k, in.P);
      d.dc_n = in.state(in.dc_n[of], k, in.H);
      d.dh0 = in.state(outputs[in.at(PlainCall::kH0, of)], k, in.P);
      d.dc0 = in.state(outputs[in.at(PlainCall::kC0, of)], k, in.H);
      d.dw_ih = outputs[in.at(PlainCall::kWih, k)];
      d.dw_hh = outputs[in.at(PlainCall::kWhh, k)];
      d.dw_hr = outputs[in.at(PlainCall::kWhr, k)];
      d.db_ih = outputs[in.at(PlainCall::kBih, k)];
      d.db_hh = outputs[in.at(PlainCall::kBhh, k)];
    }
    run(CudaPlainBackwardRun(p), x);
    return in.all(made);
  }

 private:
  struct EngineNames {
    PyObject* is_current = PyUnicode_InternFromString("is_current");
    PyObject* guard = PyUnicode_InternFromString("guard");
    PyObject* device = PyUnicode_InternFromString("device");
    PyObject* uses_tf32 = PyUnicode_InternFromString("uses_tf32");
    PyObject* raw_stream = PyUnicode_InternFromString("raw_stream");
    PyObject* plan = PyUnicode_InternFromString("plan");
  };
  static const EngineNames& engine_names() {
    static const EngineNames instance;
    return instance;
  }

  // Of a Steps, or None: pybind11 would try all arguments twice for a pointer that may be null.
  static const Steps* steps_of(Handle rows) {
    return rows.is_none() ? nullptr : &rows.cast<const Steps&>();
  }

  // Makes x's device current, unless it is.
  class Guard {
   public:
    Guard(Handle engine, Handle x, int64_t device) {
      const EngineNames& names = engine_names();
      const Object index = checked(PyLong_FromLongLong(device));
      if (call(engine, names.is_current, index).ptr() == Py_True) return;
      guard_ = call(engine, names.guard, get(x, names.device));
      guard_.attr("__enter__")();
    }
    ~Guard() {
      if (!guard_) return;
      try {
        guard_.attr("__exit__")(pybind11::none(), pybind11::none(), pybind11::none());
      } catch (pybind11::error_already_set& error) {
        error.discard_as_unraisable("leaving a device");
      }
    }

   private:
    Object guard_;
  };

  CudaLayer layer(Handle engine, Handle x, const PlainCall& in, bool backward) {
    const EngineNames& names = engine_names();
    CudaLayer made{};
    made.dtype = in.code;
    made.tf32 = in.code == Dtype::kFloat32 && call(engine, names.uses_tf32, x).ptr() == Py_True;
    made.device = int(std::max<int64_t>(in.device, 0));
    const Object index = checked(PyLong_FromLongLong(in.device));
    made.stream = PyLong_AsVoidPtr(call(engine, names.raw_stream, index).ptr());
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    made.directions = in.directions;
    made.steps = in.steps;
    made.H = in.H;
    made.P = in.P;
    made.K = padded(in.P, in.code);
    made.plan = plan(engine, x, in, made.tf32, backward);
    return made;
  }

  // As the engine chooses it, whom it is asked once a shape.
  const CudaPlan& plan(Handle engine, Handle x, const PlainCall& in, bool tf32, bool backward) {
    // All that a plan asks of T is whether there is more than one step.
    const bool one_step = in.steps.T == 1;
    const auto key = std::make_tuple(in.steps.B, in.H, in.projected ? in.P : 0, in.device,
                                     in.directions, in.code, tf32, backward, one_step);
    const auto found = plans_.find(key);
    if (found != plans_.end()) return found->second;
    if (plans_.size() >= kMostPlans) plans_.clear();
    const EngineNames& names = engine_names();
    const Object chosen = get(engine, names.plan)(
        get(x, names.device), Handle(in.dtype), tf32, backward, in.projected, false, false,
        in.directions, one_step ? 1 : 2, in.steps.B, in.H, in.P);
    return plans_.emplace(key, chosen.cast<const CudaPlan&>()).first->second;
  }

  template <class Run>
  void run(const Run& run, Handle x) const {
    // Whatever the allocator's own alignment is.
    const int64_t alignment = 256;
    const Object scratch = PlainCall::empty(x, run.bytes() + alignment, bytes());
    const auto address = reinterpret_cast<uintptr_t>(memory_of(scratch));
    void* const aligned =
        reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
    const pybind11::gil_scoped_release release;
    run.run(aligned);
  }

  static constexpr size_t kMostPlans = 4096;
  // The key holds all that differs between plain layers.
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t, int, Dtype, bool, bool, bool>, CudaPlan>
      plans_;
};

inline void bind_cuda_plain(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<CudaPlain>(m, "CudaPlain", py::module_local())
      .def(py::init<py::tuple, const py::dict&, py::object, py::object, bool, const py::object&>(),
           "types"_a, "codes"_a, "half_acc"_a, "bytes"_a, "is_cpu"_a, "exchange"_a)
      .def("cuda_forward", &CudaPlain::forward, "engine"_a, "x"_a, "hx"_a, "weights"_a, "I"_a,
           "H"_a, "P"_a, "T"_a, "batch_first"_a, "rows"_a, "save"_a)
      .def("cuda_backward", &CudaPlain::backward, "engine"_a, "gradients"_a, "saved"_a, "wanted"_a,
           "T"_a, "batch_first"_a, "rows"_a);
}

}  // namespace lstm_ext
