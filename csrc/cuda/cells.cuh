// What a step of one hidden unit reads and writes besides its product: the same for every family of
// kernels, which differ in where the product comes from, where c is kept, and how the next step
// learns of this one's result.
//
// kVariants: with what params.h calls Variants. The plain LSTM's kernels do without, for they have
// no registers to spare.
#pragma once

#include "cuda/block.cuh"

namespace lstm_ext {

// The peepholes of a unit.
template <class T, class Peephole>
LSTM_EXT_DEVICE Peephole peephole_of(const Variants& v, int H, int unit) {
  const T* p = as<T>(v.peephole) + unit;
  return {to_acc(p[0]), to_acc(p[H]), to_acc(p[2 * H])};
}
// What part of the old h or c stays.
template <class Acc>
LSTM_EXT_DEVICE Acc kept_part(const uint8_t* mask, double everywhere, int64_t at) {
  return mask ? Acc(mask[at] != 0) : Acc(everywhere);
}

// h after step t of sequence b, from the one that the step made, in column `unit` of `width`.
template <class T, class Acc>
LSTM_EXT_DEVICE T zoned_out_h(const ForwardArgs::Direction& d, const Steps& steps, int64_t t, int b,
                              int width, int unit, Acc fresh) {
  const Variants& v = d.variants;
  if (!v.zoneout_h()) return from_acc<T>(fresh);
  Acc old = 0;
  if (!resets(steps, t, b)) {
    if (t == steps.first_step(b))
      old = to_acc(as<T>(d.h0)[at(b, width, unit)]);
    else
      old = to_acc(as<T>(d.y)[steps.row(steps.reverse ? t + 1 : t - 1, b) * d.y_stride + unit]);
  }
  const Acc keep = kept_part<Acc>(v.keep_h, v.keep_h_all, at(steps.row(t, b), width, unit));
  return from_acc<T>(keep * old + (1 - keep) * fresh);
}
// h as the product reads it.
template <class Arithmetic, class T>
LSTM_EXT_DEVICE T product_input(const Variants& v, int b, int width, int unit, T h) {
  using Acc = typename Arithmetic::Acc;
  if (v.h_dropout) h = from_acc<T>(to_acc(h) * as<Acc>(v.h_dropout)[at(b, width, unit)]);
  return Arithmetic::round_state(h);
}

template <class Arithmetic, bool kVariants = false>
class ForwardUnit {
 public:
  using CellMath = typename CellOf<Arithmetic>::type;
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

  // Step t of sequence b from the product's sums. c becomes that after the step; before() is the h
  // that this step's product has read.
  template <class Before>
  LSTM_EXT_DEVICE Result compute(int64_t t, int b, const Acc (&sum)[4], const Operands& in, Acc& c,
                                 Before before) const {
    Result result = {};
    if (in.active) {
      const Acc fresh = state(t, b, sum, in, result.s, c);
      output(t, b, in, CellMath::forward_output(result.s, fresh), result);
    } else {
      c = in.c;
      result.next = in.reset_follows || d_.hidden ? from_acc<T>(Acc(0)) : before();
    }
    return result;
  }

  // What is kept of step t of sequence b; c: after the step.
  LSTM_EXT_DEVICE void store(int64_t t, int b, const Operands& in, const Result& result,
                             Acc c) const {
    if (in.active) {
      store_state(t, b, in, result.s, c);
      store_output(t, b, in, result.h);
    } else if (!steps_.offsets) {  // a packed batch has no row for it
      const int64_t row = steps_.row(t, b);
      if (!d_.hidden) as<T>(d_.y)[row * d_.y_stride + unit_] = from_acc<T>(Acc(0));
      if (d_.c_seq) as<Acc>(d_.c_seq)[at(row, args_.H, unit_)] = 0;
    }
  }

  // ---- the parts of a step that is taken

  // The gates, and c after the step; returns c as h is made of it.
  LSTM_EXT_DEVICE Acc state(int64_t t, int b, const Acc (&sum)[4], const Operands& in,
                            typename CellMath::Gates& s, Acc& c) const {
    const typename CellMath::Gates a = {sum[0] + in.gx[0] + bias_[0], sum[1] + in.gx[1] + bias_[1],
                                        sum[2] + in.gx[2] + bias_[2], sum[3] + in.gx[3] + bias_[3]};
    Acc fresh;
    if constexpr (kVariants) {
      const Variants& v = d_.variants;
      // Not a pointer that may be null: the peepholes would have to lie in memory.
      if (v.peephole) {
        const auto peephole = peephole_of<T, typename CellMath::Peephole>(v, args_.H, unit_);
        CellMath::forward_state(a, in.c, s, fresh, &peephole);
      } else {
        CellMath::forward_state(a, in.c, s, fresh, nullptr);
      }
      c = fresh;
      if (v.zoneout_c()) {
        const int64_t mask = at(steps_.row(t, b), args_.H, unit_);
        c = CellMath::zoneout(kept_part<Acc>(v.keep_c, v.keep_c_all, mask), in.c, fresh);
      }
    } else {
      CellMath::forward_state(a, in.c, s, fresh, nullptr);
      c = fresh;
    }
    return fresh;
  }
  // What follows from h = o * tanh(c).
  LSTM_EXT_DEVICE void output(int64_t t, int b, const Operands& in, Acc h, Result& result) const {
    const T zero = from_acc<T>(Acc(0));
    if (kVariants && !d_.hidden) {
      result.h = zoned_out_h<T>(d_, steps_, t, b, args_.H, unit_, h);
      result.next = in.reset_follows
                        ? zero
                        : product_input<Arithmetic>(d_.variants, b, args_.H, unit_, result.h);
    } else {
      result.h = from_acc<T>(h);
      result.next = in.reset_follows ? zero : Arithmetic::round_state(result.h);
    }
  }
  LSTM_EXT_DEVICE void store_state(int64_t t, int b, const Operands& in,
                                   const typename CellMath::Gates& s, Acc c) const {
    const int H = args_.H;
    const int64_t row = steps_.row(t, b);
    if (d_.gates) {
      Acc* gates = as<Acc>(d_.gates) + at(row, 4 * H, unit_);
      gates[0] = s.i;
      gates[H] = s.f;
      gates[2 * H] = s.g;
      gates[3 * H] = s.o;
    }
    if (d_.c_seq) as<Acc>(d_.c_seq)[at(row, H, unit_)] = c;
    if (in.last) as<T>(d_.c_n)[at(b, H, unit_)] = from_acc<T>(c);
  }
  LSTM_EXT_DEVICE void store_output(int64_t t, int b, const Operands& in, T h) const {
    if (d_.hidden) {
      as<T>(d_.hidden)[at(b, args_.hidden_K, unit_)] = Arithmetic::round_state(h);
      return;
    }
    as<T>(d_.y)[steps_.row(t, b) * d_.y_stride + unit_] = h;
    if (in.last) as<T>(d_.h_n)[at(b, args_.H, unit_)] = h;
  }

 private:
  const ForwardArgs& args_;
  const ForwardArgs::Direction& d_;
  const Steps& steps_;
  int unit_;
  Acc bias_[4] = {};
};

// Whether a gradient of h waits for another step.
template <bool kVariants>
LSTM_EXT_DEVICE bool carries(const BackwardArgs::Direction& d, const Steps& steps) {
  return steps.lengths || (kVariants && d.variants.zoneout_h());
}

// Gradient of the h that step t made: from the steps after, which is the product and at a
// sequence's last step dh_n, and from the outputs, dy. A sequence that has not reached its last
// step (or has left its first behind) takes no step: what it has is carried; so is what reaches the
// step before through zoneout. Column `unit` of `width`.
template <class T, bool kVariants, class Acc>
LSTM_EXT_DEVICE Acc gradient_of_h(const BackwardArgs::Direction& d, const Steps& steps, int j,
                                  int64_t t, bool active, bool reset, int b, int width, int unit,
                                  Acc product, Acc dy, Acc& carry) {
  const Variants& v = d.variants;
  const int64_t state = at(b, width, unit);
  Acc sum = j > 0 ? product : Acc(0);
  if constexpr (kVariants)
    if (v.h_dropout) sum *= as<Acc>(v.h_dropout)[state];
  if (j == 0 && d.dh_n) sum += to_acc(as<T>(d.dh_n)[state]);
  if (!carries<kVariants>(d, steps)) return sum + dy;
  if (j > 0) sum += carry;
  carry = active ? Acc(0) : sum;
  sum += dy;
  if constexpr (kVariants)
    if (active && v.zoneout_h()) {
      const Acc keep = kept_part<Acc>(v.keep_h, v.keep_h_all, at(steps.row(t, b), width, unit));
      carry = reset ? Acc(0) : keep * sum;
      return (1 - keep) * sum;
    }
  return sum;
}

// The j-th step taken backwards is the (T - 1 - j)-th of forward; step T is the one product more
// that makes dh0.
template <class Arithmetic, bool kVariants = false>
class BackwardUnit {
 public:
  using CellMath = typename CellOf<Arithmetic>::type;
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
    const Acc dh = gradient(j, b, product, in, carry);
    Result result = {};
    if (j == steps_.T) {
      const int64_t state = at(b, H_, unit_);
      if (d_.dh0 && !d_.hidden) as<T>(d_.dh0)[state] = from_acc<T>(dh);
      if (d_.dc0 && steps_.T == 0) as<T>(d_.dc0)[state] = from_acc<T>(dc);
      return result;
    }
    typename CellMath::Gates da = {};
    if (in.active) {
      const Acc c = made_c(in), tanh_c = CellMath::tanh_of(c);
      const Acc through_h = CellMath::backward_output(in.s, tanh_c, dh, da);
      put_cell_out(j, b, in.s.o * tanh_c);
      state(j, b, in, c, through_h, dc, da);
    }
    put_dc0(j, b, in, dc);
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
    const int64_t row = steps_.row(time_of(j), b);
    T* dgates = as<T>(d_.dgates) + at(row, 4 * H_, unit_);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) dgates[gate * H_] = result.dgates[gate];
  }

  // ---- the parts of a step

  // Of the h that the step made.
  LSTM_EXT_DEVICE Acc gradient(int j, int b, Acc product, const Operands& in, Acc& carry) const {
    if (d_.hidden) return product;
    return gradient_of_h<T, kVariants>(d_, steps_, j, time_of(j), in.active, in.reset, b, H_, unit_,
                                       product, in.dy, carry);
  }
  // c as h was made of it.
  LSTM_EXT_DEVICE Acc made_c(const Operands& in) const {
    if (kVariants && d_.variants.zoneout_c()) return in.s.f * in.c_prev + in.s.i * in.s.g;
    return in.c;
  }
  // What W_hr was multiplied with.
  LSTM_EXT_DEVICE void put_cell_out(int j, int b, Acc out) const {
    if (kVariants && d_.cell_out)
      as<T>(d_.cell_out)[at(steps_.row(time_of(j), b), H_, unit_)] = from_acc<T>(out);
  }
  // From the gradient that reached c through h: what is left of da, and dc of the step before.
  LSTM_EXT_DEVICE void state(int j, int b, const Operands& in, Acc c, Acc through_h, Acc& dc,
                             typename CellMath::Gates& da) const {
    Acc sent = dc + in.dcell;
    if constexpr (!kVariants) {
      dc = sent + through_h;
      CellMath::backward_state(in.s, in.c_prev, dc, da, nullptr);
      return;
    }
    const Variants& v = d_.variants;
    Acc kept = 0;
    if (v.zoneout_c()) {
      const int64_t mask = at(steps_.row(time_of(j), b), H_, unit_);
      const Acc keep = kept_part<Acc>(v.keep_c, v.keep_c_all, mask);
      kept = keep * sent;
      sent = (1 - keep) * sent;
    }
    dc = sent + through_h;
    if (v.peephole) {
      const auto peephole = peephole_of<T, typename CellMath::Peephole>(v, H_, unit_);
      CellMath::backward_state(in.s, in.c_prev, dc, da, &peephole);
    } else {
      CellMath::backward_state(in.s, in.c_prev, dc, da, nullptr);
    }
    if (d_.dpeephole) {
      Acc* sums = as<Acc>(d_.dpeephole) + at(b, 3 * H_, unit_);
      sums[0] += da.i * in.c_prev;
      sums[H_] += da.f * in.c_prev;
      sums[2 * H_] += da.o * c;
    }
    dc += kept;
  }
  // dc after the step, resets applied.
  LSTM_EXT_DEVICE void put_dc0(int j, int b, const Operands& in, Acc& dc) const {
    if (in.reset) dc = 0;
    if (d_.dc0 && j + 1 == steps_.T) as<T>(d_.dc0)[at(b, H_, unit_)] = from_acc<T>(dc);
  }

 private:
  LSTM_EXT_DEVICE int64_t time_of(int j) const {
    return j == steps_.T ? -1 : steps_.step_at(steps_.T - 1 - j);
  }

  int H_;
  const BackwardArgs::Direction& d_;
  const Steps& steps_;
  int unit_;
};

}  // namespace lstm_ext
