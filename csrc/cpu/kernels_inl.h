// The body of kernels_<isa>.cpp: every kernel of one instruction set, for the four dtypes.
#pragma once

#include "backward.h"
#include "convert.h"
#include "forward.h"
#include "groups.h"
#include "kernels.h"
#include "matmul.h"
#include "planes.h"
#include "quantized_forward.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

template <class E, class S>
struct Types {
  using Element = E;
  using Storage = S;
};

// What body(Types<..>{}) returns for the types of the call.
template <class Params, class Body>
auto with_types(const Params& p, const Body& body) {
  if constexpr (std::is_base_of_v<LstmForward, Params>) {
    if (p.quantized.ih_scale) {
      if (p.dtype == Dtype::kBFloat16) return body(Types<Byte, bfloat16>{});
      if (p.dtype == Dtype::kFloat16) return body(Types<Byte, float16>{});
      return body(Types<Byte, float>{});
    }
  }
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

// As for a call that only asks for its workspace.
template <class Params>
Params counted(Params p) {
  p.workspace = nullptr;
  return p;
}

// The kernels of P, a Direction<E, S> of which is a group's part (groups.h).
template <template <class, class> class Direction, class P>
struct LayerOf {
  template <class T>
  using Part = Direction<typename T::Element, typename T::Storage>;

  static int64_t workspace(const P& p) {
    return with_types(p, [&](auto types) {
      return OneDirection<Part<decltype(types)>, P>(counted(p)).workspace();
    });
  }
  static void run(const P& p) {
    with_types(p, [&](auto types) { OneDirection<Part<decltype(types)>, P>(p).run(); });
  }
  static bool side_by_side(const P& p) {
    return with_types(p, [&](auto types) { return Part<decltype(types)>::side_by_side(p); });
  }
  static int64_t workspace_of_two(const OfTwo<P>& p) {
    return with_types(p, [&](auto types) {
      return SideBySide<Part<decltype(types)>, P>(counted(p)).workspace();
    });
  }
  static void run_of_two(const OfTwo<P>& p) {
    with_types(p, [&](auto types) { SideBySide<Part<decltype(types)>, P>(p).run(); });
  }

  static constexpr LayerKernels<P> kernels() {
    return {workspace, run, side_by_side, workspace_of_two, run_of_two};
  }
};

inline int64_t matmul_workspace(const Matmul& p) {
  return with_types(p, [&](auto types) {
    using T = decltype(types);
    return MatmulOf<typename T::Element, typename T::Storage>(counted(p)).workspace();
  });
}

inline void matmul(const Matmul& p) {
  with_types(p, [&](auto types) {
    using T = decltype(types);
    MatmulOf<typename T::Element, typename T::Storage>(p).run();
  });
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext

// Several sets may be made of one file, which differ in the two flags.
#define LSTM_EXT_DEFINE_KERNELS(variable, name, bf16_products, byte_products) \
  namespace lstm_ext {                                                        \
  const CpuKernels variable = {                                               \
      name,                                                                   \
      bf16_products,                                                          \
      byte_products,                                                          \
      LSTM_EXT_ISA::LayerOf<LSTM_EXT_ISA::Forward, LstmForward>::kernels(),   \
      LSTM_EXT_ISA::LayerOf<LSTM_EXT_ISA::Backward, LstmBackward>::kernels(), \
      LSTM_EXT_ISA::matmul_workspace,                                         \
      LSTM_EXT_ISA::matmul,                                                   \
      LSTM_EXT_ISA::convert,                                                  \
      LSTM_EXT_ISA::planes_forward,                                           \
      LSTM_EXT_ISA::planes_backward};                                         \
  }
