// Backward through time: dh = dy + dgates W_hh of the step after, the cell's derivative, dgates.
// Weight gradients are products over all steps, made afterwards by a library. As in forward, one
// kernel serves both families.
//
// The j-th step taken here is the (T - 1 - j)-th of forward; step T is the one product more that
// makes dh0.
#pragma once

#include "cuda/backward_cells.cuh"

namespace lstm_ext {

// The hidden units of one slice, for the sequences of one group, over the steps of the launch.
template <class Arithmetic, int kMTiles, int kNTiles, int kHeld, bool kVariants>
__global__ void __launch_bounds__(kThreads,
                                  blocks_at_once(kMTiles == 1 && kNTiles <= 2, kHeld, kVariants))
    backward_cell(const __grid_constant__ BackwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Sum = Reduction<Arithmetic, PlainRows, kMTiles, kNTiles>;
  constexpr int kPartialBytes = partial_bytes(kMTiles, Sum::kUnits, kNTiles, sizeof(Acc));
  constexpr bool kFetches =
      kLoadsAsync && can_fetch(kMTiles, Sum::kRounds, sizeof(Acc), kVariants, true);

  DYNAMIC_SHARED(memory);
  Acc* partial = reinterpret_cast<Acc*>(memory);
  unsigned char* const fetched = memory + kPartialBytes;
  const BlockPlace place(args.shape, args.steps.B);
  const BackwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int H = args.H, K = args.K, B = walk.B();
  // With a projection the gradient of h comes whole from the step's other kernel.
  const bool projected = d.hidden;
  const int product_K = projected ? args.hidden_K : K;
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();
  const auto here = [&](int b) { return Sum::has_cell() && b < place.row_end && unit < H; };

  using Cell = BackwardUnit<Arithmetic, kVariants>;
  const Cell cell(args, d, walk, unit);
  // As in forward_cell.
  FetchedWords<kBackwardWords> words(fetched, threadIdx.x);
  const auto fetch = [&](int j, int tile) {
    if constexpr (kFetches) {
#pragma unroll
      for (int round = 0; round < Sum::kRounds; ++round) {
        const int b = tile + Sum::sequence(round);
        if (!here(b)) continue;
        const Turn turn = turn_back(walk, j, b);
        if (turn.active) cell.fetch(words, round, turn, turn.first ? 0 : walk.row_before(turn));
      }
      async_commit();
    }
  };
  fetch(args.shape.first, place.row_first);

  constexpr bool kStreams =
      !kVariants && streams_ahead(kBackwardTensorTiles, kMTiles, kNTiles, kHeld);
  Weights<Arithmetic, PlainRows, kMTiles, kHeld, 1, kStreams> weights(
      as<T>(projected ? d.w_hr : d.w_hh), H, product_K, unit_first, args.shape.shared,
      fetched + (kFetches ? fetched_bytes(Sum::kRounds, true) : 0), args.shape.ahead,
      args.shape.in_l2);
  GroupBarrier barrier(d.counters, args.shape, place);

  // As in forward_cell.
  constexpr bool kAhead = !kFetches && Sum::kRounds <= 4;
  struct Operands : Cell::Operands {
    Turn turn;
    Acc dc;
  };
  const auto dc_before = [&](int j, int b) {
    return j == 0 ? cell.first_dc(b) : as<Acc>(d.cells)[at(b, H, unit)];
  };
  const auto load = [&](int j, int b) {
    if (!here(b)) return Operands{};
    const Turn turn = turn_back(walk, j, b);
    return Operands{cell.load(turn), turn, dc_before(j, b)};
  };
  // dy of a tile has elements of 2 bytes, which cannot be fetched so.
  T dy[Sum::kRounds] = {};
  const auto load_dy = [&](int j, int tile) {
#pragma unroll
    for (int round = 0; round < Sum::kRounds; ++round) {
      const int b = tile + Sum::sequence(round);
      const Turn turn = here(b) ? turn_back(walk, j, b) : Turn{};
      dy[round] = cell.dy_ahead(turn, turn.active);
    }
  };
  // As in forward_cell.
  constexpr bool kLate = kHeld > 0 && Sum::kRounds == 1;
  struct Made {
    typename Cell::Result result;
    Turn turn;
    Acc dc, carry;
    bool any;
  };
  const bool carried = carries<kVariants>(d, walk) && !projected;
  const auto make = [&](int j, int b, Acc product, const Operands& in, T* out) {
    Made made = {};
    if (kVariants && d.product) {
      as<Acc>(d.product)[at(b, 6 * H, unit)] = product;
      return made;
    }
    made.turn = in.turn;
    made.dc = in.dc;
    made.any = true;
    if (carried && j > 0) made.carry = as<Acc>(d.carry)[at(b, H, unit)];
    made.result = cell.compute(j, in.turn, product, in, made.dc, made.carry);
    if (j == walk.T()) return made;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) out[at(b, K, gate * H + unit)] = made.result.next[gate];
    return made;
  };
  const auto keep = [&](int j, const Made& made) {
    if (!made.any) return;
    cell.store(j, made.turn, made.result);
    if (carried) as<Acc>(d.carry)[at(made.turn.b, H, unit)] = made.carry;
    if (j < walk.T()) as<Acc>(d.cells)[at(made.turn.b, H, unit)] = made.dc;
  };

  for (int j = args.shape.first; j < args.shape.last; ++j) {
    T* out = as<T>(d.state) + int64_t(j % 2) * B * K;
    const T* state = projected ? as<T>(d.hidden) : as<T>(d.state) + int64_t((j + 1) % 2) * B * K;
    Operands in = {};
    Made made = {};
    if (kAhead) in = load(j, place.row_first + Sum::sequence(0));
    if (j > args.shape.first) barrier.wait();
    for (int tile = place.row_first; tile < place.row_end; tile += 8 * kNTiles) {
      if (tile > place.row_first) fetch(j, tile);
      if (kFetches) load_dy(j, tile);
      Acc sums[kMTiles][kNTiles][4] = {};
      if (projected || j > 0)
        weights.template multiply<kNTiles>(StateInL2<T>{state}, tile, place.row_end - 1, sums);
#pragma unroll
      for (int round = 0; round < Sum::kRounds; ++round) {
        const int b = tile + Sum::sequence(round);
        // Every thread has taken the sums of the round before.
        if (round > 0 || tile > place.row_first) __syncthreads();
        Sum::put(partial, sums, round);
        if (kLate) {
          keep(j, made);
          made.any = false;
        }
        Operands now = {};
        if (kAhead)
          now = in;
        else if (!kFetches)
          now = load(j, b);
        if (kFetches && here(b)) now.dc = dc_before(j, b);
        if (kFetches && round == 0) {
          if (projected || j > 0)
            weights.wait_for_others();
          else
            async_wait<0>();  // no product, so perhaps no weights were asked for since fetch()
        }
        __syncthreads();  // all warps' parts are there
        if (kAhead && round + 1 < Sum::kRounds)
          in = load(j, tile + Sum::sequence(round + 1));
        else if (kAhead && tile + 8 * kNTiles < place.row_end)
          in = load(j, tile + 8 * kNTiles + Sum::sequence(0));
        if (here(b)) {
          Acc sum[1];
          Sum::take(partial, sum);
          if constexpr (kFetches) {
            const Turn turn = turn_back(walk, j, b);
            now = {cell.fetched(words, round, turn, dy[round]), turn, now.dc};
          }
          if constexpr (kLate)
            made = make(j, b, sum[0], now, out);
          else
            keep(j, make(j, b, sum[0], now, out));
        }
      }
    }
    if (j + 1 < args.shape.last) {
      barrier.arrive();
      fetch(j + 1, place.row_first);
      weights.arrived();
    }
    if (kLate) keep(j, made);
  }
  weights.stop();
}

// The projection's part of one step: dr = dy + dgates W_hh of the step after. Step family only.
template <class Arithmetic, int kMTiles, int kNTiles>
__global__ void __launch_bounds__(kThreads, 1)
    backward_projection(const __grid_constant__ BackwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Sum = Reduction<Arithmetic, PlainRows, kMTiles, kNTiles>;

  DYNAMIC_SHARED(memory);
  Acc* partial = reinterpret_cast<Acc*>(memory);
  const BlockPlace place(args.shape, args.steps.B);
  const BackwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int P = args.P, K = args.K, B = walk.B(), j = args.shape.first;
  const int unit_first = place.slice * Sum::kUnits, unit = unit_first + Sum::unit();
  Weights<Arithmetic, PlainRows, kMTiles, 0> weights(as<T>(d.w_hh), P, K, unit_first, 0, nullptr);
  const bool final = j == walk.T();
  const T* state = as<T>(d.state) + int64_t((j + 1) % 2) * B * K;
  const int tile = place.row_first;  // a group is one tile here
  Acc sums[kMTiles][kNTiles][4] = {};
  if (j > 0) weights.template multiply<kNTiles>(StateInL2<T>{state}, tile, place.row_end - 1, sums);
#pragma unroll
  for (int round = 0; round < Sum::kRounds; ++round) {
    const int b = tile + Sum::sequence(round);
    if (round > 0) __syncthreads();
    Sum::put(partial, sums, round);
    __syncthreads();
    if (!Sum::has_cell() || b >= place.row_end || unit >= P) continue;
    Acc sum[1];
    Sum::take(partial, sum);
    const Turn turn = turn_back(walk, j, b);
    const bool carried = carries<true>(d, walk);
    Acc carry = carried && j > 0 ? as<Acc>(d.carry)[at(b, P, unit)] : Acc(0);
    const Acc dy =
        turn.active && d.dy ? to_acc(as<T>(d.dy)[turn.row * d.dy_stride + unit]) : Acc(0);
    const Acc dr = gradient_of_h<T, true>(d, walk, j, turn, P, unit, sum[0], dy, carry);
    if (carried) as<Acc>(d.carry)[at(b, P, unit)] = carry;
    if (final) {
      if (d.dh0) as<T>(d.dh0)[at(b, P, unit)] = from_acc<T>(dr);
      continue;
    }
    const T out = turn.active ? from_acc<T>(dr) : from_acc<T>(Acc(0));
    if (turn.active || !walk.packed()) as<T>(d.dr)[at(turn.row, P, unit)] = out;
    as<T>(d.hidden)[at(b, args.hidden_K, unit)] = Arithmetic::round_state(out);
  }
}

// Before the first step: the barriers, the zeros past the end of a row, and, if it is wanted, the h
// that each step started from.
template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, 1)
    backward_prepare(const __grid_constant__ BackwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  const T zero = from_acc<T>(Acc(0));
  const int64_t B = args.steps.B, P = args.P, K = args.K;
  const BackwardArgs::Direction& d = args.direction[blockIdx.y];
  const Walk walk(args.steps, d.reverse);
  const int64_t start = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t at = start; at < args.counter_words; at += stride) d.counters[at] = 0;
  const int64_t pad = K - 4 * args.H;
  for (int64_t b = start; b < 2 * B; b += stride)
    for (int64_t k = 0; k < pad; ++k) as<T>(d.state)[b * K + 4 * args.H + k] = zero;
  if (d.hidden)
    for (int64_t at = start; at < B * args.hidden_K; at += stride) as<T>(d.hidden)[at] = zero;
  if (!d.h_prev) return;
  // A warp per step and sequence.
  for (int64_t pair = start / 32; pair < args.steps.T * B; pair += stride / 32) {
    const int64_t b = pair % B;
    const Turn turn = walk.turn(int(pair / B), int(b));
    if (!turn.active && walk.packed()) continue;  // a packed batch has no row for it
    const T* from = nullptr;
    if (turn.active && !turn.reset) {
      if (turn.first)
        from = moved(as<T>(d.h0), b * P);
      else
        from = as<T>(d.y) + walk.row_before(turn) * d.y_stride;
    }
    T* to = as<T>(d.h_prev) + turn.row * P;
    const Acc* factors = as<Acc>(d.variants.h_dropout);
    for (int64_t p = threadIdx.x % 32; p < P; p += 32) {
      to[p] = from ? from[p] : zero;
      if (factors && from) to[p] = from_acc<T>(to_acc(from[p]) * factors[b * P + p]);
    }
  }
}

}  // namespace lstm_ext
