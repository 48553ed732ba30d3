// A step of one hidden unit forward; see cells.cuh.
#pragma once

#include "cuda/cells.cuh"

namespace lstm_ext {

// h after a step, from the one that the step made, in column `unit` of `width`.
template <class T, class Acc>
LSTM_EXT_DEVICE T zoned_out_h(const ForwardArgs::Direction& d, const Walk& walk, const Turn& turn,
                              int width, int unit, Acc fresh) {
  const Variants& v = d.variants;
  if (!v.zoneout_h()) return from_acc<T>(fresh);
  Acc old = 0;
  if (turn.first)
    old = turn.reset ? Acc(0) : at_or_zero(as<T>(d.h0), at(turn.b, width, unit));
  else if (!turn.reset)
    old = to_acc(as<T>(d.y)[walk.row_before(turn) * d.y_stride + unit]);
  const Acc keep = kept_part<Acc>(v.keep_h, v.keep_h_all, at(turn.row, width, unit));
  return from_acc<T>(keep * old + (1 - keep) * fresh);
}
// h as the product reads it.
template <class Arithmetic, class T>
LSTM_EXT_DEVICE T product_input(const Variants& v, int b, int width, int unit, T h) {
  using Acc = typename Arithmetic::Acc;
  if (v.h_dropout) h = from_acc<T>(to_acc(h) * as<Acc>(v.h_dropout)[at(b, width, unit)]);
  return Arithmetic::round_state(h);
}

template <class Arithmetic, bool kVariants = false, bool kProjects = true>
class ForwardUnit {
 public:
  using CellMath = typename CellOf<Arithmetic>::type;
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  // What can be on its way while the product runs.
  struct Operands {
    Acc gx[4];
    Acc c;  // before the step, resets applied
    bool reset_follows;
  };
  // What a step made.
  struct Result {
    typename CellMath::Gates s;
    T h;     // as stored
    T next;  // as the next step's product reads it; with a projection its other kernel makes that
  };

  // A unit past the last must be asked for nothing.
  LSTM_EXT_DEVICE ForwardUnit(const ForwardArgs& args, const ForwardArgs::Direction& d,
                              const Walk& walk, int unit)
      : d_(d),
        walk_(walk),
        gx_(as<Acc>(d.gx) + unit),
        gates_(as<Acc>(d.gates) + unit),
        c_seq_(as<Acc>(d.c_seq) + unit),
        y_(as<T>(kProjects && d.hidden ? nullptr : d.y) + unit),
        y_stride_(int(d.y_stride)),
        H_(args.H),
        unit_(unit),
        hidden_K_(args.hidden_K) {
    if (unit < H_)
      for (int gate = 0; gate < 4; ++gate) {
        if (d.b_ih) bias_[gate] += to_acc(as<T>(d.b_ih)[gate * H_ + unit]);
        if (d.b_hh) bias_[gate] += to_acc(as<T>(d.b_hh)[gate * H_ + unit]);
      }
  }

  LSTM_EXT_DEVICE Acc first_c(int b) const { return at_or_zero(as<T>(d_.c0), at(b, H_, unit_)); }

  // Of a turn that is active: its gates i, f, g, o, each H behind the one before.
  LSTM_EXT_DEVICE const Acc* gx(const Turn& turn) const { return gx_ + at(turn.row, 4 * H_, 0); }

  // c: what the step before left. reset_follows: whether the state is zero before the next step.
  // fetches: gx comes from fetched().
  LSTM_EXT_DEVICE Operands load(const Turn& turn, Acc c, bool reset_follows,
                                bool fetches = false) const {
    Operands in = {};
    in.reset_follows = reset_follows;
    in.c = turn.reset ? Acc(0) : c;
    if (!fetches && turn.active) {
      const Acc* of_turn = gx(turn);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) in.gx[gate] = of_turn[gate * H_];
    }
    return in;
  }

  // gx of a turn that is active, and what was fetched of it.
  template <class Words>
  LSTM_EXT_DEVICE void fetch(Words& words, int slot, const Turn& turn) const {
    const Acc* of_turn = gx(turn);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) words.fetch(slot, gate, of_turn + gate * H_);
  }
  template <class Words>
  LSTM_EXT_DEVICE void fetched(const Words& words, int slot, Operands& in) const {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) in.gx[gate] = words.get(slot, gate);
  }

  // A step from the product's sums. c becomes that after the step; before() is the h that this
  // step's product has read.
  template <class Before>
  LSTM_EXT_DEVICE Result compute(const Turn& turn, const Acc (&sum)[4], const Operands& in, Acc& c,
                                 Before before) const {
    Result result = {};
    if (turn.active) {
      const Acc fresh = state(turn, sum, in, result.s, c);
      output(turn, in, CellMath::forward_output(result.s, fresh), result);
    } else {
      c = in.c;
      result.next = in.reset_follows || projects() ? from_acc<T>(Acc(0)) : before();
    }
    return result;
  }

  // What is kept of a step; c: after it.
  LSTM_EXT_DEVICE void store(const Turn& turn, const Result& result, Acc c) const {
    if (turn.active) {
      store_state(turn, result.s, c);
      store_output(turn, result.h);
    } else if (!walk_.packed()) {  // a packed batch has no row for it
      if (!projects()) y_[at(turn.row, y_stride_, 0)] = from_acc<T>(Acc(0));
      if (d_.c_seq) c_seq_[at(turn.row, H_, 0)] = 0;
    }
  }

  // ---- the parts of a step that is taken

  // The gates, and c after the step; returns c as h is made of it.
  LSTM_EXT_DEVICE Acc state(const Turn& turn, const Acc (&sum)[4], const Operands& in,
                            typename CellMath::Gates& s, Acc& c) const {
    const typename CellMath::Gates a = {
        sum[0] + (in.gx[0] + bias_[0]), sum[1] + (in.gx[1] + bias_[1]),
        sum[2] + (in.gx[2] + bias_[2]), sum[3] + (in.gx[3] + bias_[3])};
    Acc fresh;
    if constexpr (kVariants) {
      const Variants& v = d_.variants;
      // Not a pointer that may be null: the peepholes would have to lie in memory.
      if (v.peephole) {
        const auto peephole = peephole_of<T, typename CellMath::Peephole>(v, H_, unit_);
        CellMath::forward_state(a, in.c, s, fresh, &peephole);
      } else {
        CellMath::forward_state(a, in.c, s, fresh, nullptr);
      }
      c = fresh;
      if (v.zoneout_c()) {
        const int64_t mask = at(turn.row, H_, unit_);
        c = CellMath::zoneout(kept_part<Acc>(v.keep_c, v.keep_c_all, mask), in.c, fresh);
      }
    } else {
      CellMath::forward_state(a, in.c, s, fresh, nullptr);
      c = fresh;
    }
    return fresh;
  }
  // What follows from h = o * tanh(c).
  LSTM_EXT_DEVICE void output(const Turn& turn, const Operands& in, Acc h, Result& result) const {
    const T zero = from_acc<T>(Acc(0));
    if (kVariants && !projects()) {
      result.h = zoned_out_h<T>(d_, walk_, turn, H_, unit_, h);
      result.next = in.reset_follows
                        ? zero
                        : product_input<Arithmetic>(d_.variants, turn.b, H_, unit_, result.h);
    } else {
      result.h = from_acc<T>(h);
      result.next = in.reset_follows ? zero : Arithmetic::round_state(result.h);
    }
  }
  LSTM_EXT_DEVICE void store_state(const Turn& turn, const typename CellMath::Gates& s,
                                   Acc c) const {
    if (d_.gates) {
      Acc* gates = gates_ + at(turn.row, 4 * H_, 0);
      gates[0] = s.i;
      gates[H_] = s.f;
      gates[2 * H_] = s.g;
      gates[3 * H_] = s.o;
    }
    if (d_.c_seq) c_seq_[at(turn.row, H_, 0)] = c;
    if (turn.last) as<T>(d_.c_n)[at(turn.b, H_, unit_)] = from_acc<T>(c);
  }
  LSTM_EXT_DEVICE void store_output(const Turn& turn, T h) const {
    if (projects()) {
      as<T>(d_.hidden)[at(turn.b, hidden_K_, unit_)] = Arithmetic::round_state(h);
      return;
    }
    y_[at(turn.row, y_stride_, 0)] = h;
    if (turn.last) as<T>(d_.h_n)[at(turn.b, H_, unit_)] = h;
  }

 private:
  LSTM_EXT_DEVICE bool projects() const { return kProjects && d_.hidden; }

  const ForwardArgs::Direction& d_;
  const Walk& walk_;
  // Of this unit, at row 0, if the direction has them; y_ and y_stride_ not with a projection.
  const Acc* gx_;
  Acc* gates_;  // may be gx_
  Acc* c_seq_;
  T* y_;
  int y_stride_, H_, unit_, hidden_K_;
  Acc bias_[4] = {};
};

}  // namespace lstm_ext
