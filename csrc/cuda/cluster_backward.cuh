// Backward, one launch for all steps on blocks that keep all of W_hh, several for each group of
// sequences; see cluster_forward.cuh.
//
// Forward's exchange turned round: dgates stay in the block that makes them, and each block
// multiplies its slice of them, as k, with all rows of W_hh transposed. Every block so has a part
// of every unit's gradient of h; it gives each part, in fp32, to the block that has the unit, which
// adds the parts up in an order of its own: one exchange a step, and the same bits every time.
// While they are on their way, it does all of the cell that needs no gradient of h.
//
// A cluster's launch may do a part of the steps: it goes on from the dgates that the launch before
// has stored, and from its gradients of c and h that wait, which lie in cells and carry.
#pragma once

#include "cuda/backward_cells.cuh"
#include "cuda/backward_exchange.cuh"

namespace lstm_ext {

// kMTiles: m-tiles of a block's own units. Of a warp's m-tiles of the product the first kHeld stay
// in registers, the next `shared` in shared memory, as many as there are. Exchange: of
// backward_exchange.cuh.
template <template <int, int> class ExchangeOf, class Arithmetic, int kMTiles, int kNTiles,
          int kHeld>
__global__ void __launch_bounds__(kThreads, 1)
    backward_resident(const __grid_constant__ BackwardArgs args) {
#ifdef LSTM_EXT_CLUSTERS
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Cell = BackwardUnit<Arithmetic, false, false>;
  using Exchange = ExchangeOf<kMTiles, kNTiles>;
  constexpr int kUnits = 16 * kMTiles, kRows = 8 * kNTiles, kVector = 16 / sizeof(T);
  constexpr int kChunks = 4 * kUnits * int(sizeof(T)) / kChunkBytes;  // of a block's k
  constexpr Tile kTile = {kMTiles, kNTiles, kHeld};
  constexpr int kStride = kThreads / kUnits * kUnits;
  constexpr int kCells = cluster_cells(kUnits, cluster_rows(kTile, true));
  // n-tiles whose operands are in registers at a time.
  constexpr int kColumns = kNTiles < 2 || kChunks > 4 ? 1 : 2;
  // The product's columns are sent in pairs.
  static_assert(sizeof(Acc) == 4 && kUnits % kVector == 0, "16-bit and TF32 only");

  DYNAMIC_SHARED(memory);
  const typename Exchange::Place place(args.shape, int(args.steps.B));
  if constexpr (Exchange::kCluster)
    if (place.slice >= place.slices) return Mailboxes::stand_by(memory);  // no units left for it
  const BackwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int H = args.H, K = args.K, shared = args.shape.shared;
  const int start = Exchange::kCluster ? args.shape.first : 0, end = args.shape.last;
  const int first_product = max(start, 1);  // the step of the launch's first
  const int unit_first = place.slice * kUnits;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, pair = lane % 4;

  // A thread's cells: thread by thread over the units, then over the sequences.
  const int u = threadIdx.x % kUnits, unit = unit_first + u;
  const auto row_of = [&](int j) { return int(threadIdx.x) / kUnits + j * (kStride / kUnits); };
  Exchange exchange(memory, d, place, args.shape, H, u, row_of(0));

  // This block's dgates, gate by gate: [2][kRows][pitch]. Step j's lie in [j % 2].
  constexpr int kPitch = int(shared_row(4 * kUnits * int64_t(sizeof(T))));
  unsigned char* const own = exchange.end();
  for (int v = threadIdx.x; v < 2 * kRows * kPitch / 16; v += kThreads)
    reinterpret_cast<uint4*>(own)[v] = make_uint4(0, 0, 0, 0);

  // ---- the weights: warp w has the m-tiles w, w + kWarps, ... of all units

  unsigned char* const fetched = own + 2 * kRows * kPitch;
  uint4* const kept = reinterpret_cast<uint4*>(fetched + ahead_bytes(kBackwardWords, kCells)) +
                      size_t(warp) * shared * kChunks * 64 + lane;
  const int tiles = (H + 15) / 16, mine = (tiles - warp + kWarps - 1) / kWarps;
  // Row `half` of this lane: 16 bytes of k, which is the gates of this block's units.
  const auto load_row = [&](int q, int chunk, int half) {
    const int row = (warp + q * kWarps) * 16 + half * 8 + g;
    const int k = (chunk * 4 + pair) * kVector, unit = unit_first + k % kUnits;
    const T* from = as<T>(d.w_hh) + at(row, K, k / kUnits * H + unit);
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (row < H && unit < H && H % kVector == 0) {
      bits = __ldg(reinterpret_cast<const uint4*>(from));
    } else if (row < H) {
      // Element by element, the last first, each shifting the ones after it up.
      uint64_t lo = 0, hi = 0;
#pragma unroll 1
      for (int e = min(kVector, H - unit) - 1; e >= 0; --e) {
        uint32_t element = 0;
        memcpy(&element, from + e, sizeof(T));
        hi = hi << 8 * sizeof(T) | lo >> (64 - 8 * sizeof(T));
        lo = lo << 8 * sizeof(T) | element;
      }
      bits = make_uint4(uint32_t(lo), uint32_t(lo >> 32), uint32_t(hi), uint32_t(hi >> 32));
    }
    return bits;
  };
  const auto load_weights = [&](int q, int chunk, uint4(&rows)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half] = load_row(q, chunk, half);
    Arithmetic::prepare(rows);
  };
  uint4 held[kHeld][kChunks][2];
#pragma unroll
  for (int q = 0; q < kHeld; ++q)
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) load_weights(q, chunk, held[q][chunk]);
  for (int q = kHeld; q < mine; ++q)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint4 rows[2];
      load_weights(q, chunk, rows);
      for (int half = 0; half < 2; ++half)
        kept[(((q - kHeld) * kChunks + chunk) * 2 + half) * 32] = rows[half];
    }
  // A lane reads only what it wrote itself.

  // ---- the cells

  const auto sequence = [&](int j) { return place.row_first + row_of(j); };
  const auto here = [&](int j) {
    return (kStride == kThreads || threadIdx.x < kStride) && sequence(j) < place.row_end &&
           unit < H;
  };
  const Cell cell(args, d, walk, unit);
  Acc dc[kCells], carry[kCells] = {};
  Course course[kCells];
#pragma unroll
  for (int j = 0; j < kCells; ++j) {
    dc[j] = here(j) && start == 0 ? cell.first_dc(sequence(j)) : Acc(0);
    if (here(j)) course[j] = {walk, sequence(j), walk.length(sequence(j))};
  }
  if (start > 0) {
    __syncthreads();  // all of `own` is zero
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      if (!here(j)) continue;
      const int b = sequence(j);
      dc[j] = as<Acc>(d.cells)[at(b, H, unit)];
      carry[j] = as<Acc>(d.carry)[at(b, H, unit)];
      const int i = walk.T() - start;  // the place of step start - 1
      const Turn turn = course[j].turn(walk, i, walk.first_row(walk.step_at(i)));
      if (!turn.active || turn.reset) continue;
      const T* before = as<T>(d.dgates) + at(turn.row, 4 * H, unit);
      for (int gate = 0; gate < 4; ++gate)
        reinterpret_cast<T*>(own + (start + 1) % 2 * (kRows * kPitch) +
                             row_of(j) * kPitch)[gate * kUnits + u] =
            Arithmetic::round_state(before[gate * H]);
    }
  }

  // m-tiles of a warp that are multiplied side by side: a product waits for the one before it in
  // its sum.
  constexpr int kTogether = kColumns > 1 ? 2 : kHeld;
  static_assert(kHeld % kTogether == 0, "held in whole groups");

  // The product with the dgates of step j - 1, and its parts to whom they belong.
  const int first_read = pinned(exchange.column() * kPitch + pair * 16);
  const auto multiply = [&](int j) {
    const unsigned char* gates = own + (j + 1) % 2 * (kRows * kPitch) + first_read;
    const auto target = exchange.target(j);
#pragma unroll 1
    for (int first = 0; first < kNTiles; first += kColumns) {
      uint4 b[kChunks][kColumns][1];
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          b[chunk][n][0] =
              *reinterpret_cast<const uint4*>(gates + (first + n) * 8 * kPitch + chunk * 4 * 16);
#pragma unroll
      for (int q = 0; q < kHeld; q += kTogether) {
        if (q >= mine) break;
        Acc sums[kTogether][kColumns][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
#pragma unroll
            for (int n = 0; n < kColumns; ++n)
              Arithmetic::multiply(sums[i][n], held[q + i][chunk], b[chunk][n]);
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
#pragma unroll
          for (int n = 0; n < kColumns; ++n)
            if (q + i < mine) exchange.put(target, q + i, first + n, sums[i][n]);
      }
#pragma unroll 1
      for (int q = kHeld; q < mine; ++q) {
        Acc sums[kColumns][4] = {};
        const uint4* rows = kept + (q - kHeld) * kChunks * 64;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          const uint4 of_chunk[2] = {rows[chunk * 64], rows[chunk * 64 + 32]};
#pragma unroll
          for (int n = 0; n < kColumns; ++n) Arithmetic::multiply(sums[n], of_chunk, b[chunk][n]);
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) exchange.put(target, q, first + n, sums[n]);
      }
    }
    exchange.send(j);
  };

  typename Cell::Result results[kCells] = {};
  // Of steps j, j - 1 and j + 1.
  Turn turn[kCells] = {}, before[kCells] = {}, following[kCells] = {};
  // dy has elements of 2 bytes, which cannot be fetched ahead: it waits in registers.
  T dy[kCells] = {}, next_dy[kCells] = {};
  Ahead<kBackwardWords, kCells> ahead(fetched, pinned(threadIdx.x));
  // First rows of step j, which fetch() is at, and a step ahead: a packed batch reads them.
  const auto place_of = [&](int j) { return walk.T() - 1 - j; };
  unsigned next_rows = start < walk.T() ? walk.first_row(walk.step_at(place_of(start))) : 0;
  unsigned rows_after = walk.first_row_beside<false>(next_rows, place_of(start + 1));
  // The turns of step j, as `following`, and what its cells need.
  const auto fetch = [&](int j) {
    const unsigned rows = next_rows;
    next_rows = rows_after;
    rows_after = walk.first_row_beside<false>(next_rows, place_of(j + 2));
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      following[i] = course[i].turn(walk, place_of(j), rows);
      const Turn& of = following[i];
      const bool reads = of.active && j < args.shape.last;
      next_dy[i] = cell.dy_ahead(of, reads);
      if (reads) cell.fetch(ahead, ahead.slot(j, i), of, walk.row_from(next_rows, of.b));
    }
    ahead.close();
  };
  const auto store = [&](int j, const Turn(&of)[kCells]) {
#pragma unroll
    for (int i = 0; i < kCells; ++i)
      if (here(i)) cell.store(j, of[i], results[i]);
  };
  const int first_own = pinned(row_of(0) * kPitch + u * int(sizeof(T)));
  fetch(start);
  exchange.open();
  for (int j = start; j < end; ++j) {
    const int box = j & 1;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      turn[i] = following[i];
      dy[i] = next_dy[i];
    }
    if (j > 0) {
      exchange.expect(j);
      multiply(j);
    }
    // While the parts are on their way: what the next step needs, what the one before leaves.
    fetch(j + 1);
    if (j > start) store(j - 1, before);
    ahead.wait();
    typename Cell::Prepared now[kCells];
#pragma unroll
    for (int i = 0; i < kCells; ++i)
      if (here(i))
        now[i] = cell.prepare(turn[i], cell.fetched(ahead, ahead.slot(j, i), turn[i], dy[i]));
    if (j > 0) exchange.receive(j, j - first_product);
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      before[i] = turn[i];
      if (!here(i)) continue;
      const int row = row_of(i);
      const Acc sum = j > 0 ? exchange.sum(j, i, row) : Acc(0);
      results[i] = cell.finish(j, turn[i], sum, now[i], dc[i], carry[i]);
      T* gates = reinterpret_cast<T*>(own + box * (kRows * kPitch) + first_own +
                                      (row - row_of(0)) * kPitch);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) gates[gate * kUnits] = results[i].next[gate];
    }
    // The next product reads these dgates; the parts just read, and the dgates before them, may be
    // overwritten.
    __syncthreads();
  }
  store(end - 1, before);
  if (Exchange::kCluster && end < walk.T())
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      if (!here(j)) continue;
      as<Acc>(d.cells)[at(sequence(j), H, unit)] = dc[j];
      as<Acc>(d.carry)[at(sequence(j), H, unit)] = carry[j];
    }
  exchange.close();
#endif
}

}  // namespace lstm_ext
