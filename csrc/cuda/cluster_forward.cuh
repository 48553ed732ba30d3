// Forward, one launch for all steps on a cluster of blocks for each group of sequences: h travels
// through distributed shared memory, and there is no barrier wider than a block. A launch may do a
// part of the steps: it goes on from the h in y and the c that the launch before has left.
//
// Each block keeps its slice's rows of W_hh in registers and shared memory, the c of its units in
// registers, and h of all units in shared memory, where its peers write their part of the next. A
// step waits for the bytes of h, multiplies, sums up over the warps that share k, and sends.
#pragma once

#include "cuda/cluster_block.cuh"

namespace lstm_ext {

// A step of up to so many messages of 16 bytes is sent by st.async, which then is as fast as bulk
// copies or faster: 875 cycles for 64 in a cluster of 16, 1180 for a copy to each peer.
constexpr int kMostMessages = 128;

// kMTiles: of a warp; kMWarps warps have different rows.
template <class Arithmetic, int kMTiles, int kMWarps, int kNTiles, int kHeld>
__global__ void __launch_bounds__(kThreads, 1)
    forward_cluster(const __grid_constant__ ForwardArgs args) {
#ifdef LSTM_EXT_CLUSTERS
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Sum = Reduction<Arithmetic, GateRows, kMTiles, kNTiles, kMWarps, kNTiles>;
  using Cell = ForwardUnit<Arithmetic>;
  constexpr int kRows = 8 * kNTiles, kVector = 16 / sizeof(T), kCells = Sum::kPerThread;
  using State = StateInShared<kRows>;
  // 16-byte vectors of a block's part of a sequence's h.
  constexpr int kSliceVectors = Sum::kUnits / kVector;
  constexpr int kSliceBytes = kSliceVectors * kRows * 16;
  static_assert(Sum::kUnits % kVector == 0, "a vector's units belong to one block");

  DYNAMIC_SHARED(memory);
  const ClusterPlace place(args.shape, int(args.steps.B));
  Mailboxes mailboxes(memory);
  if (place.slice >= place.slices) {  // no units left for it
    mailboxes.open();
    mailboxes.close();
    return;
  }
  const ForwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int H = args.H, K = args.K, slices = place.slices;
  const int first = args.shape.first, last = args.shape.last;
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();

  // [2] states of all units as StateInShared has them: h as the i-th step finds it lies in [i % 2].
  const int box_bytes = int(forward_box_bytes({kMTiles * kMWarps, kNTiles, kHeld}, slices,
                                              K * int64_t(sizeof(T)), sizeof(T)));
  unsigned char* const states = memory + kBarrierBytes;
  // [2] this block's part of it, likewise, until peers have it.
  unsigned char* const own = states + 2 * box_bytes;
  Acc* const partial = reinterpret_cast<Acc*>(own + 2 * kSliceBytes);

  // The state before the launch's first step: a warp per sequence. What nobody sends stays zero.
  for (int v = threadIdx.x; v < 2 * (box_bytes + kSliceBytes) / 16; v += kThreads)
    reinterpret_cast<uint4*>(states)[v] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int row = threadIdx.x / 32; row < place.rows(); row += kWarps) {
    const int b = place.row_first + row;
    if (walk.resets(walk.step_at(first), b)) continue;
    const T* h = moved(as<T>(d.h0), at(b, H, 0));
    if (first > 0)  // h0 for a sequence that has not begun; one that has ended reads it in vain
      if (const int before = walk.step_at(first - 1); walk.active(before, b))
        h = as<T>(d.y) + walk.row(before, b) * d.y_stride;
    if (!h) continue;
    uint4* const state = reinterpret_cast<uint4*>(states + first % 2 * box_bytes);
    for (int k = threadIdx.x % 32; k < H; k += 32)
      reinterpret_cast<T*>(state + State::place(k / kVector, row))[k % kVector] =
          Arithmetic::round_state(h[k]);
  }

  const Cell cell(args, d, walk, unit);
  const auto row_of = [&](int j) { return Sum::sequence(0, j); };
  const auto sequence = [&](int j) { return place.row_first + row_of(j); };
  const auto here = [&](int j) {
    return Sum::has_cell(j) && sequence(j) < place.row_end && unit < H;
  };
  Acc c[kCells];
  int length[kCells];
  Turn turn[kCells];
#pragma unroll
  for (int j = 0; j < kCells; ++j) {
    c[j] = 0;
    length[j] = 0;
    turn[j] = {};
    if (!here(j)) continue;
    const int b = sequence(j);
    c[j] = first > 0 ? as<Acc>(d.cells)[at(b, H, unit)] : cell.first_c(b);
    length[j] = walk.length(b);
    turn[j] = walk.turn(walk.step_at(first), b, length[j]);
    if (length[j]) continue;
    const int64_t result = at(b, H, unit);  // of a sequence without a step
    as<T>(d.h_n)[result] = from_acc<T>(at_or_zero(as<T>(d.h0), result));
    as<T>(d.c_n)[result] = from_acc<T>(at_or_zero(as<T>(d.c0), result));
  }
  const Weights<Arithmetic, GateRows, kMTiles, kHeld, kMWarps> weights(
      as<T>(d.w_hh), H, K, unit_first, args.shape.shared,
      reinterpret_cast<unsigned char*>(partial + Sum::kCells * 4 * (kWarps / kMWarps)));
  const int part = pinned(Sum::part());

  // Few messages: this thread has one of them at most, a vector of a sequence for a peer.
  const int messages = slices * kSliceVectors * place.rows();
  const bool by_message = messages <= kMostMessages;
  static_assert(kMostMessages <= kThreads, "a message a thread");
  int peer = peer_to_copy_to(slices), vector = 0, of_row = 0;
  if (by_message) {
    peer = int(threadIdx.x) % slices;
    vector = int(threadIdx.x) / slices % kSliceVectors;
    of_row = int(threadIdx.x) / (slices * kSliceVectors);
    if (of_row >= place.rows() || unit_first + vector * kVector >= H) peer = -1;
  }
  // place() is the same in every part, for their vectors come in fours or, where there are two of
  // them, the first parts' remainders by 4 count on.
  const int first_vector = place.slice * kSliceVectors;
  const int own_place =
      State::place(first_vector + vector, of_row) - first_vector * kRows;  // in `own`
  const Letter letter(mailboxes, peer < 0 ? 0 : peer,
                      states + (first_vector * kRows + (by_message ? own_place : 0)) * 16,
                      box_bytes);
  const int bytes = by_message ? place.rows() * ((H + kVector - 1) / kVector) * 16
                               : slices * kSliceBytes;
  // Where this thread's cells lie in `own`.
  const auto own_cell = [&](int j) {
    return (State::place(unit / kVector, row_of(j)) - first_vector * kRows) * kVector +
           unit % kVector;
  };
  const int first_own_cell = pinned(own_cell(0));
  mailboxes.open();

  for (int i = first; i < last; ++i) {
    const bool goes_on = i + 1 < last;
    const int box = i % 2, next = (i + 1) % 2;
    const uint4* state = reinterpret_cast<const uint4*>(states + box * box_bytes);
    Turn following[kCells];
    typename Cell::Operands in[kCells];
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      following[j] = {};
      in[j] = {};
      if (!here(j)) continue;
      if (i + 1 < walk.T())
        following[j] = walk.turn(walk.step_at(i + 1), sequence(j), length[j]);
      in[j] = cell.load(turn[j], c[j], following[j].reset);
    }
    if (i > first) mailboxes.wait(box, (i - first - 1) / 2);
    if (goes_on) mailboxes.expect(next, bytes);

    Acc sums[kMTiles][kNTiles][4];
    weights.template multiply<kNTiles>(State{state}, 0, kRows - 1, sums);
    // The partial sums of the step before have been taken: whoever took some has sent its h since,
    // and this block has waited for that.
    Sum::put(partial, sums, 0);
    __syncthreads();  // all warps' parts are there, and nobody reads this state any more
    typename Cell::Result results[kCells];
    // First what peers wait for, then what is kept.
    T* const next_own = reinterpret_cast<T*>(own + next * kSliceBytes);
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      results[j] = {};
      if (!here(j)) continue;
      Acc sum[4];
      Sum::take(partial, sum, Sum::part(j, part));
      results[j] = cell.compute(turn[j], sum, in[j], c[j], [&] {
        return reinterpret_cast<const T*>(state + State::place(unit / kVector, row_of(j)))
            [unit % kVector];
      });
      next_own[j ? own_cell(j) : first_own_cell] = results[j].next;
    }
    if (goes_on) {
      if (!by_message) copies_see();
      __syncthreads();  // all of this block's part is there
      const uint4* const from = reinterpret_cast<const uint4*>(next_own);
      if (peer >= 0 && by_message) letter.send(next, from[own_place]);
      if (peer >= 0 && !by_message) letter.copy(next, from, kSliceBytes);
    }
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
  mailboxes.close();
#endif
}

}  // namespace lstm_ext
