// What a step of one hidden unit reads and writes besides its product: the same for every family of
// kernels, which differ in where the product comes from, where c is kept, and how the next step
// learns of this one's result.
//
// kVariants: with what params.h calls Variants. The plain LSTM's kernels do without, for they have
// no registers to spare. kProjects: there may be a projection.
//
// A step waits for every instruction here, four to six cycles each: addresses are one
// multiplication away from pointers that a unit keeps.
#pragma once

#include "cuda/block.cuh"

namespace lstm_ext {

// p[i], but zero for a null p.
template <class T>
LSTM_EXT_DEVICE auto at_or_zero(const T* p, int64_t i) -> decltype(to_acc(*p)) {
  return p ? to_acc(p[i]) : 0;
}
// p + i, but null for a null p.
template <class T>
LSTM_EXT_DEVICE T* moved(T* p, int64_t i) {
  return p ? p + i : nullptr;
}

// The peepholes of a unit.
template <class T, class Peephole>
LSTM_EXT_DEVICE Peephole peephole_of(const Variants& v, int H, int unit) {
  const T* p = as<T>(v.peephole) + unit;
  return {to_acc(p[0]), to_acc(p[H]), to_acc(p[2 * H])};
}
// What part of the old h or c stays.
template <class Acc>
LSTM_EXT_DEVICE Acc kept_part(const uint8_t* mask, double everywhere, int64_t at) {
  return mask ? Acc(mask[at] != 0) : Acc(everywhere);
}

}  // namespace lstm_ext
