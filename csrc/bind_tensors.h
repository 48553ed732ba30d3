// What the short way of a plain layer asks of tensors and does with them, through torch's Python
// interface, without which the core would be bound to one version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bind_memory.h"
#include "dlpack.h"
#include "params.h"

namespace lstm_ext {

class PlainTensors {
 public:
  using Object = pybind11::object;
  using Handle = pybind11::handle;

  // types: of tensors without behaviour of their own. codes: enum Dtype by dtype. half_acc: the acc
  // type of half types; the others are their own. bytes: the dtype of bytes. is_here: the name of a
  // tensor's attribute that is True on the kind of device that this is for. exchange: DLPack's
  // capsule of the types; of anything else every question is asked through Python.
  PlainTensors(pybind11::tuple types, const pybind11::dict& codes, Object half_acc, Object bytes,
               Object is_here, dlpack::DeviceType device_type, const Object& exchange)
      : types_(std::move(types)),
        half_acc_(std::move(half_acc)),
        bytes_(std::move(bytes)),
        is_here_(std::move(is_here)),
        device_type_(device_type) {
    for (const auto& [dtype, number] : codes) {
      const auto code = static_cast<Dtype>(number.cast<int>());
      const auto bits = uint8_t(8 * storage_bytes(code));
      const auto kind = code == Dtype::kBFloat16 ? dlpack::kBfloat : dlpack::kFloat;
      known_.push_back({pybind11::reinterpret_borrow<Object>(dtype), {kind, bits, 1}, code});
    }
    if (!PyCapsule_IsValid(exchange.ptr(), dlpack::kCapsule)) return;
    const auto* found = static_cast<const dlpack::Exchange*>(
        PyCapsule_GetPointer(exchange.ptr(), dlpack::kCapsule));
    while (found && found->major > dlpack::kMajor) found = found->older;
    if (found && found->major == dlpack::kMajor && found->view) exchange_ = found;
  }

  struct Names {
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* get_device = PyUnicode_InternFromString("get_device");
    PyObject* is_neg = PyUnicode_InternFromString("is_neg");
    PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
    PyObject* contiguous = PyUnicode_InternFromString("contiguous");
    PyObject* new_empty = PyUnicode_InternFromString("new_empty");
    PyObject* new_empty_strided = PyUnicode_InternFromString("new_empty_strided");
    PyObject* new_zeros = PyUnicode_InternFromString("new_zeros");
    PyObject* view = PyUnicode_InternFromString("view");
    PyObject* t = PyUnicode_InternFromString("t");
    PyObject* mm = PyUnicode_InternFromString("mm");
    PyObject* sum = PyUnicode_InternFromString("sum");
    PyObject* to = PyUnicode_InternFromString("to");
    PyObject* clone = PyUnicode_InternFromString("clone");
  };
  static const Names& names() {
    static const Names instance;
    return instance;
  }

  // Of up to kMost dimensions; of more, only how many.
  struct Sizes {
    static constexpr Py_ssize_t kMost = 5;
    int64_t of[kMost] = {};
    Py_ssize_t count;
    Sizes(int64_t a) : of{a}, count(1) {}
    Sizes(int64_t a, int64_t b) : of{a, b}, count(2) {}
    Sizes(int64_t a, int64_t b, int64_t c) : of{a, b, c}, count(3) {}
    explicit Sizes(Handle tensor) {
      const Object shape = get(tensor, names().shape);
      if (!PyTuple_Check(shape.ptr())) {
        throw pybind11::type_error("Expected a tensor's shape to be a tuple, got " +
                                   pybind11::repr(shape).cast<std::string>());
      }
      count = PyTuple_GET_SIZE(shape.ptr());
      for (Py_ssize_t k = 0; k < count && k < kMost; ++k) {
        of[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), k));
        if (of[k] == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
      }
    }
    explicit Sizes(const dlpack::View& view) : count(view.dims) {
      for (Py_ssize_t k = 0; k < count && k < kMost; ++k) of[k] = view.shape[k];
    }
    bool operator==(const Sizes& other) const {
      return count == other.count && std::equal(of, of + kMost, other.of);
    }
  };

  bool is_plain(Handle value) const {
    for (const Handle type : types_) {
      if (Py_TYPE(value.ptr()) == reinterpret_cast<PyTypeObject*>(type.ptr())) return true;
    }
    return false;
  }

  // What is asked of a tensor first.
  struct Look {
    PyObject* dtype = nullptr;  // lives on; null: of no code
    Dtype code{};
    Sizes sizes{0};
    bool here = false;              // on this kind of device
    int64_t device = -1;            // of a kind that has several, the number
    void* contiguous = nullptr;     // its memory, if it is known, and its rows lie in order
    void* channels_last = nullptr;  // likewise, of images or a kernel's weights
  };
  // Whether value is of the types.
  bool look(Handle value, Look& found) const {
    if (!is_plain(value)) return false;
    if (exchange_) {
      dlpack::View view;
      if (exchange_->view(value.ptr(), &view)) throw pybind11::error_already_set();
      for (const Known& known : known_) {
        if (known.type == view.type) {
          found.dtype = known.dtype.ptr();
          found.code = known.code;
        }
      }
      if (view.type == kByte) found.dtype = bytes_.ptr();
      found.sizes = Sizes(view);
      found.here = view.device_type == device_type_;
      if (device_type_ != dlpack::kCpu) found.device = view.device;
      void* const memory = ahead(view.data, view.byte_offset);
      if (dlpack::is_contiguous(view)) {
        found.contiguous = memory;
      } else if (dlpack::is_channels_last(view)) {
        found.channels_last = memory;
      }
      return true;
    }
    PyObject* const dtype = get(value, names().dtype).ptr();
    for (const Known& known : known_) {
      if (known.dtype.ptr() == dtype) {
        found.dtype = dtype;
        found.code = known.code;
      }
    }
    if (bytes_.ptr() == dtype) found.dtype = dtype;
    found.sizes = Sizes(value);
    found.here = get(value, is_here_.ptr()).ptr() == Py_True;
    found.device = PyLong_AsLongLong(call(value, names().get_device).ptr());
    if (found.device == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return true;
  }
  // Of a dtype that has one.
  Dtype code_of(Handle dtype) const {
    for (const Known& known : known_)
      if (known.dtype.ptr() == dtype.ptr()) return known.code;
    throw pybind11::type_error("Expected a dtype with a code, got " +
                               pybind11::repr(dtype).cast<std::string>());
  }
  bool is_number(PyObject* dtype) const { return dtype && dtype != bytes_.ptr(); }
  // Of sums, gates and cell states.
  PyObject* acc_of(PyObject* dtype, Dtype code) const {
    const bool half = code == Dtype::kBFloat16 || code == Dtype::kFloat16;
    return half ? half_acc_.ptr() : dtype;
  }

  // The memory of a tensor of the types, dense, on this kind of device and, if it has several, on
  // this one, of this dtype and these sizes, or of its contiguous copy; else null. kept: keeps that
  // memory.
  void* dense(Handle value, PyObject* dtype, int64_t device, const Sizes& sizes,
              Object& kept) const {
    Look found;
    if (!look(value, found) || found.dtype != dtype || !found.here || !(found.sizes == sizes) ||
        (device >= 0 && found.device != device)) {
      return nullptr;
    }
    return taken(value, found.contiguous, kept);
  }

  // The memory of a tensor that was looked at, `known` or, if that is null, of its contiguous copy;
  // else null. kept: keeps it.
  static void* taken(Handle value, void* known, Object& kept) {
    // Lazily negated, the memory is that of the opposite.
    if (call(value, names().is_neg).ptr() != Py_False) return nullptr;
    void* address = known;
    if (address) {
      kept = pybind11::reinterpret_borrow<Object>(value);
    } else {
      kept = call(value, names().contiguous);
      address = address_of(kept);
    }
    return has_memory(kept, address) ? address : nullptr;
  }

  // What new_empty_strided of like makes, given both as tuples.
  static Object make_strided(Handle like, Handle sizes, Handle strides, Handle dtype) {
    static PyObject* const keywords = PyTuple_Pack(1, names().dtype);
    PyObject* arguments[] = {like.ptr(), sizes.ptr(), strides.ptr(), dtype.ptr()};
    return checked(PyObject_VectorcallMethod(names().new_empty_strided, arguments, 3,
                                             dtype ? keywords : nullptr));
  }

  // Whether read() says yes. Where torch refuses a question, such as for the memory of a tensor
  // that has none, the answer is no; whatever else is raised, an interrupt as well, goes on.
  template <class Read>
  static bool answered(const Read& read) {
    try {
      return read();
    } catch (pybind11::error_already_set& error) {
      if (!error.matches(PyExc_RuntimeError)) throw;
      return false;
    }
  }

  static Object checked(PyObject* made) {
    if (!made) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<Object>(made);
  }
  static Object get(Handle value, PyObject* name) {
    return checked(PyObject_GetAttr(value.ptr(), name));
  }
  static Object call(Handle value, PyObject* name) {
    return checked(PyObject_CallMethodNoArgs(value.ptr(), name));
  }
  static Object call(Handle value, PyObject* name, Handle argument) {
    return checked(PyObject_CallMethodOneArg(value.ptr(), name, argument.ptr()));
  }
  // What like's method makes of sizes. dtype: of the new tensor; null: that of like.
  static Object make(Handle like, PyObject* name, const Sizes& sizes, Handle dtype = {}) {
    static PyObject* const keywords = PyTuple_Pack(1, names().dtype);
    Object numbers[Sizes::kMost];
    PyObject* arguments[Sizes::kMost + 2] = {like.ptr()};
    for (Py_ssize_t k = 0; k < sizes.count; ++k) {
      numbers[k] = checked(PyLong_FromLongLong(sizes.of[k]));
      arguments[k + 1] = numbers[k].ptr();
    }
    arguments[sizes.count + 1] = dtype.ptr();
    return checked(PyObject_VectorcallMethod(name, arguments, size_t(sizes.count) + 1,
                                             dtype ? keywords : nullptr));
  }

 protected:
  Handle bytes() const { return bytes_; }

 private:
  static constexpr dlpack::Type kByte = {dlpack::kUnsigned, 8, 1};
  struct Known {
    Object dtype;
    dlpack::Type type;
    Dtype code;
  };
  static void* ahead(void* data, uint64_t bytes) { return static_cast<char*>(data) + bytes; }

  pybind11::tuple types_;
  std::vector<Known> known_;
  Object half_acc_;
  Object bytes_;
  Object is_here_;
  dlpack::DeviceType device_type_;
  const dlpack::Exchange* exchange_ = nullptr;
};

}  // namespace lstm_ext
