// The product of a step: a tile of weight rows times a tile of the batch, split over the warps of
// a block along k, and if kMWarps is more than 1 over the rows as well.
//
//   out[row][b] = sum_k weights[row][k] state[b][k]
//
// Weight rows are the M of the tensor cores' m16n8 tiles and sequences their N, so that a batch of
// 8 wastes nothing. With kMWarps = 1, warp w of kWarps takes the chunks w, w + kWarps, ... of k; a
// chunk is 64 bytes of every row. Two consequences:
// - every element of the state is read by exactly one warp of a block: it goes from L2 to the
//   registers, and is not staged in shared memory;
// - each warp has a partial sum of the whole tile; the caller adds them up in a fixed order.
// With more, kMWarps warps read the same element of the state, and the block has so many times
// fewer partial sums: for blocks with many rows, whose state lies in shared memory.
//
// No ldmatrix: the order of k within a chunk does not matter so long as both operands share it. A
// lane loads 16 consecutive bytes of its row, a row's four lanes 64 bytes together, and calls what
// it got the k's that the instruction wants of it.
#pragma once

#include "cuda/arithmetic.cuh"
#include "cuda/stream.cuh"

namespace lstm_ext {

// ---- which rows a tile has
// ------------------------------------------------------------------------

// The four gates of 4 * kMTiles hidden units: m-tile 2q has the gates i (rows 0 to 7) and f (8 to
// 15) of 8 units, m-tile 2q + 1 their g and o.
struct GateRows {
  static constexpr int kGates = 4;
  static constexpr int units(int m_tiles) { return 4 * m_tiles; }
  // Index of the weight row behind row g of half `half` of m-tile m, for units first, first + 1,
  // ... of H. Past the end it is some row that exists; what it gives is not used.
  static LSTM_EXT_DEVICE int row(int m, int half, int g, int first, int H) {
    const int unit = first + m / 2 * 8 + g;
    return (m % 2 * 2 + half) * H + (unit < H ? unit : H - 1);
  }
};

// 16 * kMTiles consecutive rows, one a unit.
struct PlainRows {
  static constexpr int kGates = 1;
  static constexpr int units(int m_tiles) { return 16 * m_tiles; }
  static LSTM_EXT_DEVICE int row(int m, int half, int g, int first, int H) {
    const int unit = first + m * 16 + half * 8 + g;
    return unit < H ? unit : H - 1;
  }
};

// ---- the product
// ----------------------------------------------------------------------------------

// How the warps of a block share the rows (kMWarps times kMTiles m-tiles) and k.
template <int kMTiles, int kMWarps>
struct WarpShare {
  static constexpr int kKWarps = kWarps / kMWarps;
  // That a block has kWarps warps is not known to the compiler.
  static LSTM_EXT_DEVICE int k() {
    const int warp = threadIdx.x / 32;
    return kMWarps == 1 ? warp : warp % kKWarps;
  }
  static LSTM_EXT_DEVICE int first_m() {
    return kMWarps == 1 ? 0 : int(threadIdx.x) / 32 / kKWarps * kMTiles;
  }
};

// The k-th 16 bytes of a sequence's state lie at start() + row(sequence, K in 16 bytes) + k *
// step().

// The state in global memory, written by other blocks.
template <class T>
struct StateInL2 {
  static constexpr bool kNear = false;
  const T* state;  // [count][K], as long as the weights'
  LSTM_EXT_DEVICE const uint4* start() const { return reinterpret_cast<const uint4*>(state); }
  LSTM_EXT_DEVICE uint32_t row(int b, uint32_t K) const { return uint32_t(b) * K; }
  LSTM_EXT_DEVICE uint32_t step() const { return 1; }
  LSTM_EXT_DEVICE uint4 load(const uint4* at) const { return load_shared_by_blocks(at); }
};
// The state in this block's own shared memory: [K in 16 bytes][rows], the sequences of the k-th in
// an order that puts what the lanes of a warp take together into different banks. A lane takes k's
// of one remainder by 4, tensor cores' lane % 4; lanes of sequences that are not there read
// others'.
struct StateInShared {
  static constexpr bool kNear = true;
  const uint4* state;
  int rows;  // a power of two from 2
  static LSTM_EXT_DEVICE int swapped(int k, int rows) { return (k % 4 * min(rows, 8) / 4) & ~1; }
  // Where 16 bytes of a sequence lie.
  static LSTM_EXT_DEVICE int place(int k, int b, int rows) {
    return k * rows + (b ^ swapped(k, rows));
  }
  LSTM_EXT_DEVICE const uint4* start() const { return state; }
  LSTM_EXT_DEVICE uint32_t row(int b, uint32_t) const {
    return uint32_t((b & (rows - 1)) ^ swapped(int(threadIdx.x % 4), rows));
  }
  LSTM_EXT_DEVICE uint32_t step() const { return uint32_t(rows); }
  LSTM_EXT_DEVICE uint4 load(const uint4* at) const { return *at; }
};

// A block's rows of the weights. Of the chunks of a warp the first kHeld stay in its registers, the
// next `shared` in shared memory, the rest are read from global memory (L2) at every step: just
// before they are used, or by a kernel that kStreams, if the plan says so, ahead.
template <class Arithmetic, class Rows, int kMTiles, int kHeld, int kMWarps = 1,
          bool kStreams = false>
class Weights {
  using Share = WarpShare<kMTiles, kMWarps>;
  static constexpr int kKWarps = Share::kKWarps;
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  static constexpr int kVectors = kChunkBytes / 16;  // of a chunk of a row
  static constexpr int kParts = Arithmetic::kParts, kColumns = Arithmetic::kColumns;
  // A lane of Scalar would hold what three others hold too.
  static constexpr int kInRegisters = kParts == 1 ? kHeld : 0;

 public:
  // w: [rows][K], rows 16-byte aligned, K in whole chunks, 64 GB at most. memory: 1 KB for each
  // warp, shared chunk and m-tile, and, if `ahead`, kStreamBytes. in_l2: as in WeightStream.
  LSTM_EXT_DEVICE Weights(const T* w, int H, int K, int first_unit, int shared,
                          unsigned char* memory, bool ahead = false, int in_l2 = 0)
      : chunks_(int(K * sizeof(T) / kChunkBytes)),
        shared_(shared),
        weights_(reinterpret_cast<const uint4*>(w)),
        stream_(ahead ? memory + size_t(kWarps) * shared * kMTiles * kTileBytes : nullptr,
                kInRegisters + shared, (chunks_ - Share::k() + kKWarps - 1) / kKWarps, in_l2) {
    const int lane = threadIdx.x % 32, warp = Share::k();
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        rows_[m][half] = uint32_t(Rows::row(Share::first_m() + m, half, lane / 4, first_unit, H)) *
                         chunks_ * kVectors;
    memory_ = reinterpret_cast<uint4*>(memory) + size_t(threadIdx.x / 32) * shared * kMTiles * 64;
#pragma unroll
    for (int j = 0; j < kInRegisters; ++j)
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        held_[j][m][0] = held_[j][m][1] = make_uint4(0, 0, 0, 0);
        if (warp + j * kKWarps < chunks_) load(m, warp + j * kKWarps, 0, held_[j][m]);
      }
    for (int j = 0; j < shared; ++j) {
      const int chunk = warp + (kInRegisters + j) * kKWarps;
      if (chunk >= chunks_) break;
      for (int m = 0; m < kMTiles; ++m)
        for (int part = 0; part < kParts; ++part) {
          uint4 rows[2];
          load(m, chunk, part, rows);
          // Lanes that share a row (Scalar) write the same value to the same place, which would
          // be a race in name: the first of them writes.
          if (kParts == 1 || lane % 4 == 0)
            for (int half = 0; half < 2; ++half) *place(j, m, part, half) = rows[half];
        }
    }
    __syncwarp();  // a warp reads only what it wrote itself
    if constexpr (kHasStream) stream_.begin(source());
  }
  // The block has arrived at a barrier since the last product.
  LSTM_EXT_DEVICE void arrived() {
    if constexpr (kHasStream) stream_.begin(source());
  }
  // What the thread had asked for by cp.async before the last product is here.
  LSTM_EXT_DEVICE void wait_for_others() {
    // A stream has waited: before its last chunk for all but as many groups as it has asked for
    // since the product began, or fewer.
    if constexpr (kHasStream)
      if (stream_.on()) return;
    async_wait<0>();
  }
  // After the last product.
  LSTM_EXT_DEVICE void stop() {
    if constexpr (kHasStream) stream_.stop();
  }

  // sums[m][n]: the warp's part of the product with the kNTiles * 8 sequences whose states are the
  // rows first, first + 1, ... of the state (64 GB at most), row `last` standing in for those past
  // the end.
  template <int kNTiles, class State>
  LSTM_EXT_DEVICE void multiply(const State& state, int first, int last,
                                Acc (&sums)[kMTiles][kNTiles][4]) {
    arrived();  // or goes on to another tile
    const int lane = threadIdx.x % 32, warp = Share::k();
    uint32_t columns[kNTiles][kColumns];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int b = first + n * 8 + Arithmetic::column(lane, j);
        columns[n][j] = state.row(min(b, last), chunks_ * kVectors);
      }
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0;
    Acc second[kMTiles][kNTiles][4] = {};  // of the second halves of the chunks, with kSplit

    static_assert(kInRegisters % kHeldGroup<State, kNTiles> == 0, "groups are whole");
    const int mine = (chunks_ - warp + kKWarps - 1) / kKWarps;  // chunks of this warp
    if constexpr (kInRegisters > 0) {
      const auto held = [&](bool all) {
#pragma unroll
        for (int j = 0; j < kInRegisters; j += kHeldGroup<State, kNTiles>)
          if (all || j < mine)
            group<kRegisters, kNTiles, kHeldGroup<State, kNTiles>, kHeldGroup<State, kNTiles>>(
                state, columns, j, mine, sums, second);
      };
      // A cluster's blocks need not fill all that they can hold. If they do, no branch stands
      // between the loads and products.
      if (kMWarps == 1 || mine >= kInRegisters)
        held(true);
      else
        held(false);
    }
    const int resident = min(mine, kInRegisters + shared_);
    int j = kInRegisters;
#pragma unroll 1
    for (; j < resident; j += kSharedGroup<State, kNTiles>)
      group<kShared, kNTiles, kSharedGroup<State, kNTiles>, kSharedCount<State, kNTiles>>(
          state, columns, j, resident, sums, second);
    if constexpr (kSplit<State, kNTiles>) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][n][e] += second[m][n][e];
    }
    if constexpr (kHasStream) {
      if (stream_.on()) {
#pragma unroll 1
        for (j = max(kInRegisters, resident); j < mine; j += kStreamGroup<State, kNTiles>)
          group<kStream, kNTiles, kStreamGroup<State, kNTiles>, kSharedCount<State, kNTiles>>(
              state, columns, j, mine, sums, second);
        return stream_.turn();
      }
    }
    if constexpr (!State::kNear) {  // else all of the weights are, too
#pragma unroll 1
      for (j = max(kInRegisters, resident); j < mine; j += kGlobalGroup<State, kNTiles>)
        group<kGlobal, kNTiles, kGlobalGroup<State, kNTiles>, kGlobalGroup<State, kNTiles>>(
            state, columns, j, mine, sums, second);
    }
  }

 private:
  enum Source { kRegisters, kShared, kStream, kGlobal };
  static constexpr bool kHasStream = kStreams && kParts == 1 && kLoadsAsync;
  // Chunks whose loads are all on their way before the first is used: from L2 as many as registers
  // allow, for each wait is some 500 cycles on an H100, whatever it brings.
  template <class State, int kNTiles>
  static constexpr int kHeldGroup =
      State::kNear                   ? (kNTiles < 2 && kInRegisters % 2 == 0 ? 2 : 1)
      : kInRegisters * kNTiles <= 16 ? (kInRegisters ? kInRegisters : 1)
                                     : (kInRegisters > 4 ? 8 : 16) / kNTiles;
  template <class State, int kNTiles>
  static constexpr int kGroup =
      kParts == 1 && 2 * kMTiles + kNTiles <= (State::kNear ? 6 : 8) ? 2 : 1;
  // Kernels that hold weights are launched for all steps, a block a multiprocessor, and have the
  // registers for more; the others may be one step's, several blocks a multiprocessor.
  template <class State>
  static constexpr bool kRoomy = !State::kNear && kInRegisters > 0;
  template <class State, int kNTiles>
  static constexpr int kSharedGroup =
      !kRoomy<State> || kMTiles * kNTiles > 8 ? kGroup<State, kNTiles>
      : kMTiles * kNTiles == 1                ? 16
                                              : 8 / kNTiles;
  template <class State, int kNTiles>
  static constexpr int kSharedCount =
      kRoomy<State> && kMTiles * kNTiles == 1 ? 4 : kGroup<State, kNTiles>;
  template <class State, int kNTiles>
  static constexpr int kStreamGroup =
      kSharedGroup<State, kNTiles> < 8 ? kSharedGroup<State, kNTiles> : 8;
  template <class State, int kNTiles>
  static constexpr int kGlobalGroup =
      kRoomy<State> && 2 * kMTiles + kNTiles <= 4 ? 4 : kGroup<State, kNTiles>;

  // Where a warp has few sums, each is made as two: with all else near, what a chunk costs is the
  // wait for the product before it, 24 cycles on an H100, where two warps can start one every 6.5.
  // Not elsewhere: the families step and grid give the same bits with every tile.
  template <class State, int kNTiles>
  static constexpr bool kSplit = State::kNear && kNTiles * kMTiles < 3;

  // Adds the products of the warp's chunks j, j + 1, ... of kLoads, those from `end` on left out:
  // all of their states are on their way before the first is used, and no branch stands between the
  // products of kCount chunks.
  template <Source kSource, int kNTiles, int kLoads, int kCount, class State>
  LSTM_EXT_DEVICE void group(const State& state, const uint32_t (&columns)[kNTiles][kColumns],
                             int j, int end, Acc (&sums)[kMTiles][kNTiles][4],
                             Acc (&second)[kMTiles][kNTiles][4]) {
    const int lane = threadIdx.x % 32, warp = Share::k();
    const uint4* states = state.start();
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      uint4 b[kLoads][kNTiles][kColumns];
      // Loads under a predicate and products without: no branch keeps them from overlapping.
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int k = (warp + (j + i) * kKWarps) * kVectors + Arithmetic::vector(lane, part);
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            b[i][n][c] = j + i < end ? state.load(states + columns[n][c] + k * state.step()) : zero;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (i > 0 && i % kCount == 0 && j + i >= end) break;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          uint4 rows[2] = {zero, zero};
          if constexpr (kSource == kRegisters) {
            rows[0] = held_[j + i][m][0];
            rows[1] = held_[j + i][m][1];
          } else if (j + i < end) {
            if constexpr (kSource == kGlobal) {
              load(m, warp + (j + i) * kKWarps, part, rows);
            } else if constexpr (kSource == kStream) {
              stream_.take(m, j + i, rows, source());
              Arithmetic::prepare(rows);
            } else {
              for (int half = 0; half < 2; ++half)
                rows[half] = *place(j + i - kInRegisters, m, part, half);
            }
          }
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
            if constexpr (kSplit<State, kNTiles>)
              Arithmetic::multiply(sums[m][n], second[m][n], rows, b[i][n]);
            else
              Arithmetic::multiply(sums[m][n], rows, b[i][n]);
          }
        }
      }
    }
  }

  // For the stream: where a lane's part of a row lies.
  LSTM_EXT_DEVICE auto source() const {
    return [this](int m, int half, int j) {
      const int chunk = Share::k() + j * kKWarps;
      return weights_ + rows_[m][half] + chunk * kVectors + Arithmetic::vector(threadIdx.x % 32, 0);
    };
  }
  LSTM_EXT_DEVICE void load(int m, int chunk, int part, uint4 (&out)[2]) const {
    const int k = chunk * kVectors + Arithmetic::vector(threadIdx.x % 32, part);
#pragma unroll
    for (int half = 0; half < 2; ++half) out[half] = __ldg(weights_ + rows_[m][half] + k);
    Arithmetic::prepare(out);
  }
  LSTM_EXT_DEVICE uint4* place(int j, int m, int part, int half) const {
    // 64 vectors a chunk and m-tile, whichever way they divide into parts, halves and slots.
    return memory_ + (j * kMTiles + m) * 64 + (part * 2 + half) * (32 / kParts) +
           Arithmetic::slot(threadIdx.x % 32);
  }

  int chunks_, shared_;
  const uint4* weights_;
  uint32_t rows_[kMTiles][2];  // first vector of each row
  uint4* memory_;
  WeightStream<kHasStream ? kMTiles : 0> stream_;
  uint4 held_[kInRegisters ? kInRegisters : 1][kMTiles][2];
};

}  // namespace lstm_ext
