// Which arithmetics few_kernels.cu and few_cluster_kernels.cu compile: EMU_COMPILED, one of these.
// A mutant has one.
#pragma once

#include <stdexcept>

namespace lstm_ext {

enum { emu_all, emu_bfloat16, emu_tf32, emu_float32 };

template <int kArithmetic>
constexpr bool is_compiled() {
  return EMU_COMPILED == emu_all || EMU_COMPILED == kArithmetic;
}
template <class Set>
const Set& not_compiled() {
  throw std::invalid_argument("this arithmetic is not compiled");
}

}  // namespace lstm_ext
