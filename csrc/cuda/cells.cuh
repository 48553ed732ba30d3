// What a step of one hidden unit reads and writes besides its product: the same for every family of
// kernels, which differ in where the product comes from, where c is kept, and how the next step
// learns of this one's result.
#pragma once

#include "cuda/block.cuh"

namespace lstm_ext {

template <class Arithmetic>
class ForwardUnit {
  using CellMath = typename CellOf<Arithmetic>::type;

 public:
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  // What can be on its way while the product runs.
  struct Operands {
    Acc gx[4];
    Acc c;  // before the step, resets applied
    bool active, last, reset_follows;
  };
  // What a step made.
  struct Result {
    typename CellMath::Gates s;
    T h;     // as stored
    T next;  // as the next step's product reads it; with a projection its other kernel makes that
  };

  LSTM_EXT_DEVICE ForwardUnit(const ForwardArgs& args, const ForwardArgs::Direction& d,
                              const Steps& steps, int unit)
      : args_(args), d_(d), steps_(steps), unit_(unit) {
    if (unit < args.H)
      for (int gate = 0; gate < 4; ++gate) {
        if (d.b_ih) bias_[gate] += to_acc(as<T>(d.b_ih)[gate * args.H + unit]);
        if (d.b_hh) bias_[gate] += to_acc(as<T>(d.b_hh)[gate * args.H + unit]);
      }
  }

  LSTM_EXT_DEVICE Acc first_c(int b) const { return to_acc(as<T>(d_.c0)[at(b, args_.H, unit_)]); }

  // c: what the step before left. Step t is the i-th.
  LSTM_EXT_DEVICE Operands load(int i, int64_t t, int b, Acc c) const {
    Operands in = {};
    in.active = steps_.active(t, b);
    in.last = t == steps_.last_step(b);
    in.reset_follows = i + 1 < steps_.T && resets(steps_, steps_.step_at(i + 1), b);
    in.c = resets(steps_, t, b) ? Acc(0) : c;
    if (in.active) {
      const Acc* gx = as<Acc>(d_.gx) + at(steps_.row(t, b), 4 * args_.H, unit_);
      for (int gate = 0; gate < 4; ++gate) in.gx[gate] = gx[gate * args_.H];
    }
    return in;
  }

  // The step from the product's sums. c becomes that after the step; before() is the h that this
  // step's product has read.
  template <class Before>
  LSTM_EXT_DEVICE Result compute(const Acc (&sum)[4], const Operands& in, Acc& c,
                                 Before before) const {
    const T zero = from_acc<T>(Acc(0));
    Result result = {};
    if (!in.active) {
      c = in.c;
      result.next = in.reset_follows || d_.hidden ? zero : before();
      return result;
    }
    const typename CellMath::Gates a = {sum[0] + in.gx[0] + bias_[0], sum[1] + in.gx[1] + bias_[1],
                                        sum[2] + in.gx[2] + bias_[2], sum[3] + in.gx[3] + bias_[3]};
    Acc h;
    CellMath::forward(a, in.c, result.s, c, h);
    result.h = from_acc<T>(h);
    result.next = in.reset_follows ? zero : Arithmetic::round_state(result.h);
    return result;
  }

  // What is kept of step t of sequence b; c: after the step.
  LSTM_EXT_DEVICE void store(int64_t t, int b, const Operands& in, const Result& result,
                             Acc c) const {
    const int H = args_.H;
    if (!in.active) {
      if (!steps_.offsets) {  // a packed batch has no row for it
        const int64_t row = steps_.row(t, b);
        if (!d_.hidden) as<T>(d_.y)[row * d_.y_stride + unit_] = from_acc<T>(Acc(0));
        if (d_.c_seq) as<Acc>(d_.c_seq)[at(row, H, unit_)] = 0;
      }
      return;
    }
    const int64_t row = steps_.row(t, b);
    if (d_.gates) {
      Acc* gates = as<Acc>(d_.gates) + at(row, 4 * H, unit_);
      gates[0] = result.s.i;
      gates[H] = result.s.f;
      gates[2 * H] = result.s.g;
      gates[3 * H] = result.s.o;
    }
    if (d_.c_seq) as<Acc>(d_.c_seq)[at(row, H, unit_)] = c;
    if (in.last) as<T>(d_.c_n)[at(b, H, unit_)] = from_acc<T>(c);
    if (d_.hidden) {
      as<T>(d_.hidden)[at(b, args_.hidden_K, unit_)] = Arithmetic::round_state(result.h);
      return;
    }
    as<T>(d_.y)[row * d_.y_stride + unit_] = result.h;
    if (in.last) as<T>(d_.h_n)[at(b, H, unit_)] = result.h;
  }

 private:
  const ForwardArgs& args_;
  const ForwardArgs::Direction& d_;
  const Steps& steps_;
  int unit_;
  Acc bias_[4] = {};
};

// Gradient of h from the steps after: the product, and at a sequence's last step dh_n. A sequence
// that has not reached its last step (or has left its first behind) takes no step: what it has is
// carried. Returns the sum, and keeps the account of what is carried.
template <class T, class Acc>
LSTM_EXT_DEVICE Acc gradient_of_h(const BackwardArgs::Direction& d, const Steps& steps, int j,
                                  bool active, int64_t at, Acc product, Acc& carry) {
  Acc sum = j > 0 ? product : Acc(0);
  if (j == 0 && d.dh_n) sum += to_acc(as<T>(d.dh_n)[at]);
  if (!steps.lengths) return sum;
  if (j > 0) sum += carry;
  carry = active ? Acc(0) : sum;
  return sum;
}

// The j-th step taken backwards is the (T - 1 - j)-th of forward; step T is the one product more
// that makes dh0.
template <class Arithmetic>
class BackwardUnit {
  using CellMath = typename CellOf<Arithmetic>::type;

 public:
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  // What can be on its way while the product runs.
  struct Operands {
    typename CellMath::Gates s;
    Acc c, c_prev, dy, dcell;
    bool active, reset;
  };
  // The gradients of the gates i, f, g, o.
  struct Result {
    T dgates[4];  // as stored
    T next[4];    // as the next product reads them
    bool active;
  };

  LSTM_EXT_DEVICE BackwardUnit(const BackwardArgs& args, const BackwardArgs::Direction& d,
                               const Steps& steps, int unit)
      : H_(args.H), d_(d), steps_(steps), unit_(unit) {}

  // Gradient of c before the first step.
  LSTM_EXT_DEVICE Acc first_dc(int b) const {
    return d_.dc_n ? to_acc(as<T>(d_.dc_n)[at(b, H_, unit_)]) : Acc(0);
  }

  LSTM_EXT_DEVICE Operands load(int j, int b) const {
    Operands in = {};
    if (j >= steps_.T) return in;
    const int64_t t = steps_.step_at(steps_.T - 1 - j);
    if (!steps_.active(t, b)) return in;
    in.active = true;
    in.reset = resets(steps_, t, b);
    const int64_t row = steps_.row(t, b);
    const Acc* gates = as<Acc>(d_.gates) + at(row, 4 * H_, unit_);
    in.s = {gates[0], gates[H_], gates[2 * H_], gates[3 * H_]};
    in.c = as<Acc>(d_.c_seq)[at(row, H_, unit_)];
    if (!in.reset) {
      if (t == steps_.first_step(b))
        in.c_prev = to_acc(as<T>(d_.c0)[at(b, H_, unit_)]);
      else
        in.c_prev = as<Acc>(d_.c_seq)[at(steps_.row(steps_.reverse ? t + 1 : t - 1, b), H_, unit_)];
    }
    // With a projection, dy is in the gradient that comes from the step's other kernel.
    if (d_.dy && !d_.hidden) in.dy = to_acc(as<T>(d_.dy)[row * d_.dy_stride + unit_]);
    if (d_.dcells) in.dcell = to_acc(as<T>(d_.dcells)[at(row, H_, unit_)]);
    return in;
  }

  // Step j of sequence b. product: dgates W_hh of the step before in this order, or with a
  // projection the whole gradient of h. dc and carry become those after the step.
  LSTM_EXT_DEVICE Result compute(int j, int b, Acc product, const Operands& in, Acc& dc,
                                 Acc& carry) const {
    Result result = {};
    const int64_t state = at(b, H_, unit_);
    const Acc dh = d_.hidden
                       ? product
                       : gradient_of_h<T>(d_, steps_, j, in.active, state, product, carry) + in.dy;
    if (j == steps_.T) {
      if (d_.dh0 && !d_.hidden) as<T>(d_.dh0)[state] = from_acc<T>(dh);
      if (d_.dc0 && steps_.T == 0) as<T>(d_.dc0)[state] = from_acc<T>(dc);
      return result;
    }
    typename CellMath::Gates da = {};
    if (in.active) {
      dc += in.dcell;
      CellMath::backward(in.s, in.c, in.c_prev, dh, dc, da);
    }
    if (in.reset) dc = 0;
    if (d_.dc0 && j + 1 == steps_.T) as<T>(d_.dc0)[state] = from_acc<T>(dc);
    const Acc gates[4] = {da.i, da.f, da.g, da.o};
    result.active = in.active;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      result.dgates[gate] = from_acc<T>(gates[gate]);
      result.next[gate] =
          in.reset ? from_acc<T>(Acc(0)) : Arithmetic::round_state(result.dgates[gate]);
    }
    return result;
  }

  // What is kept of step j of sequence b.
  LSTM_EXT_DEVICE void store(int j, int b, const Result& result) const {
    if (j == steps_.T || (!result.active && steps_.offsets)) return;  // it has no row
    const int64_t row = steps_.row(steps_.step_at(steps_.T - 1 - j), b);
    T* dgates = as<T>(d_.dgates) + at(row, 4 * H_, unit_);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) dgates[gate * H_] = result.dgates[gate];
  }

 private:
  int H_;
  const BackwardArgs::Direction& d_;
  const Steps& steps_;
  int unit_;
};

}  // namespace lstm_ext
