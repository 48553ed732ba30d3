// A step of one hidden unit backward; see cells.cuh.
#pragma once

#include "cuda/cells.cuh"

namespace lstm_ext {

// Whether a gradient of h waits for another step.
template <bool kVariants>
LSTM_EXT_DEVICE bool carries(const BackwardArgs::Direction& d, const Walk& walk) {
  return walk.ragged() || (kVariants && d.variants.zoneout_h());
}

// A step as backward sees it: the j-th taken backwards is the (T - 1 - j)-th of forward; step T is
// the one product more that makes dh0, and no sequence's.
LSTM_EXT_DEVICE Turn turn_back(const Walk& walk, int j, int b) {
  if (j < walk.T()) return walk.turn(walk.step_at(walk.T() - 1 - j), b);
  Turn none = {};
  none.t = -1;
  none.b = b;
  return none;
}

// Gradient of the h that the j-th step made: from the steps after, which is the product and at a
// sequence's last step dh_n, and from the outputs, dy. A sequence that has not reached its last
// step (or has left its first behind) takes no step: what it has is carried; so is what reaches the
// step before through zoneout. Column `unit` of `width`.
template <class T, bool kVariants, class Acc>
LSTM_EXT_DEVICE Acc gradient_of_h(const BackwardArgs::Direction& d, const Walk& walk, int j,
                                  const Turn& turn, int width, int unit, Acc product, Acc dy,
                                  Acc& carry) {
  const Variants& v = d.variants;
  Acc sum = j > 0 ? product : Acc(0);
  if constexpr (kVariants)
    if (v.h_dropout) sum *= as<Acc>(v.h_dropout)[at(turn.b, width, unit)];
  if (j == 0 && d.dh_n) sum += to_acc(as<T>(d.dh_n)[at(turn.b, width, unit)]);
  if (!carries<kVariants>(d, walk)) return sum + dy;
  if (j > 0) sum += carry;
  carry = turn.active ? Acc(0) : sum;
  sum += dy;
  if constexpr (kVariants)
    if (turn.active && v.zoneout_h()) {
      const Acc keep = kept_part<Acc>(v.keep_h, v.keep_h_all, at(turn.row, width, unit));
      carry = turn.reset ? Acc(0) : keep * sum;
      return (1 - keep) * sum;
    }
  return sum;
}

template <class Arithmetic, bool kVariants = false, bool kProjects = true>
class BackwardUnit {
 public:
  using CellMath = typename CellOf<Arithmetic>::type;
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  // What can be on its way while the product runs.
  struct Operands {
    typename CellMath::Gates s;
    Acc c, c_prev, dy, dcell;
  };
  // The gradients of the gates i, f, g, o.
  struct Result {
    T dgates[4];  // as stored
    T next[4];    // as the next product reads them
  };

  // A unit past the last must be asked for nothing.
  LSTM_EXT_DEVICE BackwardUnit(const BackwardArgs& args, const BackwardArgs::Direction& d,
                               const Walk& walk, int unit)
      : d_(d),
        walk_(walk),
        gates_(as<Acc>(d.gates) + unit),
        c_seq_(as<Acc>(d.c_seq) + unit),
        dy_(as<T>(d.dy) + unit),
        dcells_(as<T>(d.dcells) + unit),
        dgates_(as<T>(d.dgates) + unit),
        dy_stride_(int(d.dy_stride)),
        H_(args.H),
        unit_(unit) {}

  // Gradient of c before the first step.
  LSTM_EXT_DEVICE Acc first_dc(int b) const { return at_or_zero(as<T>(d_.dc_n), at(b, H_, unit_)); }

  // Of a turn that is active: its gates i, f, g, o, each H behind the one before; c after it, and
  // before it unless it is the sequence's first; the gradients of its outputs.
  LSTM_EXT_DEVICE const Acc* gates(const Turn& turn) const {
    return gates_ + at(turn.row, 4 * H_, 0);
  }
  LSTM_EXT_DEVICE const Acc* c_after(unsigned row) const { return c_seq_ + at(row, H_, 0); }
  LSTM_EXT_DEVICE Acc first_c(const Turn& turn) const {
    return at_or_zero(as<T>(d_.c0), at(turn.b, H_, unit_));
  }
  // With a projection, dy is in the gradient that comes from the step's other kernel.
  LSTM_EXT_DEVICE bool has_dy() const { return d_.dy && !projects(); }
  // As it is; read whether or not there is any (and wanted), for what is read in a branch is waited
  // for at its end.
  LSTM_EXT_DEVICE T dy_ahead(const Turn& turn, bool wanted) const {
    return *(wanted && has_dy() ? dy(turn) : as<T>(d_.w_hh));
  }
  LSTM_EXT_DEVICE Acc dcell(const Turn& turn) const {
    return d_.dcells ? to_acc(dcells_[at(turn.row, H_, 0)]) : 0;
  }

  // Of any turn of turn_back.
  LSTM_EXT_DEVICE Operands load(const Turn& turn) const {
    Operands in = {};
    if (!turn.active) return in;
    const Acc* s = gates(turn);
    in.s = {s[0], s[H_], s[2 * H_], s[3 * H_]};
    in.c = *c_after(turn.row);
    if (!turn.reset) in.c_prev = turn.first ? first_c(turn) : *c_after(walk_.row_before(turn));
    if (has_dy()) in.dy = to_acc(*dy(turn));
    in.dcell = dcell(turn);
    return in;
  }
  // The gates and c of a turn that is active; row_before: that of the step before, if it has one.
  template <class Words>
  LSTM_EXT_DEVICE void fetch(Words& words, int slot, const Turn& turn, unsigned row_before) const {
    const Acc* s = gates(turn);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) words.fetch(slot, gate, s + gate * H_);
    words.fetch(slot, 4, c_after(turn.row));
    if (!turn.first) words.fetch(slot, 5, c_after(row_before));
  }
  // As load(), with what was fetched; dy: of dy_ahead().
  template <class Words>
  LSTM_EXT_DEVICE Operands fetched(const Words& words, int slot, const Turn& turn, T dy) const {
    Operands in = {};
    if (!turn.active) return in;
    in.s = {words.get(slot, 0), words.get(slot, 1), words.get(slot, 2), words.get(slot, 3)};
    in.c = words.get(slot, 4);
    if (!turn.reset) in.c_prev = turn.first ? first_c(turn) : words.get(slot, 5);
    if (has_dy()) in.dy = to_acc(dy);
    in.dcell = dcell(turn);
    return in;
  }

  // Step j. product: dgates W_hh of the step before in this order, or with a projection the whole
  // gradient of h. dc and carry become those after the step.
  LSTM_EXT_DEVICE Result compute(int j, const Turn& turn, Acc product, const Operands& in, Acc& dc,
                                 Acc& carry) const {
    const Acc dh = gradient(j, turn, product, in.dy, carry);
    if (j == walk_.T()) return put_dh0(turn, dh, dc);
    typename CellMath::Gates da = {};
    if (turn.active) {
      const Acc c = made_c(in), tanh_c = CellMath::tanh_of(c);
      const Acc through_h = CellMath::backward_output(in.s, tanh_c, dh, da);
      put_cell_out(turn, in.s.o * tanh_c);
      state(turn, in, c, through_h, dc, da);
    }
    put_dc0(j, turn, dc);
    return rounded(turn, da);
  }

  // The same in two steps: all that does not wait for the product, and the rest. Not with variants.
  struct Prepared {
    typename CellMath::Slopes slopes;
    Acc dy, dcell;
  };
  LSTM_EXT_DEVICE Prepared prepare(const Turn& turn, const Operands& in) const {
    static_assert(!kVariants, "a cell without variants");
    Prepared prepared = {};
    prepared.dy = in.dy;
    prepared.dcell = in.dcell;
    if (turn.active) prepared.slopes = CellMath::slopes(in.s, CellMath::tanh_of(in.c), in.c_prev);
    return prepared;
  }
  LSTM_EXT_DEVICE Result finish(int j, const Turn& turn, Acc product, const Prepared& in, Acc& dc,
                                Acc& carry) const {
    const Acc dh = gradient(j, turn, product, in.dy, carry);
    if (j == walk_.T()) return put_dh0(turn, dh, dc);
    typename CellMath::Gates da = {};
    if (turn.active) {
      dc += in.dcell;
      CellMath::backward(in.slopes, dh, dc, da);
    }
    put_dc0(j, turn, dc);
    return rounded(turn, da);
  }

  // What is kept of step j.
  LSTM_EXT_DEVICE void store(int j, const Turn& turn, const Result& result) const {
    if (j == walk_.T() || (!turn.active && walk_.packed())) return;  // it has no row
    T* dgates = dgates_ + at(turn.row, 4 * H_, 0);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) dgates[gate * H_] = result.dgates[gate];
  }

  // ---- the parts of a step

  // Of the h that the step made.
  LSTM_EXT_DEVICE Acc gradient(int j, const Turn& turn, Acc product, Acc dy, Acc& carry) const {
    if (projects()) return product;
    return gradient_of_h<T, kVariants>(d_, walk_, j, turn, H_, unit_, product, dy, carry);
  }
  // c as h was made of it.
  LSTM_EXT_DEVICE Acc made_c(const Operands& in) const {
    if (kVariants && d_.variants.zoneout_c()) return in.s.f * in.c_prev + in.s.i * in.s.g;
    return in.c;
  }
  // What W_hr was multiplied with.
  LSTM_EXT_DEVICE void put_cell_out(const Turn& turn, Acc out) const {
    if (kVariants && d_.cell_out) as<T>(d_.cell_out)[at(turn.row, H_, unit_)] = from_acc<T>(out);
  }
  // From the gradient that reached c through h: what is left of da, and dc of the step before.
  LSTM_EXT_DEVICE void state(const Turn& turn, const Operands& in, Acc c, Acc through_h, Acc& dc,
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
      const Acc keep = kept_part<Acc>(v.keep_c, v.keep_c_all, at(turn.row, H_, unit_));
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
      Acc* sums = as<Acc>(d_.dpeephole) + at(turn.b, 3 * H_, unit_);
      sums[0] += da.i * in.c_prev;
      sums[H_] += da.f * in.c_prev;
      sums[2 * H_] += da.o * c;
    }
    dc += kept;
  }
  // After the last step, whose h has no cell.
  LSTM_EXT_DEVICE Result put_dh0(const Turn& turn, Acc dh, Acc dc) const {
    const int64_t state = at(turn.b, H_, unit_);
    if (d_.dh0 && !projects()) as<T>(d_.dh0)[state] = from_acc<T>(dh);
    if (d_.dc0 && walk_.T() == 0) as<T>(d_.dc0)[state] = from_acc<T>(dc);
    return {};
  }
  LSTM_EXT_DEVICE Result rounded(const Turn& turn, const typename CellMath::Gates& da) const {
    Result result = {};
    const Acc gates[4] = {da.i, da.f, da.g, da.o};
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      result.dgates[gate] = from_acc<T>(gates[gate]);
      result.next[gate] =
          turn.reset ? from_acc<T>(Acc(0)) : Arithmetic::round_state(result.dgates[gate]);
    }
    return result;
  }
  // dc after the step, resets applied.
  LSTM_EXT_DEVICE void put_dc0(int j, const Turn& turn, Acc& dc) const {
    if (turn.reset) dc = 0;
    if (d_.dc0 && j + 1 == walk_.T()) as<T>(d_.dc0)[at(turn.b, H_, unit_)] = from_acc<T>(dc);
  }

 private:
  LSTM_EXT_DEVICE bool projects() const { return kProjects && d_.hidden; }
  LSTM_EXT_DEVICE const T* dy(const Turn& turn) const { return dy_ + at(turn.row, dy_stride_, 0); }

  const BackwardArgs::Direction& d_;
  const Walk& walk_;
  // Of this unit, at row 0, if the direction has them.
  const Acc *gates_, *c_seq_;
  const T *dy_, *dcells_;
  T* dgates_;  // not with a layer norm
  int dy_stride_, H_, unit_;
};

}  // namespace lstm_ext
