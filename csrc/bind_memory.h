// A tensor as an argument of the core: the address of its memory.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace lstm_ext {

// Of a tensor, which the caller keeps alive; null for None.
struct Memory {
  void* address = nullptr;
};

// Raises RuntimeError for a tensor that has elements but no memory, as a fake or functionalized
// one.
inline void* memory_of(pybind11::handle tensor) {
  namespace py = pybind11;
  if (tensor.is_none()) return nullptr;
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto address =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
  if (!address) throw py::error_already_set();
  void* const pointer = PyLong_AsVoidPtr(address.ptr());
  if (!pointer && PyErr_Occurred()) throw py::error_already_set();
  if (!pointer && tensor.attr("numel")().cast<int64_t>()) {
    throw std::runtime_error("lstm_ext needs tensors with memory, got a " +
                             py::type::of(tensor).attr("__name__").cast<std::string>() +
                             " without: tensors that wrap others, and tracing with fake or "
                             "functionalized ones, are not supported");
  }
  return pointer;
}

}  // namespace lstm_ext

namespace pybind11::detail {

template <>
struct type_caster<lstm_ext::Memory> {
  PYBIND11_TYPE_CASTER(lstm_ext::Memory, const_name("Tensor | None"));
  bool load(handle tensor, bool) {
    value.address = lstm_ext::memory_of(tensor);
    return true;
  }
};

}  // namespace pybind11::detail
