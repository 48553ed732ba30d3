// What products multiply: single numbers, or pairs of bf16 that one instruction multiplies and
// adds.
//
// E is the element of packed weights and of left-hand rows: float, double, or two bf16 that follow
// each other along k. A row of K numbers has depth_of<E>(K) elements; the half of a last pair that
// does not exist is zero on both sides. Sums are of type Acc<E>, and a vector of elements is as
// wide as one of sums, so that packing, panels and tiles are the same for all: a pair travels as
// the bits of a float.
//
// gx, the gates, c and what backward reads of them stay float: torch's bf16 product would round gx.
#pragma once

#include <type_traits>

#include "simd.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// Whether there may be one.
#if defined(__AVX512BF16__) || defined(LSTM_EXT_WITH_NEON_DOT)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

struct BFloat16Pair {
  bfloat16 low, high;
};

template <class E>
struct Operand {
  using Acc = E;
  using Stored = E;  // of the rows in memory
  static constexpr int kDepth = 1;
};

template <>
struct Operand<BFloat16Pair> {
  using Acc = float;
  using Stored = bfloat16;
  static constexpr int kDepth = 2;
};

template <class E>
using Acc = typename Operand<E>::Acc;

template <class E>
using Stored = typename Operand<E>::Stored;

template <class E>
constexpr bool kPaired = Operand<E>::kDepth == 2;

template <class E>
constexpr int64_t depth_of(int64_t K) {
  return (K + Operand<E>::kDepth - 1) / Operand<E>::kDepth;
}

template <class E>
const E* as_elements(const Stored<E>* row) {
  return reinterpret_cast<const E*>(row);
}

// A vector of elements from memory.
template <class E>
LSTM_EXT_INLINE Vec<Acc<E>> load_elements(const E* p) {
  Vec<Acc<E>> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class E>
LSTM_EXT_INLINE Vec<Acc<E>> broadcast_element(const E* p) {
  if constexpr (kPaired<E>) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bit_cast<Vec<float>>(Lanes<float>::Bits{} + bits);
  } else {
    return broadcast<E>(*p);
  }
}

// The first n, fewer than a vector has; the others are zero.
template <class E>
LSTM_EXT_INLINE Vec<Acc<E>> load_elements_partial(const E* p, int64_t n) {
  return load<Acc<E>>(reinterpret_cast<const Acc<E>*>(p), n);
}

// Elements k .. k + lanes of a row of weights as the user stores it.
template <class E, class S>
LSTM_EXT_INLINE Vec<Acc<E>> load_weights(const S* row, int64_t k) {
  if constexpr (kPaired<E>) {
    return load_elements<E>(reinterpret_cast<const E*>(row) + k);
  } else {
    return load_full<E>(row + k);
  }
}

// As load_weights, but of n elements, fewer than a vector has; the others are zero.
template <class E, class S>
LSTM_EXT_INLINE Vec<Acc<E>> load_weights_rest(const S* row, int64_t k, int64_t n) {
  if constexpr (kPaired<E>) {
    return load_elements_partial<E>(reinterpret_cast<const E*>(row) + k, n);
  } else {
    return load<E>(row + k, n);
  }
}

// As load_weights, but of `numbers` numbers from row[0] on; elements past them are zero.
template <class E, class S>
LSTM_EXT_INLINE Vec<Acc<E>> load_weights_partial(const S* row, int64_t numbers) {
  if constexpr (kPaired<E>) {
    if (numbers >= 2 * Lanes<float>::kCount) return load_weights<E>(row, 0);
    S part[2 * Lanes<float>::kCount] = {};
    std::memcpy(part, row, numbers * sizeof(S));
    return load_weights<E>(part, 0);
  } else {
    return load<E>(row, numbers);
  }
}

// sum + x * w, lane by lane. Of pairs, both products; subnormal numbers count as zero there.
template <class E>
LSTM_EXT_INLINE Vec<Acc<E>> multiply_add(Vec<Acc<E>> sum, Vec<Acc<E>> x, Vec<Acc<E>> w) {
  if constexpr (kPaired<E>) {
#if defined(LSTM_EXT_WITH_NEON_DOT)
    asm(LSTM_EXT_ARM_LATER "bfdot %0.4s, %1.8h, %2.8h" : "+w"(sum) : "w"(x), "w"(w));
    return sum;
#elif defined(__AVX512BF16__)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
    static_assert(!kPaired<E>, "kPairs says that there is no instruction");
#endif
  } else {
    return sum + x * w;
  }
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
