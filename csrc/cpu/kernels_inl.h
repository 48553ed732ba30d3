// The body of kernels_<isa>.cpp: every kernel of one instruction set, for the four dtypes.
#pragma once

#include "backward.h"
#include "forward.h"
#include "groups.h"
#include "kernels.h"
#include "matmul.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

template <class E, class S>
using ForwardOfOne = OneDirection<Forward<E, S>, LstmForward>;

template <class E, class S>
using ForwardOfTwo = SideBySide<Forward<E, S>, LstmForward, LstmForwardOfTwo>;

template <class E, class S>
using BackwardOfOne = OneDirection<Backward<E, S>, LstmBackward>;

template <class E, class S>
struct Types {
  using Element = E;
  using Storage = S;
};

// What body(Types<..>{}) returns for the types of the call.
template <class Params, class Body>
auto with_types(const Params& p, const Body& body) {
  switch (p.dtype) {
    case Dtype::kFloat64:
      return body(Types<double, double>{});
    case Dtype::kFloat32:
      return body(Types<float, float>{});
    case Dtype::kBFloat16:
      if constexpr (kPairs) {
        if (p.bf16_products) return body(Types<BFloat16Pair, bfloat16>{});
      }
      return body(Types<float, bfloat16>{});
    default:
      return body(Types<float, float16>{});
  }
}

template <template <class, class> class Kernel, class Params>
int64_t workspace(const Params& p) {
  Params counted = p;
  counted.workspace = nullptr;
  return with_types(p, [&](auto types) {
    using T = decltype(types);
    return Kernel<typename T::Element, typename T::Storage>(counted).workspace();
  });
}

template <template <class, class> class Kernel, class Params>
void run(const Params& p) {
  with_types(p, [&](auto types) {
    using T = decltype(types);
    Kernel<typename T::Element, typename T::Storage>(p).run();
  });
}

inline bool side_by_side(const LstmForward& p) {
  return with_types(p, [&](auto types) {
    using T = decltype(types);
    return Forward<typename T::Element, typename T::Storage>::side_by_side(p);
  });
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext

#define LSTM_EXT_DEFINE_KERNELS(variable, name)                              \
  namespace lstm_ext {                                                       \
  const CpuKernels variable = {                                              \
      name,                                                                  \
      LSTM_EXT_ISA::kPairs,                                                  \
      LSTM_EXT_ISA::workspace<LSTM_EXT_ISA::ForwardOfOne, LstmForward>,      \
      LSTM_EXT_ISA::workspace<LSTM_EXT_ISA::ForwardOfTwo, LstmForwardOfTwo>, \
      LSTM_EXT_ISA::workspace<LSTM_EXT_ISA::BackwardOfOne, LstmBackward>,    \
      LSTM_EXT_ISA::workspace<LSTM_EXT_ISA::MatmulOf, Matmul>,               \
      LSTM_EXT_ISA::run<LSTM_EXT_ISA::ForwardOfOne, LstmForward>,            \
      LSTM_EXT_ISA::run<LSTM_EXT_ISA::ForwardOfTwo, LstmForwardOfTwo>,       \
      LSTM_EXT_ISA::side_by_side,                                            \
      LSTM_EXT_ISA::run<LSTM_EXT_ISA::BackwardOfOne, LstmBackward>,          \
      LSTM_EXT_ISA::run<LSTM_EXT_ISA::MatmulOf, Matmul>};                    \
  }
