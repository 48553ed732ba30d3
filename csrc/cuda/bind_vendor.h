// The vendor's products as Python classes, for each module that has them.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/vendor.h"

namespace lstm_ext {

// make_current: makes a device current for what this thread asks of CUDA.
inline void bind_vendor(pybind11::module_& m, void (*make_current)(int device)) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  using Address = std::uintptr_t;
  m.def("cuda_open_vendor", &open_vendor, "name"_a,
        "Opens cuBLASLt by the name of its file; returns why it cannot be used, or nothing.");
  m.def("cuda_vendor_version", &vendor_version, "As cuBLASLt tells it; 0: it is not open.");
  const auto make = [make_current](int dtype, bool tf32, bool wide, bool accumulate,
                                   bool a_transposed, bool b_transposed, int device, int64_t M,
                                   int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldout,
                                   int alignment) {
    make_current(device);
    return VendorProduct({static_cast<Dtype>(dtype), tf32, wide, accumulate, a_transposed,
                          b_transposed, device, alignment, M, N, K, lda, ldb, ldout});
  };
  // Described in cuda/vendor.h.
  py::class_<VendorProduct>(m, "CudaProduct", py::module_local())
      .def(py::init(make), py::kw_only(), "dtype"_a, "tf32"_a, "wide"_a, "accumulate"_a,
           "a_transposed"_a, "b_transposed"_a, "device"_a, "M"_a, "N"_a, "K"_a, "lda"_a, "ldb"_a,
           "ldout"_a, "alignment"_a)
      .def_property_readonly("workspace", &VendorProduct::workspace)
      .def(
          "run",
          [](const VendorProduct& product, Address a, Address b, Address out, Address workspace,
             Address stream) {
            const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
            product.run(pointer(a), pointer(b), pointer(out), pointer(workspace), pointer(stream));
          },
          "a"_a, "b"_a, "out"_a, "workspace"_a, "stream"_a,
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace lstm_ext
