// Layer norm of the recurrence: a row of the product, or of c, needs sums over all its units, which
// no block of the cell's kernels has. There the product goes to memory, and these kernels take the
// step, a block a sequence. Families step and vendor only.
//
//   a = gx + gamma_hh * norm(product);  h = o * tanh(gamma_ch * norm(c) + beta_ch)
#pragma once

#include "cuda/backward_cells.cuh"
#include "cuda/forward_cells.cuh"

namespace lstm_ext {

// Sums of two values over the block, the same bits in every thread and every time. memory: two
// values a warp.
template <class Acc>
struct Pair {
  Acc first, second;
};
template <class Acc>
LSTM_EXT_DEVICE Pair<Acc> block_sums(Pair<Acc> mine, Acc* memory) {
  for (int bits = 16; bits; bits /= 2) {
    mine.first += __shfl_xor_sync(~0u, mine.first, bits);
    mine.second += __shfl_xor_sync(~0u, mine.second, bits);
  }
  __syncthreads();  // the sums before these have been read
  if (threadIdx.x % 32 == 0) {
    memory[threadIdx.x / 32 * 2] = mine.first;
    memory[threadIdx.x / 32 * 2 + 1] = mine.second;
  }
  __syncthreads();  // all warps' sums are there
  Pair<Acc> sum = {};
  for (int warp = 0; warp < kWarps; ++warp) {
    sum.first += memory[warp * 2];
    sum.second += memory[warp * 2 + 1];
  }
  return sum;
}
LSTM_EXT_DEVICE float square_root(float x) { return sqrtf(x); }
LSTM_EXT_DEVICE double square_root(double x) { return sqrt(x); }

// Mean and reciprocal standard deviation of count values, value(k) being the k-th: each thread asks
// for those of its own only. In two passes, since the difference of two sums would cancel.
template <class Acc>
struct RowMoments {
  Acc mean, rstd;

  template <class Value>
  LSTM_EXT_DEVICE RowMoments(int count, double epsilon, Acc* memory, Value value) {
    Acc sum = 0, squares = 0;
    for (int k = threadIdx.x; k < count; k += kThreads) sum += value(k);
    mean = block_sums(Pair<Acc>{sum, 0}, memory).first / Acc(count);
    for (int k = threadIdx.x; k < count; k += kThreads) {
      const Acc d = value(k) - mean;
      squares += d * d;
    }
    const Acc variance = block_sums(Pair<Acc>{squares, 0}, memory).first / Acc(count);
    rstd = Acc(1) / square_root(variance + Acc(epsilon));
  }
  LSTM_EXT_DEVICE Acc normalize(Acc x) const { return (x - mean) * rstd; }
};

template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, 1)
    forward_norm(const __grid_constant__ ForwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Cell = ForwardUnit<Arithmetic, true>;
  using CellMath = typename Cell::CellMath;

  DYNAMIC_SHARED(memory);
  Acc* sums = reinterpret_cast<Acc*>(memory);
  const ForwardArgs::Direction& d = args.direction[blockIdx.y];
  const Variants& v = d.variants;
  const Walk walk(args.steps, d.reverse);
  const int b = int(blockIdx.x), i = args.shape.first, H = args.H, K = args.K, B = walk.B();
  const int length = walk.length(b);
  const Turn turn = walk.turn(walk.step_at(i), b, length);
  const bool reset_follows = i + 1 < walk.T() && walk.resets(walk.step_at(i + 1), b, length);
  const unsigned row = turn.row;
  const T* state = as<T>(d.state) + int64_t(i % 2) * B * K;
  T* next = as<T>(d.state) + int64_t((i + 1) % 2) * B * K;
  const auto old_c = [&](const Cell& cell, int unit) {
    return i == 0 ? cell.first_c(b) : as<Acc>(d.cells)[at(b, H, unit)];
  };
  const auto hand_on = [&](int unit, const typename Cell::Result& result) {
    if (!d.hidden && i + 1 < walk.T()) next[at(b, K, unit)] = result.next;
  };

  if (!turn.active) {
    for (int unit = threadIdx.x; unit < H; unit += kThreads) {
      const Cell cell(args, d, walk, unit);
      const typename Cell::Operands in = cell.load(turn, old_c(cell, unit), reset_follows);
      Acc c;
      const auto result = cell.compute(turn, {}, in, c, [&] { return state[at(b, K, unit)]; });
      cell.store(turn, result, c);
      as<Acc>(d.cells)[at(b, H, unit)] = c;
      hand_on(unit, result);
    }
    return;
  }

  // A thread has the same units throughout. Of a unit's four products the first two are read no
  // more once its gates are made: c and o, of which h is made, take their place. Whoever summed
  // them up has read them before the sums' own barriers.
  Acc* product = as<Acc>(d.product) + at(b, 4 * H, 0);
  const RowMoments<Acc> of_product(4 * H, v.epsilon, sums, [&](int k) { return product[k]; });
  if (d.norm_r && threadIdx.x == 0) as<Acc>(d.norm_r)[row] = of_product.rstd;
  for (int unit = threadIdx.x; unit < H; unit += kThreads) {
    const Cell cell(args, d, walk, unit);
    const typename Cell::Operands in = cell.load(turn, old_c(cell, unit), reset_follows);
    Acc normed[4], c;
    for (int gate = 0; gate < 4; ++gate) {
      const int column = gate * H + unit;
      normed[gate] = of_product.normalize(product[column]);
      if (d.norm) as<Acc>(d.norm)[at(row, 4 * H, column)] = normed[gate];
      normed[gate] *= to_acc(as<T>(v.gamma_hh)[column]);
    }
    typename CellMath::Gates s;
    product[unit] = cell.state(turn, normed, in, s, c);
    product[H + unit] = s.o;
    cell.store_state(turn, s, c);
    as<Acc>(d.cells)[at(b, H, unit)] = c;
  }
  const RowMoments<Acc> of_c(H, v.epsilon, sums, [&](int unit) { return product[unit]; });
  for (int unit = threadIdx.x; unit < H; unit += kThreads) {
    const Acc seen = of_c.normalize(product[unit]) * to_acc(as<T>(v.gamma_ch)[unit]) +
                     to_acc(as<T>(v.beta_ch)[unit]);
    const Cell cell(args, d, walk, unit);
    const typename Cell::Operands in = cell.load(turn, Acc(0), reset_follows);
    typename Cell::Result result = {};
    cell.output(turn, in, product[H + unit] * CellMath::tanh_of(seen), result);
    cell.store_output(turn, result.h);
    hand_on(unit, result);
  }
}

// The gradient of a normalized row: from d, that of x_hat, with the means over the row of d and of
// d * x_hat.
template <class Acc>
LSTM_EXT_DEVICE Acc through_norm(Acc d, Acc x_hat, const Pair<Acc>& sums, int count, Acc rstd) {
  return (d - sums.first / Acc(count) - x_hat * (sums.second / Acc(count))) * rstd;
}

template <class Arithmetic>
__global__ void __launch_bounds__(kThreads, 1)
    backward_norm(const __grid_constant__ BackwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  using Cell = BackwardUnit<Arithmetic, true>;
  using CellMath = typename Cell::CellMath;

  DYNAMIC_SHARED(memory);
  Acc* shared = reinterpret_cast<Acc*>(memory);
  const BackwardArgs::Direction& d = args.direction[blockIdx.y];
  const Variants& v = d.variants;
  const Walk walk(args.steps, d.reverse);
  const int b = int(blockIdx.x), j = args.shape.first, H = args.H, K = args.K, B = walk.B();
  const Turn turn = turn_back(walk, j, b);
  const unsigned row = turn.row;
  T* out = as<T>(d.state) + int64_t(j % 2) * B * K;
  // Of this sequence: the product, for which the gradient of normalized c comes; its factor of the
  // output gate; gradients of the gates.
  Acc* const product = as<Acc>(d.product) + at(b, 6 * H, 0);
  Acc* const da_o = product + H;
  Acc* const da = product + 2 * H;
  const bool carried = carries<true>(d, walk) && !d.hidden;
  const auto old_dc = [&](const Cell& cell, int unit) {
    return j == 0 ? cell.first_dc(b) : as<Acc>(d.cells)[at(b, H, unit)];
  };
  const auto old_carry = [&](int unit) {
    return carried && j > 0 ? as<Acc>(d.carry)[at(b, H, unit)] : Acc(0);
  };
  const auto put_carry = [&](int unit, Acc carry) {
    if (carried) as<Acc>(d.carry)[at(b, H, unit)] = carry;
  };

  if (!turn.active) {
    for (int unit = threadIdx.x; unit < H; unit += kThreads) {
      const Cell cell(args, d, walk, unit);
      Acc dc = old_dc(cell, unit), carry = old_carry(unit);
      const typename Cell::Result none = cell.compute(j, turn, product[unit], {}, dc, carry);
      put_carry(unit, carry);
      if (j == walk.T()) continue;
      as<Acc>(d.cells)[at(b, H, unit)] = dc;
      for (int gate = 0; gate < 4; ++gate) out[at(b, K, gate * H + unit)] = none.next[gate];
    }
    if (j == walk.T() || walk.packed()) return;  // it has no row
    for (int k = threadIdx.x; k < 4 * H; k += kThreads) {
      as<Acc>(d.dgates)[at(row, 4 * H, k)] = 0;
      if (d.dproduct) as<T>(d.dproduct)[at(row, 4 * H, k)] = from_acc<T>(Acc(0));
    }
    return;
  }

  Acc* const dnorm = d.dnorm ? as<Acc>(d.dnorm) + at(b, 6 * H, 0) : nullptr;
  const RowMoments<Acc> of_c(H, v.epsilon, shared, [&](int unit) {
    const Cell cell(args, d, walk, unit);
    return cell.made_c(cell.load(turn));
  });
  Pair<Acc> mine = {};
  for (int unit = threadIdx.x; unit < H; unit += kThreads) {
    const Cell cell(args, d, walk, unit);
    const typename Cell::Operands in = cell.load(turn);
    Acc carry = old_carry(unit);
    const Acc dh = cell.gradient(j, turn, product[unit], in.dy, carry);
    put_carry(unit, carry);
    const Acc c_hat = of_c.normalize(cell.made_c(in));
    const Acc gamma = to_acc(as<T>(v.gamma_ch)[unit]);
    const Acc tanh_c = CellMath::tanh_of(c_hat * gamma + to_acc(as<T>(v.beta_ch)[unit]));
    typename CellMath::Gates gates;
    const Acc dnormed = CellMath::backward_output(in.s, tanh_c, dh, gates);
    cell.put_cell_out(turn, in.s.o * tanh_c);
    if (dnorm) {
      dnorm[4 * H + unit] += dnormed * c_hat;
      dnorm[5 * H + unit] += dnormed;
    }
    product[unit] = dnormed * gamma;
    da_o[unit] = gates.o;
    mine.first += dnormed * gamma;
    mine.second += dnormed * gamma * c_hat;
  }
  const Pair<Acc> over_c = block_sums(mine, shared);
  mine = {};
  for (int unit = threadIdx.x; unit < H; unit += kThreads) {
    const Cell cell(args, d, walk, unit);
    const typename Cell::Operands in = cell.load(turn);
    const Acc c = cell.made_c(in);
    typename CellMath::Gates gates;
    gates.o = da_o[unit];
    Acc dc = old_dc(cell, unit);
    cell.state(turn, in, c, through_norm(product[unit], of_c.normalize(c), over_c, H, of_c.rstd),
               dc, gates);
    cell.put_dc0(j, turn, dc);
    as<Acc>(d.cells)[at(b, H, unit)] = dc;
    const Acc each[4] = {gates.i, gates.f, gates.g, gates.o};
    for (int gate = 0; gate < 4; ++gate) {
      const int column = gate * H + unit;
      const Acc x_hat = as<Acc>(d.norm)[at(row, 4 * H, column)];
      const Acc scaled = each[gate] * to_acc(as<T>(v.gamma_hh)[column]);
      as<Acc>(d.dgates)[at(row, 4 * H, column)] = each[gate];
      if (dnorm) dnorm[column] += each[gate] * x_hat;
      da[column] = scaled;
      mine.first += scaled;
      mine.second += scaled * x_hat;
    }
  }
  const Pair<Acc> over_product = block_sums(mine, shared);
  const Acc rstd = as<Acc>(d.norm_r)[row];
  for (int unit = threadIdx.x; unit < H; unit += kThreads)
    for (int gate = 0; gate < 4; ++gate) {
      const int column = gate * H + unit;
      const Acc x_hat = as<Acc>(d.norm)[at(row, 4 * H, column)];
      const T rounded = from_acc<T>(through_norm(da[column], x_hat, over_product, 4 * H, rstd));
      if (d.dproduct) as<T>(d.dproduct)[at(row, 4 * H, column)] = rounded;
      out[at(b, K, column)] = turn.reset ? from_acc<T>(Acc(0)) : Arithmetic::round_state(rounded);
    }
}

}  // namespace lstm_ext
