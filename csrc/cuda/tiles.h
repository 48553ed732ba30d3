// The sizes that the kernels and their plan share. No CUDA.
#pragma once

#include <cstdint>

#include "inline.h"

namespace lstm_ext {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkBytes = 64;  // of k: what a warp multiplies at once
// A chunk of an m-tile of weights: 16 rows.
constexpr int kTileBytes = 16 * kChunkBytes;

// n-tiles of 8 sequences that are summed over the warps at once: one cell a thread at most.
LSTM_EXT_INLINE constexpr int round_tiles(int units, int n_tiles) {
  return kThreads / (8 * units) >= n_tiles ? n_tiles : kThreads / (8 * units);
}

// Bytes for the partial sums of a round.
LSTM_EXT_INLINE constexpr int64_t partial_bytes(int m_tiles, int units, int n_tiles,
                                                int acc_bytes) {
  return int64_t(kWarps) * round_tiles(units, n_tiles) * m_tiles * 128 * acc_bytes;
}

// The tiles that are compiled: m-tiles of 16 weight rows by n-tiles of 8 sequences. `held`: the
// chunks of weights a warp can keep in registers (64 registers a lane), on tensor cores.
struct Tile {
  int m, n, held;
};
constexpr Tile kForwardTensorTiles[] = {{2, 1, 4}, {2, 2, 4}, {2, 4, 4}, {4, 1, 2}, {4, 2, 2},
                                        {4, 4, 2}, {4, 8, 0}, {8, 1, 0}, {8, 2, 0}, {8, 4, 0}};
constexpr Tile kBackwardTensorTiles[] = {{1, 1, 8}, {1, 2, 8}, {1, 4, 8}, {2, 1, 4},
                                         {2, 2, 4}, {2, 4, 4}, {2, 8, 0}};
constexpr Tile kForwardScalarTiles[] = {{2, 1, 0}, {2, 4, 0}, {4, 2, 0}};
constexpr Tile kBackwardScalarTiles[] = {{1, 1, 0}, {1, 4, 0}, {2, 4, 0}};
// Of the projection's kernels.
constexpr Tile kProjectionTiles[] = {{1, 1, 0}, {1, 4, 0}};

}  // namespace lstm_ext
