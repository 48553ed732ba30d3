// A compiled kernel by its tiles.
#pragma once

#include <iterator>
#include <utility>

#include "cuda/kernels.h"

namespace lstm_ext {

// The kernel of these tiles; null if there is none. A Kind of kernel has Kernel, its type, and
// of<m, n, held>().
template <class Kind, const auto& kTiles, size_t... i>
typename Kind::Kernel find_in(int m, int n, int held, std::index_sequence<i...>) {
  typename Kind::Kernel found = nullptr;
  const auto try_one = [&](const Tile& tile, typename Kind::Kernel kernel) {
    if (tile.m == m && tile.n == n && tile.held == held) found = kernel;
  };
  (try_one(kTiles[i], Kind::template of<kTiles[i].m, kTiles[i].n, kTiles[i].held>()), ...);
  return found;
}
template <class Kind, const auto& kTiles>
typename Kind::Kernel find_tile(int m, int n, int held) {
  return find_in<Kind, kTiles>(m, n, held, std::make_index_sequence<std::size(kTiles)>());
}

}  // namespace lstm_ext
