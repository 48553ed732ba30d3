// Makes the KernelSet of an arithmetic from the tiles of tiles.h.
#pragma once

#include <utility>

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/kernels.h"

namespace lstm_ext {

template <class Arithmetic, const auto& kTiles, size_t... i>
ForwardKernel find_forward(int m, int n, int held, std::index_sequence<i...>) {
  ForwardKernel found = nullptr;
  const auto try_tile = [&](const Tile& tile, ForwardKernel none, ForwardKernel some) {
    if (tile.m == m && tile.n == n) found = held == 0 ? none : held == tile.held ? some : nullptr;
  };
  (try_tile(kTiles[i], forward_cell<Arithmetic, kTiles[i].m, kTiles[i].n, 0>,
            forward_cell<Arithmetic, kTiles[i].m, kTiles[i].n, kTiles[i].held>),
   ...);
  return found;
}
template <class Arithmetic, const auto& kTiles, size_t... i>
BackwardKernel find_backward(int m, int n, int held, std::index_sequence<i...>) {
  BackwardKernel found = nullptr;
  const auto try_tile = [&](const Tile& tile, BackwardKernel none, BackwardKernel some) {
    if (tile.m == m && tile.n == n) found = held == 0 ? none : held == tile.held ? some : nullptr;
  };
  (try_tile(kTiles[i], backward_cell<Arithmetic, kTiles[i].m, kTiles[i].n, 0>,
            backward_cell<Arithmetic, kTiles[i].m, kTiles[i].n, kTiles[i].held>),
   ...);
  return found;
}

template <class Arithmetic, const auto& kForward, const auto& kBackward>
const KernelSet& kernel_set() {
  static_assert(std::size(kProjectionTiles) == 2, "forward_projection below lists them");
  static constexpr Tile kSmall = kProjectionTiles[0], kLarge = kProjectionTiles[1];
  static const KernelSet set = {
      [](int m, int n, int held) {
        return find_forward<Arithmetic, kForward>(m, n, held,
                                                  std::make_index_sequence<std::size(kForward)>());
      },
      [](int n) -> ForwardKernel {
        return n == kSmall.n ? forward_projection<Arithmetic, kSmall.m, kSmall.n>
                             : forward_projection<Arithmetic, kLarge.m, kLarge.n>;
      },
      forward_prepare<Arithmetic>,
      [](int m, int n, int held) {
        return find_backward<Arithmetic, kBackward>(
            m, n, held, std::make_index_sequence<std::size(kBackward)>());
      },
      [](int n) -> BackwardKernel {
        return n == kSmall.n ? backward_projection<Arithmetic, kSmall.m, kSmall.n>
                             : backward_projection<Arithmetic, kLarge.m, kLarge.n>;
      },
      backward_prepare<Arithmetic>,
  };
  return set;
}

}  // namespace lstm_ext
