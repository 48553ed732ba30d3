// Forward, one launch for all steps on blocks that keep all of W_hh, several for each group of
// sequences: there is no barrier wider than a block. The blocks of a group are a cluster, whose h
// travels through distributed shared memory, or (family tagged) any blocks of the grid, whose h
// travels through L2. A cluster's launch may do a part of the steps: it goes on from the h in y and
// the c that the launch before has left.
//
// Each block keeps its slice's rows of W_hh in registers and shared memory, the c of its units in
// registers, and h of all units in shared memory. A step waits for h, multiplies, sums up over the
// warps that share k, and sends its units' next h to its peers.
#pragma once

#include "cuda/forward_cells.cuh"
#include "cuda/forward_exchange.cuh"

namespace lstm_ext {

// kMTiles: of a warp; kMWarps warps have different rows. Exchange: of forward_exchange.cuh.
template <class Exchange, class Arithmetic, int kMTiles, int kMWarps, int kNTiles, int kHeld>
__global__ void __launch_bounds__(kThreads, 1)
    forward_resident(const __grid_constant__ ForwardArgs args) {
#ifdef LSTM_EXT_CLUSTERS
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Sum = Reduction<Arithmetic, GateRows, kMTiles, kNTiles, kMWarps, kNTiles>;
  using Cell = ForwardUnit<Arithmetic, false, false>;
  constexpr Tile kTile = {kMTiles * kMWarps, kNTiles, kHeld};
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kCells = cluster_cells(Sum::kUnits, cluster_rows(kTile, false));
  static_assert(Sum::kUnits % kVector == 0, "a vector's units belong to one block");
  static_assert(sizeof(Acc) == 4, "16-bit and TF32 only");

  DYNAMIC_SHARED(memory);
  const typename Exchange::Place place(args.shape, int(args.steps.B));
  if constexpr (Exchange::kCluster)
    if (place.slice >= place.slices) return Mailboxes::stand_by(memory);  // no units left for it
  const ForwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int H = args.H, K = args.K, slices = place.slices;
  const int first = Exchange::kCluster ? args.shape.first : 0;
  const int last = Exchange::kCluster ? args.shape.last : walk.T();
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();

  const int state_rows = lstm_ext::state_rows(args.shape.group_rows);
  const StateBoxes boxes = {
      memory + kBarrierBytes,
      int(forward_box_bytes(kTile, slices, state_rows, K * int64_t(sizeof(T)), sizeof(T))),
      int(forward_slice_bytes(kTile, state_rows, sizeof(T))), state_rows};
  unsigned char* const fetched = boxes.end();
  Acc* const partial = reinterpret_cast<Acc*>(fetched + ahead_bytes(kForwardWords, kCells));
  const auto place_of = [&](int k, int row) {  // in elements
    return StateInShared::place(k / kVector, row, state_rows) * kVector + k % kVector;
  };

  // The state before the launch's first step: a warp per sequence. What nobody sends stays zero.
  for (int v = threadIdx.x; v < int(boxes.end() - boxes.states) / 16; v += kThreads)
    reinterpret_cast<uint4*>(boxes.states)[v] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int row = threadIdx.x / 32; row < place.rows(); row += kWarps) {
    const int b = place.row_first + row;
    if (walk.resets(walk.step_at(first), b)) continue;
    const T* h = moved(as<T>(d.h0), at(b, H, 0));
    if (first > 0)  // h0 for a sequence that has not begun; one that has ended reads it in vain
      if (const int before = walk.step_at(first - 1); walk.active(before, b))
        h = as<T>(d.y) + walk.row(before, b) * d.y_stride;
    if (!h) continue;
    T* const state = reinterpret_cast<T*>(boxes.state(first));
    for (int k = threadIdx.x % 32; k < H; k += 32)
      state[place_of(k, row)] = Arithmetic::round_state(h[k]);
  }

  const Cell cell(args, d, walk, unit);
  const auto row_of = [&](int j) { return Sum::sequence(0, j); };
  const auto sequence = [&](int j) { return place.row_first + row_of(j); };
  const auto here = [&](int j) {
    return Sum::has_cell(j) && sequence(j) < place.row_end && unit < H;
  };
  Ahead<kForwardWords, kCells> ahead(fetched, threadIdx.x);
  const auto fetch = [&](int i, const Turn(&of)[kCells]) {
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      // What comes after this launch may not be there yet.
      if (!here(j) || !of[j].active || i >= last) continue;
      cell.fetch(ahead, ahead.slot(i, j), of[j]);
    }
    ahead.close();
  };
  Acc c[kCells];
  Course course[kCells];
  Turn turn[kCells];
#pragma unroll
  for (int j = 0; j < kCells; ++j) {
    c[j] = 0;
    turn[j] = {};
    if (!here(j)) continue;
    const int b = sequence(j);
    c[j] = first > 0 ? as<Acc>(d.cells)[at(b, H, unit)] : cell.first_c(b);
    const int length = walk.length(b);
    course[j] = {walk, b, length};
    turn[j] = course[j].turn(walk, first, walk.first_row(walk.step_at(first)));
    if (length) continue;
    const int64_t result = at(b, H, unit);  // of a sequence without a step
    as<T>(d.h_n)[result] = from_acc<T>(at_or_zero(as<T>(d.h0), result));
    as<T>(d.c_n)[result] = from_acc<T>(at_or_zero(as<T>(d.c0), result));
  }
  fetch(first, turn);
  Weights<Arithmetic, GateRows, kMTiles, kHeld, kMWarps> weights(
      as<T>(d.w_hh), H, K, unit_first, args.shape.shared,
      reinterpret_cast<unsigned char*>(partial + Sum::kCells * 4 * (kWarps / kMWarps)));
  const int part = pinned(Sum::part());

  Exchange exchange(memory, d, place, boxes, H);
  // Of a cell, as exchange.put() wants it.
  const int start = exchange.first_element(place);
  const int first_cell = pinned(place_of(unit, row_of(0)) - start);
  const auto cell_place = [&](int j) { return j ? place_of(unit, row_of(j)) - start : first_cell; };
  exchange.open();

  // First rows of the next step and, a step ahead, of the one after it: a packed batch reads them.
  unsigned next_rows = walk.first_row_beside<true>(walk.first_row(walk.step_at(first)), first + 1);
  for (int i = first; i < last; ++i) {
    const bool goes_on = i + 1 < last;
    const uint4* state = reinterpret_cast<const uint4*>(boxes.state(i));
    Turn following[kCells];
    const unsigned rows = next_rows;
    next_rows = walk.first_row_beside<true>(rows, i + 2);
#pragma unroll
    for (int j = 0; j < kCells; ++j) following[j] = course[j].turn(walk, i + 1, rows);
    fetch(i + 1, following);
    if (i > first) exchange.receive(i, i - first - 1);
    if (goes_on) exchange.expect(i + 1);

    Acc sums[kMTiles][kNTiles][4];
    weights.template multiply<kNTiles>(StateInShared{state, state_rows}, 0, 8 * kNTiles - 1, sums);
    // The partial sums of the step before have been taken: whoever took some has sent its h since,
    // and this block has waited for that.
    Sum::put(partial, sums, 0);
    ahead.wait();
    __syncthreads();  // all warps' parts are there, and nobody reads this state any more
    typename Cell::Result results[kCells];
    // First what peers wait for, then what is kept.
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      results[j] = {};
      if (!here(j)) {
        if (!Exchange::kCluster && goes_on && Sum::has_cell(j) && sequence(j) < place.row_end)
          exchange.put(i + 1, cell_place(j), from_acc<T>(Acc(0)));
        continue;
      }
      typename Cell::Operands in;
      cell.fetched(ahead, ahead.slot(i, j), in);
      in.c = turn[j].reset ? Acc(0) : c[j];
      in.reset_follows = following[j].reset;
      Acc sum[4];
      Sum::take(partial, sum, Sum::part(j, part));
      results[j] = cell.compute(turn[j], sum, in, c[j], [&] {
        return reinterpret_cast<const T*>(state)[place_of(unit, row_of(j))];
      });
      if (goes_on) exchange.put(i + 1, cell_place(j), results[j].next);
    }
    if (goes_on) exchange.send(i + 1);
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      if (here(j)) cell.store(turn[j], results[j], c[j]);
      turn[j] = following[j];
    }
  }
  if (last < walk.T())
#pragma unroll
    for (int j = 0; j < kCells; ++j)
      if (here(j)) as<Acc>(d.cells)[at(sequence(j), H, unit)] = c[j];
  exchange.close();
#endif
}

}  // namespace lstm_ext
