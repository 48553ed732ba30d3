// A thread has a unit of a sequence at a time, neighbours have neighbouring units.
#include <algorithm>
#include <stdexcept>

#include "cuda/arrange.h"
#include "cuda/backward_cells.cuh"
#include "cuda/launch.h"
#include "cuda/scratch.h"
#include "cuda/second.h"
#include "cuda/vendor.h"

namespace lstm_ext {
namespace {

constexpr int64_t kMostBlocks = 4096;  // enough for any GPU; each thread goes on to further units

struct TangentArgs : CudaSecond, CudaTangents {
  int64_t K, hidden_K;  // padded(P), padded(H)
  void* sums;           // [B, 4H]: state W_hh^T
  void* hidden;         // [B, hidden_K]: the tangent of o * tanh(c); null without a projection
  void* projected;      // [B, P]: hidden W_hr^T; null as hidden
  int place;            // of the step, in the order of taking
};

struct SecondArgs : CudaSecond, CudaSecondBackward {
  // padded(4H), padded(P) and padded(H). What products write has such rows too, so that the second
  // side, which some are added to, begins on 16 bytes: nothing says that the library can do else.
  int64_t K, hidden_K, unit_K;
  void* state;   // [2, B, K]: dgates of the step before in this order, of both sides
  void* sums;    // [2, B, hidden_K]: state W_hh, and for the second side what v_hh adds
  void* hidden;  // [2, B, hidden_K]: the gradients of h; null without a projection
  void* dout;    // [2, B, unit_K]: hidden W_hr, likewise; null as hidden
  void* cells;   // [2, B, H]: the gradients of c
  int place;     // of the step, from the last taken; T: what reaches h0
};

// body(b, column) for every sequence and each of so many columns.
template <class Body>
LSTM_EXT_DEVICE void for_each(const Steps& steps, int64_t columns, const Body& body) {
  const int64_t count = steps.B * columns, stride = int64_t(gridDim.x) * kThreads;
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < count; k += stride)
    body(int(k / columns), int(k % columns));
}

template <class T>
using MathOf = Cell<ExactMath<T>>;
template <class T>
using GatesOf = typename MathOf<T>::Gates;

// Those of a unit, of row `row` of [rows, 4H].
template <class T>
LSTM_EXT_DEVICE GatesOf<T> gates_at(const void* from, int64_t row, int64_t H, int unit) {
  const T* const s = as<T>(from) + row * 4 * H + unit;
  return {s[0], s[H], s[2 * H], s[3 * H]};
}
template <class T>
LSTM_EXT_DEVICE void put_gates(void* to, int64_t row, int64_t width, int64_t H, int unit,
                               const GatesOf<T>& s) {
  T* const out = as<T>(to) + row * width + unit;
  out[0] = s.i;
  out[H] = s.f;
  out[2 * H] = s.g;
  out[3 * H] = s.o;
}

// c, or its tangent, before a turn.
template <class T>
LSTM_EXT_DEVICE T c_before(const Walk& walk, const Turn& turn, const void* c_seq, const void* c0,
                           int64_t H, int unit) {
  if (turn.reset) return 0;
  if (turn.first) return at_or_zero(as<T>(c0), turn.b * H + unit);
  return as<T>(c_seq)[walk.row_before(turn) * H + unit];
}

// ---- forward
// ------------------------------------------------------------------------------------------------

template <class T>
LSTM_EXT_DEVICE void put_h(const TangentArgs& args, const Turn& turn, int column, T h) {
  as<T>(args.y)[turn.row * args.y_stride + column] = h;
  as<T>(args.state)[turn.b * args.K + column] = h;
  if (turn.last) as<T>(args.h_n)[turn.b * args.P + column] = h;
}

template <class T>
__global__ void __launch_bounds__(kThreads) tangent_cell(const __grid_constant__ TangentArgs args) {
  const Walk walk(args.steps, args.steps.reverse);
  for_each(args.steps, args.H, [&](int b, int unit) {
    const Turn turn = walk.turn(walk.step_at(args.place), b);
    const int64_t H = args.H, row = turn.row;
    if (!turn.active) return;
    GatesOf<T> a = gates_at<T>(args.CudaTangents::gates, row, H, unit);
    const auto add = [&](const GatesOf<T>& more) {
      a = {a.i + more.i, a.f + more.f, a.g + more.g, a.o + more.o};
    };
    if (!turn.reset) {
      add(gates_at<T>(args.sums, b, H, unit));
      if (args.gates_after)
        add(turn.first ? gates_at<T>(args.gates_first, b, H, unit)
                       : gates_at<T>(args.gates_after, walk.row_before(turn), H, unit));
    }
    put_gates<T>(args.CudaTangents::gates, row, 4 * H, H, unit, a);
    const T tanh_c = MathOf<T>::tanh_of(as<T>(args.CudaSecond::c_seq)[row * H + unit]);
    T c_dot, h_dot;
    MathOf<T>::tangent(
        gates_at<T>(args.CudaSecond::gates, row, H, unit), tanh_c,
        c_before<T>(walk, turn, args.CudaSecond::c_seq, args.CudaSecond::c0, H, unit), a,
        c_before<T>(walk, turn, args.CudaTangents::c_seq, args.CudaTangents::c0, H, unit), c_dot,
        h_dot);
    as<T>(args.CudaTangents::c_seq)[row * H + unit] = c_dot;
    if (turn.last) as<T>(args.c_n)[b * H + unit] = c_dot;
    if (args.hidden) {
      as<T>(args.cell_out)[row * H + unit] = h_dot;
      as<T>(args.hidden)[b * args.hidden_K + unit] = h_dot;
    } else {
      put_h<T>(args, turn, unit, h_dot);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    tangent_projection(const __grid_constant__ TangentArgs args) {
  const Walk walk(args.steps, args.steps.reverse);
  for_each(args.steps, args.P, [&](int b, int column) {
    const Turn turn = walk.turn(walk.step_at(args.place), b);
    if (!turn.active) return;
    const T more = at_or_zero(as<T>(args.h_more), turn.row * args.P + column);
    put_h<T>(args, turn, column, as<T>(args.projected)[b * args.P + column] + more);
  });
}

// ---- backward
// ------------------------------------------------------------------------------------------------

// Both sides' gradients of h in a column, from later steps and outside. A sequence's dh0 is what
// the step after its first one finds; that its state is reset says the product, which is zero.
template <class T>
LSTM_EXT_DEVICE void gradients_of_h(const SecondArgs& args, const Walk& walk, const Turn& turn,
                                    int column, T (&dh)[2]) {
  const int64_t here = turn.b * args.P + column;
  const auto sum = [&](int side) {
    return as<T>(args.sums)[(side * args.steps.B + turn.b) * args.hidden_K + column];
  };
  if (args.place > 0 && args.dh0) {
    const Turn before = turn_back(walk, args.place - 1, turn.b);
    if (before.active && before.first) as<T>(args.dh0)[here] = sum(1);
  }
  if (!turn.active) return;
  for (int k = 0; k < 2; ++k) {
    const CudaSecondSide& s = args.sides[k];
    dh[k] = turn.last ? at_or_zero(as<T>(s.dh_n), here) : sum(k);
    dh[k] += at_or_zero(as<T>(s.dy), turn.row * s.dy_stride + column);
    if (s.h_prev) {
      T& h_prev = as<T>(s.h_prev)[turn.row * args.P + column];
      h_prev = turn.reset   ? T(0)
               : turn.first ? at_or_zero(as<T>(s.h0), here)
                            : as<T>(s.y)[walk.row_before(turn) * s.y_stride + column];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    second_projection(const __grid_constant__ SecondArgs args) {
  const Walk walk(args.steps, args.steps.reverse);
  for_each(args.steps, args.P, [&](int b, int column) {
    const Turn turn = turn_back(walk, args.place, b);
    T dh[2];
    gradients_of_h<T>(args, walk, turn, column, dh);
    if (!turn.active) return;
    for (int k = 0; k < 2; ++k) {
      as<T>(args.sides[k].dr)[turn.row * args.P + column] = dh[k];
      as<T>(args.hidden)[(k * args.steps.B + b) * args.hidden_K + column] = dh[k];
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) second_cell(const __grid_constant__ SecondArgs args) {
  const Walk walk(args.steps, args.steps.reverse);
  for_each(args.steps, args.H, [&](int b, int unit) {
    const Turn turn = turn_back(walk, args.place, b);
    const int64_t H = args.H, row = turn.row, here = b * H + unit, side = args.steps.B * H;
    T dh[2];
    if (!args.hidden) gradients_of_h<T>(args, walk, turn, unit, dh);
    if (!turn.active) return;
    T* const cells = as<T>(args.cells) + here;
    T dc[2];
    for (int k = 0; k < 2; ++k) {
      const CudaSecondSide& s = args.sides[k];
      if (args.hidden) dh[k] = as<T>(args.dout)[(k * args.steps.B + b) * args.unit_K + unit];
      dc[k] = turn.last ? at_or_zero(as<T>(s.dc_n), here) : cells[k * side];
      dc[k] += at_or_zero(as<T>(s.dcells), row * H + unit);
    }
    const GatesOf<T> s = gates_at<T>(args.gates, row, H, unit);
    const T tanh_c = MathOf<T>::tanh_of(as<T>(args.c_seq)[row * H + unit]);
    const T c_prev = c_before<T>(walk, turn, args.c_seq, args.c0, H, unit);
    GatesOf<T> da[2];
    dc[0] += MathOf<T>::backward_output(s, tanh_c, dh[0], da[0]);
    MathOf<T>::backward_tangent(
        s, tanh_c, c_prev, dh[0], dc[0], gates_at<T>(args.gates_dot, row, H, unit),
        as<T>(args.c_seq_dot)[row * H + unit],
        c_before<T>(walk, turn, args.c_seq_dot, args.c0_dot, H, unit), dh[1], dc[1], da[1]);
    MathOf<T>::backward_state(s, c_prev, dc[0], da[0], nullptr);
    for (int k = 0; k < 2; ++k) {
      cells[k * side] = turn.reset ? T(0) : dc[k];
      put_gates<T>(args.sides[k].dgates, row, 4 * H, H, unit, da[k]);
      put_gates<T>(args.state, k * args.steps.B + b, args.K, H, unit,
                   turn.reset ? GatesOf<T>{0, 0, 0, 0} : da[k]);
    }
    if (turn.first && args.dc0) as<T>(args.dc0)[here] = cells[side];
  });
}

// ---- launches
// ------------------------------------------------------------------------------------------------

// out [M, N] = a [M, K] b^T, b [N, K]; rows of a and b have K elements.
Product product_of(const CudaSecond& second, int64_t M, int64_t N, int64_t K) {
  make_current(second.device);
  return rows_product(second.dtype, second.tf32, second.device, M, N, K);
}
// The same with out's rows padded. added: to what it holds.
Product padded_product(const CudaSecond& second, int64_t M, int64_t N, int64_t K, bool added) {
  Product p = product_of(second, M, N, K);
  p.accumulate = added;
  p.ldout = padded(N, second.dtype);
  return p;
}

// The products of a pass, with one scratch for all.
struct TangentProducts {
  VendorProduct recurrent, projecting;  // the same without a projection

  TangentProducts(const CudaSecond& s, bool projection)
      : recurrent(product_of(s, s.steps.B, 4 * s.H, padded(s.P, s.dtype))),
        projecting(projection ? VendorProduct(product_of(s, s.steps.B, s.P, padded(s.H, s.dtype)))
                              : recurrent) {}
  int64_t workspace() const { return std::max(recurrent.workspace(), projecting.workspace()); }
};
struct SecondProducts {
  // more...: what the directions in the weights' space add to the second side.
  VendorProduct recurrent, more_recurrent, projecting, more_projecting;

  SecondProducts(const CudaSecond& s, bool projection)
      : recurrent(padded_product(s, 2 * s.steps.B, s.P, padded(4 * s.H, s.dtype), false)),
        more_recurrent(padded_product(s, s.steps.B, s.P, padded(4 * s.H, s.dtype), true)),
        projecting(projection ? of_projection(s, 2 * s.steps.B, false) : recurrent),
        more_projecting(projection ? of_projection(s, s.steps.B, true) : more_recurrent) {}
  static VendorProduct of_projection(const CudaSecond& s, int64_t rows, bool added) {
    return VendorProduct(padded_product(s, rows, s.H, padded(s.P, s.dtype), added));
  }
  int64_t workspace() const {
    return std::max({recurrent.workspace(), more_recurrent.workspace(), projecting.workspace(),
                     more_projecting.workspace()});
  }
};

void cut(Cutter& cutter, bool projection, TangentArgs& args) {
  const int64_t B = args.steps.B, bytes = storage_bytes(args.dtype);
  args.K = padded(args.P, args.dtype);
  args.hidden_K = padded(args.H, args.dtype);
  args.sums = cutter.take(B * 4 * args.H * bytes);
  args.hidden = projection ? cutter.take(B * args.hidden_K * bytes) : nullptr;
  args.projected = projection ? cutter.take(B * args.P * bytes) : nullptr;
}
void cut(Cutter& cutter, bool projection, SecondArgs& args) {
  const int64_t two = 2 * args.steps.B * storage_bytes(args.dtype);
  args.K = padded(4 * args.H, args.dtype);
  args.hidden_K = padded(args.P, args.dtype);
  args.unit_K = padded(args.H, args.dtype);
  args.state = cutter.take(two * args.K);
  args.sums = cutter.take(two * args.hidden_K);
  args.hidden = projection ? cutter.take(two * args.hidden_K) : nullptr;
  args.dout = projection ? cutter.take(two * args.unit_K) : nullptr;
  args.cells = cutter.take(two * args.H);
}

void require(const CudaSecond& s) {
  if (s.dtype != Dtype::kFloat32 && s.dtype != Dtype::kFloat64)
    throw std::invalid_argument("second derivatives are made in float32 and float64");
  require_sizes(s.steps, s.H, s.P);
  if (!s.steps.T || !s.steps.B || !s.H || !s.P)
    throw std::invalid_argument("a derivative's steps, sequences and units are some, got 0");
}

template <class Args>
void launch_units(void (*fp32)(Args), void (*fp64)(Args), const Args& args, int64_t columns) {
  const int64_t blocks = std::min(kMostBlocks, ceil_div(args.steps.B * columns, kThreads));
  launch(args.dtype == Dtype::kFloat64 ? fp64 : fp32, {dim3(unsigned(blocks)), kThreads, 0, false},
         args.stream, args, "launching a step of a derivative");
}

template <class Args>
int64_t scratch_bytes(const CudaSecond& second, bool projection) {
  Args args{};
  static_cast<CudaSecond&>(args) = second;
  Cutter cutter(nullptr);
  cut(cutter, projection, args);
  return cutter.used();
}

// The arguments, and in `vendor` the scratch of the products.
template <class Args, class Own>
Args make_args(const CudaSecond& second, const Own& own, void* workspace, void*& vendor) {
  require(second);
  Args args{};
  static_cast<CudaSecond&>(args) = second;
  static_cast<Own&>(args) = own;
  Cutter cutter(workspace);
  cut(cutter, own.w_hr, args);
  vendor = static_cast<char*>(workspace) + cutter.used();
  make_current(second.device);
  return args;
}

}  // namespace

int64_t cuda_tangents_workspace(const CudaSecond& second, bool projection) {
  return scratch_bytes<TangentArgs>(second, projection) +
         TangentProducts(second, projection).workspace();
}
int64_t cuda_second_workspace(const CudaSecond& second, bool projection) {
  return scratch_bytes<SecondArgs>(second, projection) +
         SecondProducts(second, projection).workspace();
}

void cuda_tangents(const CudaSecond& second, const CudaTangents& own, void* workspace) {
  void* vendor;
  auto args = make_args<TangentArgs>(second, own, workspace, vendor);
  const TangentProducts products(second, own.w_hr);
  // Columns past the end of rows are multiplied with zeros, and must not be NaN.
  const int64_t row = args.hidden_K * storage_bytes(args.dtype);
  if (args.w_hr) cuda_zero(args.hidden, args.steps.B * row, args.stream);
  for (args.place = 0; args.place < args.steps.T; ++args.place) {
    products.recurrent.run(args.state, args.w_hh, args.sums, vendor, args.stream);
    launch_units(tangent_cell<float>, tangent_cell<double>, args, args.H);
    if (!args.w_hr) continue;
    products.projecting.run(args.hidden, args.w_hr, args.projected, vendor, args.stream);
    launch_units(tangent_projection<float>, tangent_projection<double>, args, args.P);
  }
}

void cuda_second(const CudaSecond& second, const CudaSecondBackward& own, void* workspace) {
  void* vendor;
  auto args = make_args<SecondArgs>(second, own, workspace, vendor);
  const SecondProducts products(second, own.w_hr);
  const int64_t B = args.steps.B, bytes = storage_bytes(args.dtype);
  // As in cuda_tangents.
  cuda_zero(args.state, 2 * B * args.K * bytes, args.stream);
  if (args.w_hr) cuda_zero(args.hidden, 2 * B * args.hidden_K * bytes, args.stream);
  const auto multiply = [&](const VendorProduct& all, const VendorProduct& more, const void* from,
                            const void* w, const void* v, void* out, int64_t row) {
    all.run(from, w, out, vendor, args.stream);
    if (v) more.run(from, v, static_cast<char*>(out) + B * row * bytes, vendor, args.stream);
  };
  // The product that makes dh0 is a step of its own.
  for (args.place = 0; args.place < args.steps.T + (args.dh0 ? 1 : 0); ++args.place) {
    if (args.place > 0)
      multiply(products.recurrent, products.more_recurrent, args.state, args.w_hh, args.v_hh,
               args.sums, args.hidden_K);
    if (args.w_hr) {
      launch_units(second_projection<float>, second_projection<double>, args, args.P);
      if (args.place == args.steps.T) break;
      multiply(products.projecting, products.more_projecting, args.hidden, args.w_hr, args.v_hr,
               args.dout, args.unit_K);
    }
    launch_units(second_cell<float>, second_cell<double>, args, args.H);
  }
}

}  // namespace lstm_ext
