// Makes the KernelSet of an arithmetic from the tiles of tiles.h.
#pragma once

#include <array>

#include "cuda/backward.cuh"
#include "cuda/find_tile.cuh"
#include "cuda/forward.cuh"
#include "cuda/norm.cuh"

namespace lstm_ext {

template <class Arithmetic, bool kVariants = false>
struct ForwardCells {
  using Kernel = ForwardKernel;
  template <int m, int n, int held>
  static Kernel of() {
    return forward_cell<Arithmetic, m, n, held, kVariants>;
  }
};
template <class Arithmetic, bool kVariants = false>
struct BackwardCells {
  using Kernel = BackwardKernel;
  template <int m, int n, int held>
  static Kernel of() {
    return backward_cell<Arithmetic, m, n, held, kVariants>;
  }
};

// The same tiles with nothing in registers.
template <const auto& kTiles>
constexpr auto without_held() {
  std::array<Tile, std::size(kTiles)> out{};
  for (size_t i = 0; i < out.size(); ++i) out[i] = {kTiles[i].m, kTiles[i].n, 0};
  return out;
}
template <const auto& kTiles>
constexpr auto kWithoutHeld = without_held<kTiles>();

template <class Kind, const auto& kTiles>
typename Kind::Kernel find_either(int m, int n, int held) {
  return held ? find_tile<Kind, kTiles>(m, n, held)
              : find_tile<Kind, kWithoutHeld<kTiles>>(m, n, 0);
}

template <class Arithmetic, const auto& kForward, const auto& kBackward,
          const auto& kForwardVariants = kForwardFewTiles,
          const auto& kBackwardVariants = kBackwardFewTiles>
const KernelSet& kernel_set() {
  static_assert(std::size(kProjectionTiles) == 2, "forward_projection below lists them");
  static constexpr Tile kSmall = kProjectionTiles[0], kLarge = kProjectionTiles[1];
  static const KernelSet set = {
      find_either<ForwardCells<Arithmetic>, kForward>,
      [](int n) -> ForwardKernel {
        return n == kSmall.n ? forward_projection<Arithmetic, kSmall.m, kSmall.n>
                             : forward_projection<Arithmetic, kLarge.m, kLarge.n>;
      },
      forward_prepare<Arithmetic>,
      find_either<BackwardCells<Arithmetic>, kBackward>,
      [](int n) -> BackwardKernel {
        return n == kSmall.n ? backward_projection<Arithmetic, kSmall.m, kSmall.n>
                             : backward_projection<Arithmetic, kLarge.m, kLarge.n>;
      },
      backward_prepare<Arithmetic>,
      find_tile<ForwardCells<Arithmetic, true>, kForwardVariants>,
      forward_norm<Arithmetic>,
      find_tile<BackwardCells<Arithmetic, true>, kBackwardVariants>,
      backward_norm<Arithmetic>,
  };
  return set;
}

}  // namespace lstm_ext
