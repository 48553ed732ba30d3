// Forward, one launch for all steps on a cluster of blocks for each group of sequences: h travels
// through distributed shared memory, and there is no barrier wider than a block. A launch may do a
// part of the steps: it goes on from the h in y and the c that the launch before has left.
//
// Each block keeps its slice's rows of W_hh in registers and shared memory, the c of its units in
// registers, and h of all units in shared memory, where its peers write their part of the next
// (st.async). A step waits for the bytes of h, multiplies, sums up over the warps that share k, and
// sends.
#pragma once

#include "cuda/cluster_block.cuh"

namespace lstm_ext {

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
  Steps steps = args.steps;
  steps.reverse = d.reverse;
  const int H = args.H, K = args.K;
  const int first = args.shape.first, last = args.shape.last;
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();

  // [2][kRows][pitch]: h as the i-th step finds it lies in [i % 2].
  const int pitch = int(shared_row(K * sizeof(T))), box_bytes = kRows * pitch;
  unsigned char* const states = memory + kBarrierBytes;
  Acc* const partial = reinterpret_cast<Acc*>(states + 2 * box_bytes);

  // The state before the launch's first step: a warp per sequence. What nobody sends stays zero.
  for (int at_box = threadIdx.x; at_box < 2 * box_bytes / 16; at_box += kThreads)
    reinterpret_cast<uint4*>(states)[at_box] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int row = threadIdx.x / 32; row < place.rows(); row += kWarps) {
    const int b = place.row_first + row;
    if (resets(steps, steps.step_at(first), b)) continue;
    const T* h = as<T>(d.h0) + at(b, H, 0);
    if (first > 0)  // h0 for a sequence that has not begun; one that has ended reads it in vain
      if (const int64_t before = steps.step_at(first - 1); steps.active(before, b))
        h = as<T>(d.y) + steps.row(before, b) * d.y_stride;
    for (int k = threadIdx.x % 32; k < H; k += 32)
      reinterpret_cast<T*>(states + first % 2 * box_bytes + row * pitch)[k] =
          Arithmetic::round_state(h[k]);
  }

  const Cell cell(args, d, steps, unit);
  const auto sequence = [&](int j) { return place.row_first + Sum::sequence(0, j); };
  const auto here = [&](int j) {
    return Sum::has_cell(j) && sequence(j) < place.row_end && unit < H;
  };
  Acc c[kCells];
#pragma unroll
  for (int j = 0; j < kCells; ++j) {
    c[j] = 0;
    if (!here(j)) continue;
    const int b = sequence(j);
    c[j] = first > 0 ? as<Acc>(d.cells)[at(b, H, unit)] : cell.first_c(b);
  }
  if (steps.lengths)
    for (int j = 0; j < kCells; ++j) {
      if (!here(j) || steps.lengths[sequence(j)]) continue;
      const int64_t result = at(sequence(j), H, unit);  // of a sequence without a step
      as<T>(d.h_n)[result] = as<T>(d.h0)[result];
      as<T>(d.c_n)[result] = as<T>(d.c0)[result];
    }
  const Weights<Arithmetic, GateRows, kMTiles, kHeld, kMWarps> weights(
      as<T>(d.w_hh), H, K, unit_first, args.shape.shared,
      reinterpret_cast<unsigned char*>(partial + Sum::kCells * 4 * (kWarps / kMWarps)));
  const int part = pinned(Sum::part());
  mailboxes.open();

  const int bytes = place.rows() * ((H + kVector - 1) / kVector) * 16;
  for (int i = first; i < last; ++i) {
    const bool goes_on = i + 1 < last;
    const int64_t t = steps.step_at(i);
    const int box = i % 2, next = (i + 1) % 2;
    const unsigned char* state = states + box * box_bytes;
    typename Cell::Operands in[kCells];
#pragma unroll
    for (int j = 0; j < kCells; ++j)
      in[j] = here(j) ? cell.load(i, t, sequence(j), c[j]) : typename Cell::Operands{};
    if (i > first) mailboxes.wait(box, (i - first - 1) / 2);
    if (goes_on) mailboxes.expect(next, bytes);

    Acc sums[kMTiles][kNTiles][4];
    weights.template multiply<kNTiles>(
        StateInShared{reinterpret_cast<const uint4*>(state), uint32_t(pitch / 16)}, 0, kRows - 1,
        sums);
    // The partial sums of the step before have been taken: whoever took some has sent its h since,
    // and this block has waited for that.
    Sum::put(partial, sums, 0);
    __syncthreads();  // all warps' parts are there, and nobody reads this state any more
    typename Cell::Result results[kCells];
    // First what peers wait for, then what is kept.
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      const int b = sequence(j), row = Sum::sequence(0, j);
      results[j] = {};
      if (here(j)) {
        Acc sum[4];
        Sum::take(partial, sum, Sum::part(j, part));
        results[j] = cell.compute(t, b, sum, in[j], c[j], [&] {
          return reinterpret_cast<const T*>(state + row * pitch)[unit];
        });
      }
      if (goes_on) {
        const uint4 vector = gather_lanes(results[j].next);
        __syncwarp();  // the lane that sends speaks for the reads of those it has gathered from
        if (Sum::has_cell(j) && b < place.row_end && unit / kVector * kVector < H) {
          const shared_addr to =
              shared_address(states + next * box_bytes + row * pitch + unit / kVector * 16);
#pragma unroll
          for (int from = 0; from < kMostBlocksOfCluster; from += kVector)
            if (const int peer = from + unit % kVector; peer < place.slices)
              mailboxes.send(peer, next, to, vector);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kCells; ++j)
      if (here(j)) cell.store(t, sequence(j), in[j], results[j], c[j]);
  }
  if (last < steps.T)
#pragma unroll
    for (int j = 0; j < kCells; ++j)
      if (here(j)) as<Acc>(d.cells)[at(sequence(j), H, unit)] = c[j];
  mailboxes.close();
#endif
}

}  // namespace lstm_ext
