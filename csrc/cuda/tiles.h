// The sizes that the kernels and their plan share. No CUDA.
#pragma once

#include <cstddef>
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

// What a cell needs of a step from global memory in words of 4 bytes: forward its parts of the
// input's product, backward its gates, and c after it and before.
constexpr int kForwardWords = 4, kBackwardWords = 6;

// The same of all cells of a tile, if it takes more than one round (step, grid): asked for
// together, through shared memory, before the product or, of a step's first tile, before the
// barrier; else one round waits for memory after the other. Where sums are fp32, and without
// variants: backward always, but not with one m-tile; forward where weights leave the memory, but
// not with more than two rounds. There the kernel's registers are all taken.
LSTM_EXT_INLINE constexpr bool can_fetch(int m_tiles, int rounds, int acc_bytes, bool variants,
                                         bool backward) {
  return rounds > 1 && (backward ? m_tiles > 1 : rounds == 2) && acc_bytes == 4 && !variants;
}
LSTM_EXT_INLINE constexpr int64_t fetched_bytes(int rounds, bool backward) {
  return int64_t(rounds) * (backward ? kBackwardWords : kForwardWords) * kThreads * 4;
}

// The tiles that are compiled: m-tiles of 16 weight rows by n-tiles of 8 sequences. `held`: the
// chunks of weights a warp can keep in registers (64 registers a lane), on tensor cores.
struct Tile {
  int m, n, held;
};
constexpr Tile kForwardTensorTiles[] = {{2, 1, 4}, {2, 2, 4}, {2, 4, 4}, {4, 1, 2}, {4, 2, 2},
                                        {4, 4, 2}, {4, 8, 0}, {8, 1, 0}, {8, 2, 0}};
constexpr Tile kBackwardTensorTiles[] = {{1, 1, 8}, {1, 2, 8}, {1, 4, 8}, {2, 1, 4},
                                         {2, 2, 4}, {2, 4, 4}, {2, 8, 0}};
// Outside of tensor cores; and with variants in every arithmetic.
constexpr Tile kForwardFewTiles[] = {{2, 1, 0}, {2, 4, 0}, {4, 2, 0}};
constexpr Tile kBackwardFewTiles[] = {{1, 1, 0}, {1, 4, 0}, {2, 4, 0}};
// Of the projection's kernels.
constexpr Tile kProjectionTiles[] = {{1, 1, 0}, {1, 4, 0}};

// A block that streams weights from L2 has up to so many bytes on their way to its shared memory:
// twice what an H100's L2 (42 KB a microsecond and multiprocessor, some 0.7 us away) or memory asks
// for. For a warp they are so many chunks of its m-tiles, 8 at most.
constexpr int kStreamBytes = 64 << 10;
LSTM_EXT_INLINE constexpr int chunks_ahead(int m_tiles) {
  return kStreamBytes / (kWarps * m_tiles * kTileBytes);
}
// Whether a kernel can: of each tile the one that holds all it can, which is that of the family
// grid, but where nothing can be held of the family step too.
template <size_t N>
LSTM_EXT_INLINE constexpr bool streams_ahead(const Tile (&tiles)[N], int m, int n, int held) {
  for (const Tile& tile : tiles)
    if (tile.m == m && tile.n == n) return tile.held == held;
  return false;
}

// Bytes of a layer norm's sums: two values a warp.
LSTM_EXT_INLINE constexpr int64_t block_sums_bytes(int64_t acc_bytes) {
  return 2 * kWarps * acc_bytes;
}

// ---- a cluster's blocks, on tensor cores
// ----------------------------------------------------------
//
// A block of `m` m-tiles by `n` n-tiles; `held` as above, but backward in m-tiles of a warp.

constexpr int kMostBlocksOfCluster = 16;
constexpr Tile kForwardClusterTiles16[] = {{4, 1, 4}, {8, 1, 8}, {8, 2, 8}, {12, 1, 6}};
constexpr Tile kForwardClusterTiles32[] = {{4, 1, 4}, {8, 1, 8}};
constexpr Tile kBackwardClusterTiles16[] = {{1, 1, 2}, {1, 2, 2}, {2, 1, 4}, {3, 1, 3}};
constexpr Tile kBackwardClusterTiles32[] = {{1, 1, 2}, {2, 1, 2}};
// The same of the family tagged, which can have more blocks of fewer units.
constexpr Tile kForwardTaggedTiles[] = {{4, 1, 8}, {8, 1, 8}};
constexpr Tile kBackwardTaggedTiles16[] = {{1, 1, 8}, {2, 1, 4}};
constexpr Tile kBackwardTaggedTiles32[] = {{1, 1, 4}};

// Sequences of a group at most: where 48 units take the registers, one cell a thread.
LSTM_EXT_INLINE constexpr int cluster_rows(const Tile& tile, bool backward) {
  return tile.m == (backward ? 3 : 12) ? 4 : 8 * tile.n;
}

// Forward: warps that share a part of k, each with other rows; 3 or fewer m-tiles a warp.
LSTM_EXT_INLINE constexpr int warps_of_rows(int m_tiles) { return m_tiles < 8 ? 2 : 4; }

// Bytes of the two mbarriers.
constexpr int kBarrierBytes = 128;

// Bytes of a sequence's row in shared memory, from those of its elements (whole chunks). A chunk of
// one row and that of the next lie in different banks.
LSTM_EXT_INLINE constexpr int64_t shared_row(int64_t bytes) {
  return bytes % 128 ? bytes : bytes + 64;
}

// Forward: the sequences that a block's state has room for, a power of two.
LSTM_EXT_INLINE constexpr int state_rows(int64_t group_rows) {
  int rows = 2;
  while (rows < group_rows) rows *= 2;
  return rows;
}
// Of a block's part of the state, and of the whole, a part from each block and at least state_row
// bytes of a sequence.
LSTM_EXT_INLINE constexpr int64_t forward_slice_bytes(const Tile& tile, int64_t group_rows,
                                                      int element) {
  return int64_t(state_rows(group_rows)) * 4 * tile.m * element;
}
LSTM_EXT_INLINE constexpr int64_t forward_box_bytes(const Tile& tile, int64_t slices,
                                                    int64_t group_rows, int64_t state_row,
                                                    int element) {
  const int64_t parts = slices * forward_slice_bytes(tile, group_rows, element);
  const int64_t rows = state_rows(group_rows) * state_row;
  return parts < rows ? rows : parts;
}
// What a block's cells need of a step is on its way two steps long.
LSTM_EXT_INLINE constexpr int64_t ahead_bytes(int words, int cells) {
  return int64_t(2) * words * cells * kThreads * 4;
}
// Cells of a thread, for groups of so many sequences.
LSTM_EXT_INLINE constexpr int cluster_cells(int units, int rows) {
  return (units * rows + kThreads / units * units - 1) / (kThreads / units * units);
}
// Backward: of what one block sends another, the sums of its units for the sequences of a group.
LSTM_EXT_INLINE constexpr int64_t backward_part_bytes(const Tile& tile, int64_t group_rows) {
  return (group_rows + 1) / 2 * tile.m * 128;
}

// Bytes of shared memory of a block besides weights. Forward: two states of all units, two times
// its own part, partial sums.
LSTM_EXT_INLINE constexpr int64_t forward_resident_bytes(const Tile& tile, int64_t slices,
                                                         int64_t group_rows, int64_t state_row,
                                                         int element) {
  return kBarrierBytes + 2 * forward_box_bytes(tile, slices, group_rows, state_row, element) +
         2 * forward_slice_bytes(tile, group_rows, element) +
         ahead_bytes(kForwardWords, cluster_cells(4 * tile.m, cluster_rows(tile, false))) +
         int64_t(kWarps / warps_of_rows(tile.m)) * tile.n * tile.m * 128 * 4;
}
// Backward: two times a part from every block and for every block, or (tagged) a sum of such parts
// for each warp; and two times its own gates' gradients.
LSTM_EXT_INLINE constexpr int64_t backward_resident_bytes(const Tile& tile, int64_t slices,
                                                          int64_t group_rows, int element,
                                                          bool tagged) {
  return kBarrierBytes +
         (tagged ? kWarps * backward_part_bytes(tile, 8)
                 : 4 * slices * backward_part_bytes(tile, group_rows)) +
         ahead_bytes(kBackwardWords, cluster_cells(16 * tile.m, cluster_rows(tile, true))) +
         2 * 8 * tile.n * shared_row(64 * tile.m * element);
}

}  // namespace lstm_ext
