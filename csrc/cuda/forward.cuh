// Forward: gates = gx + h W_hh^T, the cell, and what is kept of it. One kernel for both families:
// launched for one step it is "step", launched for all of them, cooperatively and with weights
// that stay, it is "grid".
#pragma once

#include "cuda/forward_cells.cuh"

namespace lstm_ext {

// The hidden units of one slice, for the sequences of one group, over the steps of the launch.
template <class Arithmetic, int kMTiles, int kNTiles, int kHeld, bool kVariants>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kMTiles* kNTiles <= 2, kHeld, kVariants))
    forward_cell(const __grid_constant__ ForwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Sum = Reduction<Arithmetic, GateRows, kMTiles, kNTiles>;
  constexpr int kPartialBytes = partial_bytes(kMTiles, Sum::kUnits, kNTiles, sizeof(Acc));
  constexpr bool kFetches =
      kLoadsAsync && can_fetch(kMTiles, Sum::kRounds, sizeof(Acc), kVariants, false);

  DYNAMIC_SHARED(memory);
  Acc* partial = reinterpret_cast<Acc*>(memory);
  unsigned char* const fetched = memory + kPartialBytes;
  const BlockPlace place(args.shape, args.steps.B);
  const ForwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int H = args.H, K = args.K, B = walk.B();
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();
  const auto here = [&](int b) { return Sum::has_cell() && b < place.row_end && unit < H; };

  using Cell = ForwardUnit<Arithmetic, kVariants>;
  const Cell cell(args, d, walk, unit);
  FetchedWords<kForwardWords> words(fetched, threadIdx.x);
  // Asks for the words of a tile's cells, a slot a round.
  const bool fetches = kFetches && args.shape.fetches;
  const auto fetch = [&](int i, int tile) {
    if constexpr (kFetches) {
      if (!fetches) return;
      const int t = walk.step_at(i);
#pragma unroll
      for (int round = 0; round < Sum::kRounds; ++round) {
        const int b = tile + Sum::sequence(round);
        if (here(b) && walk.active(t, b)) cell.fetch(words, round, walk.turn(t, b));
      }
      async_commit();
    }
  };
  fetch(args.shape.first, place.row_first);

  constexpr bool kStreams =
      !kVariants && streams_ahead(kForwardTensorTiles, kMTiles, kNTiles, kHeld);
  Weights<Arithmetic, GateRows, kMTiles, kHeld, 1, kStreams> weights(
      as<T>(d.w_hh), H, K, unit_first, args.shape.shared,
      fetched + (fetches ? fetched_bytes(Sum::kRounds, false) : 0), args.shape.ahead,
      args.shape.in_l2);
  GroupBarrier barrier(d.counters, args.shape, place);

  // What else a cell needs besides the product, and gx where it is not fetched, is on its way while
  // that runs, but where a large tile's sums take the registers.
  constexpr bool kAhead = Sum::kRounds <= 2;
  struct Operands : Cell::Operands {
    Turn turn;
  };
  const auto load = [&](int i, int b) {
    if (!here(b)) return Operands{};
    const int length = walk.length(b);
    const Turn turn = walk.turn(walk.step_at(i), b, length);
    const bool reset_follows = i + 1 < walk.T() && walk.resets(walk.step_at(i + 1), b, length);
    const Acc c = i == 0 ? cell.first_c(b) : as<Acc>(d.cells)[at(b, H, unit)];
    return Operands{cell.load(turn, c, reset_follows, fetches), turn};
  };
  // What a round made for its cell. The other blocks wait for all that this one has written before
  // it arrives at the barrier: where there are registers, the last tile's is kept after that, and
  // that of a tile before while its successor's sums come together.
  constexpr bool kLate = kHeld > 0 && Sum::kRounds == 1;
  struct Made {
    typename Cell::Result result;
    Turn turn;
    Acc c;
    bool any;
  };
  const auto make = [&](int i, int b, const Acc(&sum)[4], const Operands& in, const T* state,
                        T* next) {
    Made made = {};
    if (kVariants && d.product) {
      for (int gate = 0; gate < 4; ++gate)
        as<Acc>(d.product)[at(b, 4 * H, gate * H + unit)] = sum[gate];
      return made;
    }
    made.turn = in.turn;
    made.any = true;
    made.result = cell.compute(in.turn, sum, in, made.c, [&] { return state[at(b, K, unit)]; });
    if (!d.hidden && i + 1 < walk.T()) next[at(b, K, unit)] = made.result.next;
    return made;
  };
  const auto keep = [&](const Made& made) {
    if (!made.any) return;
    cell.store(made.turn, made.result, made.c);
    as<Acc>(d.cells)[at(made.turn.b, H, unit)] = made.c;
  };

  for (int i = args.shape.first; i < args.shape.last; ++i) {
    const T* state = as<T>(d.state) + int64_t(i % 2) * B * K;
    T* next = as<T>(d.state) + int64_t((i + 1) % 2) * B * K;
    Operands in = {};
    Made made = {};
    if (kAhead) in = load(i, place.row_first + Sum::sequence(0));
    if (i > args.shape.first) barrier.wait();
    for (int tile = place.row_first; tile < place.row_end; tile += 8 * kNTiles) {
      if (tile > place.row_first) fetch(i, tile);
      Acc sums[kMTiles][kNTiles][4];
      weights.template multiply<kNTiles>(StateInL2<T>{state}, tile, place.row_end - 1, sums);
#pragma unroll
      for (int round = 0; round < Sum::kRounds; ++round) {
        const int b = tile + Sum::sequence(round);
        // Every thread has taken the sums of the round before.
        if (round > 0 || tile > place.row_first) __syncthreads();
        Sum::put(partial, sums, round);
        if (kLate) {
          keep(made);
          made.any = false;
        }
        Operands now = kAhead ? in : load(i, b);
        if (kFetches && round == 0 && fetches) weights.wait_for_others();
        __syncthreads();  // all warps' parts are there
        if (kAhead && round + 1 < Sum::kRounds)
          in = load(i, tile + Sum::sequence(round + 1));
        else if (kAhead && tile + 8 * kNTiles < place.row_end)
          in = load(i, tile + 8 * kNTiles + Sum::sequence(0));
        if (here(b)) {
          Acc sum[4];
          Sum::take(partial, sum);
          if constexpr (kFetches)
            if (fetches) cell.fetched(words, round, now);
          if constexpr (kLate)
            made = make(i, b, sum, now, state, next);
          else
            keep(make(i, b, sum, now, state, next));
        }
      }
    }
    if (i + 1 < args.shape.last) {
      barrier.arrive();
      fetch(i + 1, place.row_first);  // not before: its fence may wait for what is on its way
      weights.arrived();
    }
    if (kLate) keep(made);
  }
  weights.stop();
}

// The projection of one step: r = hidden W_hr^T for the outputs of one slice. Step family only.
template <class Arithmetic, int kMTiles, int kNTiles>
__global__ void __launch_bounds__(kThreads, 1)
    forward_projection(const __grid_constant__ ForwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Sum = Reduction<Arithmetic, PlainRows, kMTiles, kNTiles>;

  DYNAMIC_SHARED(memory);
  Acc* partial = reinterpret_cast<Acc*>(memory);
  const BlockPlace place(args.shape, args.steps.B);
  const ForwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int P = args.P, K = args.K, B = walk.B(), i = args.shape.first;
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();
  Weights<Arithmetic, PlainRows, kMTiles, 0> weights(as<T>(d.w_hr), P, args.hidden_K, unit_first, 0,
                                                     nullptr);
  const int t = walk.step_at(i), following = i + 1 < walk.T() ? walk.step_at(i + 1) : -1;
  const T* state = as<T>(d.state) + int64_t(i % 2) * B * K;
  T* next = as<T>(d.state) + int64_t((i + 1) % 2) * B * K;
  const int tile = place.row_first;  // a group is one tile here
  Acc sums[kMTiles][kNTiles][4];
  weights.template multiply<kNTiles>(StateInL2<T>{as<T>(d.hidden)}, tile, place.row_end - 1, sums);
#pragma unroll
  for (int round = 0; round < Sum::kRounds; ++round) {
    const int b = tile + Sum::sequence(round);
    if (round > 0) __syncthreads();
    Sum::put(partial, sums, round);
    __syncthreads();
    if (!Sum::has_cell() || b >= place.row_end || unit >= P) continue;
    Acc sum[1];
    Sum::take(partial, sum);
    const Turn turn = walk.turn(t, b);
    const T out =
        turn.active ? zoned_out_h<T>(d, walk, turn, P, unit, sum[0]) : from_acc<T>(Acc(0));
    if (turn.active || !walk.packed()) as<T>(d.y)[turn.row * d.y_stride + unit] = out;
    if (turn.active && turn.last) as<T>(d.h_n)[at(b, P, unit)] = out;
    if (following < 0) continue;
    T& to = next[at(b, K, unit)];
    if (walk.resets(following, b))
      to = from_acc<T>(Acc(0));
    else
      to = turn.active ? product_input<Arithmetic>(d.variants, b, P, unit, out)
                       : state[at(b, K, unit)];
  }
}

// Before the first step: the state, the zeros past its end, the barriers, and the results of
// sequences without a step.
template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, 1)
    forward_prepare(const __grid_constant__ ForwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  const T zero = from_acc<T>(Acc(0));
  const int64_t B = args.steps.B, H = args.H, P = args.P, K = args.K;
  const ForwardArgs::Direction& d = args.direction[blockIdx.y];
  const Walk walk(args.steps, d.reverse);
  const int64_t start = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t at = start; at < args.counter_words; at += stride) d.counters[at] = 0;
  // A warp per sequence.
  for (int64_t b = start / 32; b < B; b += stride / 32) {
    const int lane = threadIdx.x % 32;
    const bool starts_at_zero = !d.h0 || (walk.T() && walk.resets(walk.step_at(0), int(b)));
    for (int64_t k = lane; k < K; k += 32) {
      const T h = k < P && !starts_at_zero ? as<T>(d.h0)[b * P + k] : zero;
      as<T>(d.state)[b * K + k] =
          k < P ? product_input<Arithmetic>(d.variants, int(b), int(P), int(k), h) : zero;
      as<T>(d.state)[(B + b) * K + k] = zero;
    }
    if (d.hidden)
      for (int64_t k = lane; k < args.hidden_K; k += 32)
        as<T>(d.hidden)[b * args.hidden_K + k] = zero;
    if (walk.length(int(b))) continue;
    for (int64_t k = lane; k < P; k += 32)
      as<T>(d.h_n)[b * P + k] = d.h0 ? as<T>(d.h0)[b * P + k] : zero;
    for (int64_t k = lane; k < H; k += 32)
      as<T>(d.c_n)[b * H + k] = d.c0 ? as<T>(d.c0)[b * H + k] : zero;
  }
}

}  // namespace lstm_ext
