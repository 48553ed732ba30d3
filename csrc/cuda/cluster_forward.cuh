// Forward, one launch for all steps on a cluster of blocks for each group of sequences: h travels
// through distributed shared memory, and there is no barrier wider than a block.
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
  const int H = args.H, K = args.K, B = int(steps.B);
  const int first = args.shape.first, last = args.shape.last;
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();

  // [2][kRows][pitch]: h as the i-th step finds it lies in [i % 2].
  const int pitch = int(shared_row(K * sizeof(T))), box_bytes = kRows * pitch;
  unsigned char* const states = memory + kBarrierBytes;
  Acc* const partial = reinterpret_cast<Acc*>(states + 2 * box_bytes);
  const Weights<Arithmetic, GateRows, kMTiles, kHeld, kMWarps> weights(
      as<T>(d.w_hh), H, K, unit_first, args.shape.shared,
      reinterpret_cast<unsigned char*>(partial + Sum::kCells * 4 * (kWarps / kMWarps)));
  const Cell cell(args, d, steps, unit);

  // The state before the first step; what nobody sends stays zero.
  for (int v = threadIdx.x; v < 2 * box_bytes / 16; v += kThreads) {
    const int box = v / (box_bytes / 16), at_row = v % (box_bytes / 16);
    const int b = at_row / (pitch / 16), k = at_row % (pitch / 16);
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (box == first % 2 && b < place.rows() && k * kVector < K)
      bits = reinterpret_cast<const uint4*>(as<T>(d.state) +
                                            (int64_t(box) * B + place.row_first + b) * K)[k];
    reinterpret_cast<uint4*>(states)[v] = bits;
  }
  const auto sequence = [&](int j) { return place.row_first + Sum::sequence(0, j); };
  const auto here = [&](int j) {
    return Sum::has_cell(j) && sequence(j) < place.row_end && unit < H;
  };
  Acc c[kCells];
#pragma unroll
  for (int j = 0; j < kCells; ++j)
    c[j] = !here(j)     ? Acc(0)
           : first == 0 ? cell.first_c(sequence(j))
                        : as<Acc>(d.cells)[at(sequence(j), H, unit)];
  mailboxes.open();

  const int bytes = place.rows() * ((H + kVector - 1) / kVector) * 16;
  for (int i = first; i < last; ++i) {
    const int64_t t = steps.step_at(i);
    const int box = i % 2, next = (i + 1) % 2;
    const unsigned char* state = states + box * box_bytes;
    typename Cell::Operands in[kCells];
#pragma unroll
    for (int j = 0; j < kCells; ++j)
      in[j] = here(j) ? cell.load(t, sequence(j), c[j]) : typename Cell::Operands{};
    if (i > first) mailboxes.wait(box, (i - first - 1) / 2);
    if (i + 1 < last) mailboxes.expect(next, bytes);

    Acc sums[kMTiles][kNTiles][4];
    weights.template multiply<kNTiles>(
        StateInShared{reinterpret_cast<const uint4*>(state), uint32_t(pitch / 16)}, 0, kRows - 1,
        sums);
    // The partial sums of the step before have been taken: whoever took some has sent its h since,
    // and this block has waited for that.
    Sum::put(partial, sums, 0);
    __syncthreads();  // all warps' parts are there, and nobody reads this state any more
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      const int b = sequence(j), row = Sum::sequence(0, j);
      T h = from_acc<T>(Acc(0));
      if (here(j)) {
        Acc sum[4];
        Sum::take(partial, sum, j);
        h = cell.step(i, t, b, sum, in[j], c[j],
                      [&] { return reinterpret_cast<const T*>(state + row * pitch)[unit]; });
      }
      if (i + 1 < last) {
        const uint4 vector = gather_lanes(h);
        if (!Sum::has_cell(j) || b >= place.row_end || unit / kVector * kVector >= H) continue;
        const shared_addr to =
            shared_address(states + next * box_bytes + row * pitch + unit / kVector * 16);
        for (int peer = unit % kVector; peer < place.slices; peer += kVector)
          mailboxes.send(peer, next, to, vector);
      } else if (last < steps.T && here(j)) {  // another launch goes on
        as<T>(d.state)[at(int64_t(next) * B + b, K, unit)] = h;
        as<Acc>(d.cells)[at(b, H, unit)] = c[j];
      }
    }
  }
  mailboxes.close();
#endif
}

}  // namespace lstm_ext
