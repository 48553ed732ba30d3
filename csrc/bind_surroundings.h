// What surrounds a call: questions to torch, each a call of its own, which take longer from Python
// than a small cell's step does, most of all where other code has run since the last one.
#pragma once

#include <pybind11/pybind11.h>

namespace lstm_ext {

class Surroundings {
  using Object = pybind11::object;

 public:
  // functions: of torch, by what they are asked; forward_ad: torch.autograd.forward_ad.
  Surroundings(const pybind11::dict& functions, Object forward_ad)
      : dispatch_(functions["dispatch_modes"]),
        transforms_(functions["transforms"]),
        tracing_(functions["tracing"]),
        autocast_(functions["autocast"]),
        function_mode_(functions["function_mode"]),
        grad_(functions["grad"]),
        inference_(functions["inference"]),
        threads_(functions["threads"]),
        deterministic_(functions["deterministic"]),
        forward_ad_(std::move(forward_ad)) {}

  // Whether operations are recorded or run otherwise: a tensor may have no memory.
  bool watched() const { return asked(dispatch_) || asked(transforms_) || asked(tracing_); }
  // Whether anything but autograd's recording has a say in what an operation does.
  bool surrounded() const { return watched() || asked(autocast_) || is_forward_mode(); }
  // Whether there is neither that nor a TorchFunctionMode.
  bool none() const { return !intercepted() && !surrounded(); }
  // Whether there is a TorchFunctionMode.
  bool intercepted() const { return asked(function_mode_); }
  // Whether autograd records what is made of tensors that require grad.
  bool recording() const { return asked(grad_) && !asked(inference_); }
  // How many threads there may be.
  int threads() const { return threads_().cast<int>(); }
  // Whether the bits of a sequence must not depend on how it is cut.
  bool deterministic() const { return asked(deterministic_); }

 private:
  static bool asked(const Object& function) {
    const auto answer = pybind11::reinterpret_steal<Object>(PyObject_CallNoArgs(function.ptr()));
    const int truth = answer ? PyObject_IsTrue(answer.ptr()) : -1;
    if (truth < 0) throw pybind11::error_already_set();
    return truth != 0;
  }
  bool is_forward_mode() const {
    static PyObject* const name = PyUnicode_InternFromString("_current_level");
    const auto level =
        pybind11::reinterpret_steal<Object>(PyObject_GetAttr(forward_ad_.ptr(), name));
    if (!level) throw pybind11::error_already_set();
    const long value = PyLong_AsLong(level.ptr());
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value >= 0;
  }

  const Object dispatch_, transforms_, tracing_, autocast_, function_mode_, grad_, inference_;
  const Object threads_, deterministic_, forward_ad_;
};

inline void bind_surroundings(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  py::class_<Surroundings>(m, "Surroundings", py::module_local())
      .def(py::init<const py::dict&, py::object>(), "functions"_a, "forward_ad"_a)
      .def("watched", &Surroundings::watched)
      .def("surrounded", &Surroundings::surrounded)
      .def("intercepted", &Surroundings::intercepted)
      .def("none", &Surroundings::none)
      .def("recording", &Surroundings::recording);
}

}  // namespace lstm_ext
