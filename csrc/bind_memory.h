// A tensor as an argument of the core: the address of its memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace lstm_ext {

// Of a tensor, which the caller keeps alive; null for None.
struct Memory {
  void* address = nullptr;
};

inline void* address_of(pybind11::handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto address = pybind11::reinterpret_steal<pybind11::object>(
      PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
  if (!address) throw pybind11::error_already_set();
  void* const pointer = PyLong_AsVoidPtr(address.ptr());
  if (!pointer && PyErr_Occurred()) throw pybind11::error_already_set();
  return pointer;
}

// Whether a tensor's elements, if it has any, are at its address. A fake or functionalized one has
// no address. Neither has a zero of forward mode, nor one whose storage was freed, and that of a
// part of them is the part's place in nothing: a low number, where to ask once more costs a tensor
// of another kind nothing.
inline bool has_memory(pybind11::handle tensor, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) >> 40) return true;
  const bool none = !address || tensor.attr("_is_zerotensor")().cast<bool>() ||
                    !tensor.attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>();
  return !none || tensor.attr("numel")().cast<int64_t>() == 0;
}

// Raises RuntimeError for a tensor that has elements but no memory.
inline void* memory_of(pybind11::handle tensor) {
  if (tensor.is_none()) return nullptr;
  void* const address = address_of(tensor);
  if (has_memory(tensor, address)) return address;
  throw std::runtime_error("lstm_ext needs tensors with memory, got a " +
                           pybind11::type::of(tensor).attr("__name__").cast<std::string>() +
                           " without: its storage was freed, as FSDP's outside of its root's "
                           "forward, or it wraps another tensor, or is a fake or functionalized "
                           "one that something traces with");
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
