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
using ForwardGroups = Groups<Forward<E, S>, LstmForward>;

template <class E, class S>
using BackwardGroups = Groups<Backward<E, S>, LstmBackward>;

template <template <class, class> class Direction, class Params>
int64_t workspace(const Params& params) {
  Params counted = params;
  counted.workspace = nullptr;
  switch (params.dtype) {
    case Dtype::kFloat64:
      return Direction<double, double>(counted).workspace();
    case Dtype::kFloat32:
      return Direction<float, float>(counted).workspace();
    case Dtype::kBFloat16:
      if constexpr (kPairs) {
        if (params.bf16_products) return Direction<BFloat16Pair, bfloat16>(counted).workspace();
      }
      return Direction<float, bfloat16>(counted).workspace();
    default:
      return Direction<float, float16>(counted).workspace();
  }
}

template <template <class, class> class Direction, class Params>
void run(const Params& params) {
  switch (params.dtype) {
    case Dtype::kFloat64:
      return Direction<double, double>(params).run();
    case Dtype::kFloat32:
      return Direction<float, float>(params).run();
    case Dtype::kBFloat16:
      if constexpr (kPairs) {
        if (params.bf16_products) return Direction<BFloat16Pair, bfloat16>(params).run();
      }
      return Direction<float, bfloat16>(params).run();
    default:
      return Direction<float, float16>(params).run();
  }
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext

#define LSTM_EXT_DEFINE_KERNELS(variable, name)                            \
  namespace lstm_ext {                                                     \
  const CpuKernels variable = {                                            \
      name,                                                                \
      LSTM_EXT_ISA::kPairs,                                                \
      LSTM_EXT_ISA::workspace<LSTM_EXT_ISA::ForwardGroups, LstmForward>,   \
      LSTM_EXT_ISA::workspace<LSTM_EXT_ISA::BackwardGroups, LstmBackward>, \
      LSTM_EXT_ISA::workspace<LSTM_EXT_ISA::MatmulOf, Matmul>,             \
      LSTM_EXT_ISA::run<LSTM_EXT_ISA::ForwardGroups, LstmForward>,         \
      LSTM_EXT_ISA::run<LSTM_EXT_ISA::BackwardGroups, LstmBackward>,       \
      LSTM_EXT_ISA::run<LSTM_EXT_ISA::MatmulOf, Matmul>};                  \
  }
