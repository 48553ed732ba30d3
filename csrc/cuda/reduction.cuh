// The sum of a product over the warps of a block, each of which has a part of k (product.cuh).
#pragma once

#include "cuda/product.cuh"

namespace lstm_ext {

// Hands each unit of a tile the sums of its gates. The partial sums go through shared memory in
// rounds of kRoundTiles n-tiles: by default as many as give each thread about one unit of one
// sequence.
template <class Arithmetic, class Rows, int kMTiles, int kNTiles, int kMWarps = 1,
          int kTilesOfRound = round_tiles(Rows::units(kMTiles * kMWarps), kNTiles)>
struct Reduction {
  using Acc = typename Arithmetic::Acc;
  using Share = WarpShare<kMTiles, kMWarps>;
  static constexpr int kBlockTiles = kMTiles * kMWarps;
  static constexpr int kUnits = Rows::units(kBlockTiles);
  static constexpr int kRoundTiles = kTilesOfRound;
  static constexpr int kRounds = kNTiles / kRoundTiles;
  static constexpr int kCells = kRoundTiles * 8 * kUnits;  // of a round
  static constexpr int kStride = kThreads / kUnits * kUnits;
  static constexpr int kPerThread = (kCells + kStride - 1) / kStride;

  // The j-th cell of this thread in a round: sequence and, the same for all j, hidden unit within
  // the tile. Consecutive threads have consecutive units, as they lie in memory.
  static LSTM_EXT_DEVICE unsigned cell(int j) { return j * kStride + threadIdx.x; }
  static LSTM_EXT_DEVICE bool has_cell(int j = 0) {
    return (kStride == kThreads || threadIdx.x < unsigned(kStride)) && cell(j) < unsigned(kCells);
  }
  static LSTM_EXT_DEVICE int unit() { return threadIdx.x % kUnits; }
  static LSTM_EXT_DEVICE int sequence(int round, int j = 0) {
    return round * kRoundTiles * 8 + cell(j) / kUnits;
  }

  // partial: [kKWarps][kRoundTiles][kBlockTiles][16][8], the columns of a row in an order that puts
  // what the threads of a warp take together into different banks.
  static LSTM_EXT_DEVICE int place(int warp, int n, int m, int row, int column) {
    const int swizzle = Rows::kGates == 4 ? (row >> 2 & 1) * 4 ^ (m >> 1 & 1) * 2 ^ (m >> 2 & 1)
                                          : (row >> 2 & 1) * 4 ^ (row >> 3 & 1) * 2 ^ (m & 1);
    return ((warp * kRoundTiles + n) * kBlockTiles + m) * 128 + row * 8 + (column ^ swizzle);
  }
  static LSTM_EXT_DEVICE void put(Acc* partial, const Acc (&sums)[kMTiles][kNTiles][4], int round) {
    const int lane = threadIdx.x % 32, warp = Share::k();
#pragma unroll
    for (int n = 0; n < kRoundTiles; ++n)
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          partial[place(warp, n, Share::first_m() + m, lane / 4 + e / 2 * 8,
                        lane % 4 * 2 + e % 2)] = sums[m][round * kRoundTiles + n][e];
  }
  // Where the first gate of this thread's j-th cell lies in the first warp's sums. first: of cell
  // 0, if that is at hand.
  static LSTM_EXT_DEVICE int part(int j = 0) {
    const int u = unit(), b = sequence(0, j);
    return Rows::kGates == 4 ? place(0, b / 8, u / 8 * 2, u % 8, b % 8)
                             : place(0, b / 8, u / 16, u % 16, b % 8);
  }
  static LSTM_EXT_DEVICE int part(int j, int first) {
    constexpr int kSequences = kStride / kUnits;
    if (kSequences % 8 == 0) return first + j * (kSequences / 8) * kBlockTiles * 128;
    return j == 0 ? first : part(j);
  }
  // The sums of the cell whose part() it is: the gates i, f, g, o, or one value. Gates and warps
  // lie at fixed distances: what place() swizzles by is the same for them.
  static LSTM_EXT_DEVICE void take(const Acc* partial, Acc (&out)[Rows::kGates], int part) {
#pragma unroll
    for (int gate = 0; gate < Rows::kGates; ++gate) {
      const Acc* const parts = partial + part + gate / 2 * 128 + gate % 2 * 64;
      out[gate] = parts[0];
#pragma unroll
      for (int warp = 1; warp < Share::kKWarps; ++warp)
        out[gate] += parts[warp * kRoundTiles * kBlockTiles * 128];
    }
  }
  static LSTM_EXT_DEVICE void take(const Acc* partial, Acc (&out)[Rows::kGates]) {
    take(partial, out, part());
  }
};

}  // namespace lstm_ext
