// The product of a step: a tile of weight rows times a tile of the batch, split over the warps of
// a block along k.
//
//   out[row][b] = sum_k weights[row][k] state[b][k]
//
// Weight rows are the M of the tensor cores' m16n8 tiles and sequences their N, so that a batch of
// 8 wastes nothing. Warp w of kWarps takes the chunks w, w + kWarps, ... of k; a chunk is 64 bytes
// of every row. Two consequences:
// - every element of the state is read by exactly one warp of a block: it goes from L2 to the
//   registers, and is not staged in shared memory;
// - each warp has a partial sum of the whole tile; the caller adds them up in a fixed order.
//
// No ldmatrix: the order of k within a chunk does not matter so long as both operands share it. A
// lane loads 16 consecutive bytes of its row, a row's four lanes 64 bytes together, and calls what
// it got the k's that the instruction wants of it.
#pragma once

#include "cell.h"
#include "cuda/primitives.cuh"
#include "cuda/tiles.h"

namespace lstm_ext {

// ---- the arithmetic of one chunk of one m16n8 tile
// ------------------------------------------------
//
// An Arithmetic has: Element (of weights and state), Acc; kParts, the number of 16-byte loads of a
// row that a lane makes per chunk, and vector(lane, part), which of a chunk's four they are;
// kColumns, the number of sequences a lane loads for, and column(lane, j), which; round(),
// applied to both operands; and multiply(d, lo, hi, b): lo and hi of rows g and g + 8, b[kColumns].
// d is laid out as in primitives.cuh.

template <class T>
struct Vector16 {  // 16 bytes as elements
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};
template <class T>
LSTM_EXT_DEVICE Vector16<T> elements(const uint4& bits) {
  Vector16<T> out;
  memcpy(&out, &bits, 16);
  return out;
}

// Fused multiply-adds, exact in the element's own precision. A lane loads whole chunks of rows g
// and g + 8 and of the sequences 2t and 2t + 1.
template <class T>
struct Scalar {
  using Element = T;
  using Acc = decltype(to_acc(T()));
  static constexpr int kParts = 4, kColumns = 2;

  static LSTM_EXT_DEVICE int vector(int, int part) { return part; }
  static LSTM_EXT_DEVICE int column(int lane, int j) { return 2 * (lane % 4) + j; }
  static LSTM_EXT_DEVICE int slot(int lane) { return lane / 4; }  // lanes of a row share
  static LSTM_EXT_DEVICE uint4 round(const uint4& bits) { return bits; }
  static LSTM_EXT_DEVICE T round_state(T x) { return x; }

  static LSTM_EXT_DEVICE void multiply(Acc (&d)[4], const uint4& lo, const uint4& hi,
                                       const uint4 (&b)[kColumns]) {
    const Vector16<T> l = elements<T>(lo), h = elements<T>(hi);
    const Vector16<T> b0 = elements<T>(b[0]), b1 = elements<T>(b[1]);
#pragma unroll
    for (int k = 0; k < Vector16<T>::kSize; ++k) {
      d[0] += to_acc(l.v[k]) * to_acc(b0.v[k]);
      d[1] += to_acc(l.v[k]) * to_acc(b1.v[k]);
      d[2] += to_acc(h.v[k]) * to_acc(b0.v[k]);
      d[3] += to_acc(h.v[k]) * to_acc(b1.v[k]);
    }
  }
};

// Lanes of the tensor cores' layout: lane (g, t) loads the t-th 16 bytes of rows g and g + 8 and
// of sequence g.
struct TensorLanes {
  static constexpr int kParts = 1, kColumns = 1;
  static LSTM_EXT_DEVICE int vector(int lane, int) { return lane % 4; }
  static LSTM_EXT_DEVICE int column(int lane, int) { return lane / 4; }
  static LSTM_EXT_DEVICE int slot(int lane) { return lane; }
};

// fp16 and bf16, summed in fp32.
template <class T>
struct Tensor16 : TensorLanes {
  using Element = T;
  using Acc = float;
  static LSTM_EXT_DEVICE uint4 round(const uint4& bits) { return bits; }
  static LSTM_EXT_DEVICE T round_state(T x) { return x; }

  static LSTM_EXT_DEVICE void multiply(float (&d)[4], const uint4& lo, const uint4& hi,
                                       const uint4 (&b)[1]) {
    const uint32_t a_first[4] = {lo.x, hi.x, lo.y, hi.y}, b_first[2] = {b[0].x, b[0].y};
    const uint32_t a_second[4] = {lo.z, hi.z, lo.w, hi.w}, b_second[2] = {b[0].z, b[0].w};
    mma_m16n8k16<T>(d, a_first, b_first);
    mma_m16n8k16<T>(d, a_second, b_second);
  }
};

// The names are the same for every architecture, since kernels are named after them: only what they
// stand for differs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Turing: neither bf16 nor TF32 in its tensor cores.
template <>
struct Tensor16<__nv_bfloat16> : Scalar<__nv_bfloat16> {};
struct Tf32 : Scalar<float> {};
#else
// fp32 operands rounded to TF32 (10 bits of mantissa), summed in fp32.
struct Tf32 : TensorLanes {
  using Element = float;
  using Acc = float;
  static LSTM_EXT_DEVICE uint4 round(const uint4& bits) {
    const Vector16<float> x = elements<float>(bits);
    return make_uint4(to_tf32(x.v[0]), to_tf32(x.v[1]), to_tf32(x.v[2]), to_tf32(x.v[3]));
  }
  // The state is rounded once by who writes it, not by each of its readers.
  static LSTM_EXT_DEVICE float round_state(float x) {
    const uint32_t bits = to_tf32(x);
    float out;
    memcpy(&out, &bits, 4);
    return out;
  }
  static LSTM_EXT_DEVICE void multiply(float (&d)[4], const uint4& lo, const uint4& hi,
                                       const uint4 (&b)[1]) {
    const uint32_t a_first[4] = {lo.x, hi.x, lo.y, hi.y}, b_first[2] = {b[0].x, b[0].y};
    const uint32_t a_second[4] = {lo.z, hi.z, lo.w, hi.w}, b_second[2] = {b[0].z, b[0].w};
    mma_m16n8k8_tf32(d, a_first, b_first);
    mma_m16n8k8_tf32(d, a_second, b_second);
  }
};
#endif

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

// A block's rows of the weights. Of the chunks of a warp the first kHeld stay in its registers, the
// next `shared` in shared memory, the rest are read from global memory (L2) at every step.
template <class Arithmetic, class Rows, int kMTiles, int kHeld>
class Weights {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  static constexpr int kVectors = kChunkBytes / 16;  // of a chunk of a row
  static constexpr int kParts = Arithmetic::kParts, kColumns = Arithmetic::kColumns;
  // A lane of Scalar would hold what three others hold too.
  static constexpr int kInRegisters = kParts == 1 ? kHeld : 0;

 public:
  // w: [rows][K], rows 16-byte aligned, K in whole chunks, 64 GB at most. memory: 1 KB for each
  // warp, shared chunk and m-tile.
  LSTM_EXT_DEVICE Weights(const T* w, int H, int K, int first_unit, int shared,
                          unsigned char* memory)
      : chunks_(int(K * sizeof(T) / kChunkBytes)),
        shared_(shared),
        weights_(reinterpret_cast<const uint4*>(w)) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        rows_[m][half] = uint32_t(Rows::row(m, half, lane / 4, first_unit, H)) * chunks_ * kVectors;
    memory_ = reinterpret_cast<uint4*>(memory) + size_t(warp) * shared * kMTiles * 64;
#pragma unroll
    for (int j = 0; j < kInRegisters; ++j)
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        held_[j][m][0] = held_[j][m][1] = make_uint4(0, 0, 0, 0);
        if (warp + j * kWarps < chunks_) load(m, warp + j * kWarps, 0, held_[j][m]);
      }
    for (int j = 0; j < shared; ++j) {
      const int chunk = warp + (kInRegisters + j) * kWarps;
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
  }

  // sums[m][n]: the warp's part of the product with the kNTiles * 8 sequences whose states are the
  // rows first, first + 1, ... of state [count][K] (64 GB at most), row `last` standing in for
  // those past the end.
  template <int kNTiles>
  LSTM_EXT_DEVICE void multiply(const T* state, int first, int last,
                                Acc (&sums)[kMTiles][kNTiles][4]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint4* states = reinterpret_cast<const uint4*>(state);
    uint32_t columns[kNTiles][kColumns];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int b = first + n * 8 + Arithmetic::column(lane, j);
        columns[n][j] = uint32_t(min(b, last)) * chunks_ * kVectors;
      }
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0;

    const int mine = (chunks_ - warp + kWarps - 1) / kWarps;  // chunks of this warp
    if constexpr (kInRegisters > 0)
#pragma unroll
      for (int j = 0; j < kInRegisters; j += kHeldGroup<kNTiles>)
        group<kRegisters, kNTiles, kHeldGroup<kNTiles>>(states, columns, j, mine, sums);
    const int resident = min(mine, kInRegisters + shared_);
    int j = kInRegisters;
#pragma unroll 1
    for (; j < resident; j += kGroup<kNTiles>)
      group<kShared, kNTiles, kGroup<kNTiles>>(states, columns, j, resident, sums);
#pragma unroll 1
    for (j = max(kInRegisters, resident); j < mine; j += kGroup<kNTiles>)
      group<kGlobal, kNTiles, kGroup<kNTiles>>(states, columns, j, mine, sums);
  }

 private:
  enum Source { kRegisters, kShared, kGlobal };
  // Chunks whose loads are all on their way before the first is used: as many as registers allow.
  template <int kNTiles>
  static constexpr int kHeldGroup =
      kInRegisters * kNTiles <= 16 ? (kInRegisters ? kInRegisters : 1)
                                   : (kInRegisters > 4 ? 8 : 16) / kNTiles;
  template <int kNTiles>
  static constexpr int kGroup = kParts == 1 && 2 * kMTiles + kNTiles <= 8 ? 2 : 1;

  // Adds the products of the warp's chunks j, j + 1, ... of kCount, those from `end` on left out.
  template <Source kSource, int kNTiles, int kCount>
  LSTM_EXT_DEVICE void group(const uint4* states, const uint32_t (&columns)[kNTiles][kColumns],
                             int j, int end, Acc (&sums)[kMTiles][kNTiles][4]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      uint4 b[kCount][kNTiles][kColumns];
      // Loads under a predicate and products without: no branch keeps them from overlapping.
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int k = (warp + (j + i) * kWarps) * kVectors + Arithmetic::vector(lane, part);
#pragma unroll
        for (int n = 0; n < kNTiles; ++n)
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            b[i][n][c] = j + i < end ? load_shared_by_blocks(states + columns[n][c] + k) : zero;
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          uint4 rows[2] = {zero, zero};
          if constexpr (kSource == kRegisters) {
            rows[0] = held_[j + i][m][0];
            rows[1] = held_[j + i][m][1];
          } else if (j + i < end) {
            if constexpr (kSource == kGlobal)
              load(m, warp + (j + i) * kWarps, part, rows);
            else
              for (int half = 0; half < 2; ++half)
                rows[half] = *place(j + i - kInRegisters, m, part, half);
          }
#pragma unroll
          for (int n = 0; n < kNTiles; ++n)
            Arithmetic::multiply(sums[m][n], rows[0], rows[1], b[i][n]);
        }
    }
  }

  LSTM_EXT_DEVICE void load(int m, int chunk, int part, uint4 (&out)[2]) const {
    const int k = chunk * kVectors + Arithmetic::vector(threadIdx.x % 32, part);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      out[half] = Arithmetic::round(__ldg(weights_ + rows_[m][half] + k));
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
  uint4 held_[kInRegisters ? kInRegisters : 1][kMTiles][2];
};

// ---- the sum over the warps
// -----------------------------------------------------------------------

// Hands each unit of a tile the sums of its gates. The partial sums go through shared memory in
// rounds of kRoundTiles n-tiles, as many as give each thread about one unit of one sequence.
template <class Arithmetic, class Rows, int kMTiles, int kNTiles>
struct Reduction {
  using Acc = typename Arithmetic::Acc;
  static constexpr int kUnits = Rows::units(kMTiles);
  static constexpr int kRoundTiles = round_tiles(kUnits, kNTiles);
  static constexpr int kRounds = kNTiles / kRoundTiles;
  static constexpr int kCells = kRoundTiles * 8 * kUnits;  // of a round
  static constexpr int kPerThread = (kCells + kThreads - 1) / kThreads;
  static_assert(kPerThread == 1, "a round gives each thread one cell at most");

  // The cell of this thread in a round: hidden unit and sequence within the tile. Consecutive
  // threads have consecutive units, as they lie in memory.
  static LSTM_EXT_DEVICE bool has_cell() { return int(threadIdx.x) < kCells; }
  static LSTM_EXT_DEVICE int unit() { return threadIdx.x % kUnits; }
  static LSTM_EXT_DEVICE int sequence(int round) {
    return round * kRoundTiles * 8 + threadIdx.x / kUnits;
  }

  // partial: [kWarps][kRoundTiles][kMTiles][16][8], the columns of a row in an order that puts what
  // the threads of a warp take together into different banks.
  static LSTM_EXT_DEVICE int place(int warp, int n, int m, int row, int column) {
    const int swizzle = Rows::kGates == 4 ? (row >> 2 & 1) * 4 ^ (m >> 1 & 1) * 2 ^ (m >> 2 & 1)
                                          : (row >> 2 & 1) * 4 ^ (row >> 3 & 1) * 2 ^ (m & 1);
    return ((warp * kRoundTiles + n) * kMTiles + m) * 128 + row * 8 + (column ^ swizzle);
  }
  static LSTM_EXT_DEVICE void put(Acc* partial, const Acc (&sums)[kMTiles][kNTiles][4], int round) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < kRoundTiles; ++n)
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          partial[place(warp, n, m, lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2)] =
              sums[m][round * kRoundTiles + n][e];
  }
  // The sums of this thread's unit: the gates i, f, g, o, or one value.
  static LSTM_EXT_DEVICE void take(const Acc* partial, Acc (&out)[Rows::kGates]) {
    const int u = unit(), b = threadIdx.x / kUnits;  // of the round
#pragma unroll
    for (int gate = 0; gate < Rows::kGates; ++gate) {
      const int m = Rows::kGates == 4 ? u / 8 * 2 + gate / 2 : u / 16;
      const int row = Rows::kGates == 4 ? gate % 2 * 8 + u % 8 : u % 16;
      Acc sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[place(warp, b / 8, m, row, b % 8)];
      out[gate] = sum;
    }
  }
};

// ---- the cell's functions
// -------------------------------------------------------------------------

// For Cell<> of cell.h. fp32: within 2 units of the last place of the true value.
template <class T>
struct ExactMath {
  using V = T;
  static LSTM_EXT_DEVICE V sigmoid(V x) { return 1 / (1 + exact_exp(-x)); }
  static LSTM_EXT_DEVICE V tanh(V x) { return exact_tanh(x); }
};
// Beside products of half types and TF32: relative error below 3e-6, a few times as fast.
struct FastMath {
  using V = float;
  static LSTM_EXT_DEVICE V sigmoid(V x) { return __fdividef(1.f, 1.f + __expf(-x)); }
  static LSTM_EXT_DEVICE V tanh(V x) {
    const float x2 = x * x;
    // The first terms of the series, where 1 - 2 / (1 + e^2x) would cancel.
    const float small = x + x * x2 * (-1.f / 3 + x2 * (2.f / 15 - x2 * (17.f / 315)));
    const float large = 1.f - __fdividef(2.f, 1.f + __expf(2.f * x));
    return x2 < 0.0225f ? small : large;
  }
};

template <class Arithmetic>
struct CellOf {
  using type = Cell<FastMath>;
};
template <class T>
struct CellOf<Scalar<T>> {
  using type = Cell<ExactMath<T>>;
};

}  // namespace lstm_ext
