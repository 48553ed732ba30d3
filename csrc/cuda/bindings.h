// The Python face of the CUDA engine; added to the module by bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace lstm_ext {

void bind_cuda(pybind11::module_& m);

}  // namespace lstm_ext
