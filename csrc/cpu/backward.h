// Backward of a whole sequence through time, one direction of one layer, of one group (groups.h).
//
// Steps are walked against the order forward took them. Each thread owns a slice of the hidden
// units: it turns dh_t, dc_t into its columns of dgates_t, waits for the others' columns, and
// multiplies all of dgates_t with its columns of W_hh to get its slice of dh_{t-1}. One barrier a
// step (two with a projection): dgates of the steps at hand have memory of their own. With a layer
// norm the cell is walked by whole sequences instead, as in forward: a barrier more.
//
// The gradients of x and of the weights are made beside it, of some steps at a time (gradients.h),
// or by the caller.
#pragma once

#include "backward_cells.h"
#include "gradients.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// E: the element of products, S: the storage type (operand.h). With pairs there are no variants.
template <class E, class S>
class Backward {
  using A = Acc<E>;
  using O = Stored<E>;
  using V = Vec<A>;
  static constexpr int L = Lanes<A>::kCount;

 public:
  static Plan plan(const LstmBackward& p) {
    return make_plan(p.threads, p.steps, p.steps.B, blocks_of<A>(p.H), work_of_step(p), columns(p),
                     step_weights(p));
  }

  // As in Forward.
  static bool side_by_side(const LstmBackward& p) {
    return directions_share(p.threads, p.steps, work_of_step(p), step_weights(p));
  }

  Backward(const LstmBackward& p, Range batch, int slices, Arena& arena)
      : p_(p),
        batch_(batch),
        H_(p.H),
        P_(p.P),
        K_(p.w_hh ? 4 * p.H : 0),
        normed_(p.variants.gamma_hh),
        varied_(p.variants.peephole || p.variants.zoneout_h() || p.variants.zoneout_c() ||
                p.dout_seq || p.tangents.gates),
        gradients_(p, batch, slices, arena),
        dgates_(p.dw_hh ? gradients_.dgates() : static_cast<O*>(p.dgates)),
        h_prev_(p.dw_hh ? gradients_.h_prev() : static_cast<S*>(p.h_prev)),
        cells_(p, batch, slices, arena, dgates_) {
    meet_ = take_barrier(arena, slices);
    packed_hh_ = arena.take<E>(blocks_of<A>(P_) * depth_of<E>(K_) * L);
    packed_hr_ = arena.take<E>(p.w_hr ? blocks_of<A>(H_) * depth_of<E>(P_) * L : 0);
    members_ = Member<E>::take(arena, slices, batch.size());
  }

  static void combine(Backward* parts, int groups, Barrier& everyone, int threads, int thread) {
    if (!parts[0].p_.dw_hh) return;
    everyone.wait(thread, threads);
    const auto other = [&](int i) -> const Gradients<E, S>& { return parts[i + 1].gradients_; };
    parts[0].gradients_.add(groups - 1, other, threads, thread);
  }

  void work(int slices, int slice) {
    Member<E>& m = members_[slice];
    m.place(slice, slices, H_, P_);
    if (K_) {
      pack_matrix(static_cast<const S*>(p_.w_hh), P_, K_, false, m.proj, packed_hh_);
    }
    if (p_.w_hr) {
      pack_matrix(static_cast<const S*>(p_.w_hr), H_, P_, false, m.units, packed_hr_);
    }
    if (p_.dx) gradients_.pack(slices, slice);
    cells_.start(m);
    const auto meet = [&] { meet_->wait(slice, slices); };
    meet();
    StepsAtHand at_hand{p_.steps.T, p_.steps.T, 0, 0};
    int64_t filled = 0;  // rows at hand of the steps walked already
    for (int64_t i = p_.steps.T - 1; i >= 0; --i) {
      const int64_t t = p_.steps.step_at(i);
      const int64_t count = collect(p_.steps, t, batch_, m.rows);
      if (p_.dw_hh) {
        if (i < at_hand.begin) {
          at_hand = gradients_.steps_before(at_hand.begin);
          filled = 0;
        }
        gradients_.put_x(at_hand, m.rows, count, filled, slices, slice);
        filled += count;
      } else {
        for (int64_t r = 0; r < count; ++r) m.rows[r].slot = m.rows[r].row;
      }
      if (h_prev_) {
        for (int64_t r = 0; r < count; ++r) put_h_prev(m.rows[r], m.proj);
      }
      if (p_.w_hr) {
        through_projection(m, count, meet);
      } else if (!normed_) {
        varied_ ? cells_.varied_cells(m, count) : cells_.plain_cells(m, count);
      }
      meet();
      if (normed_) {
        const Range own = share(count, slices, slice);
        for (int64_t r = own.begin; r < own.end; ++r) cells_.normed_cell(m.rows[r], slice);
        meet();
      }
      const O* da = normed_ ? static_cast<const O*>(p_.dproduct) : dgates_;
      for (int64_t r = 0; r < count; ++r) m.a[r] = as_elements<E>(da + m.rows[r].slot * 4 * H_);
      for_panels(m.proj, m, count, depth_of<E>(K_), packed_hh_, i & 1,
                 [&](int64_t block, int vectors, Range part, const A* sums) {
                   for (int64_t r = part.begin; r < part.end; ++r) {
                     for (int v = 0; v < vectors; ++v, sums += L) {
                       cells_.put_dh(m.rows[r], (block + v) * L, load_full<A>(sums));
                     }
                   }
                 });
      if (p_.dw_hh && i == at_hand.begin) {
        gradients_.make(at_hand, m, slices, slice);
        meet();
      }
    }
    cells_.finish(m);
  }

 private:
  // Of the weights whose gradients are made here.
  static int64_t columns(const LstmBackward& p) { return (p.dw_hh ? p.I : 0) + p.P; }
  static int64_t step_weights(const LstmBackward& p) { return p.P * 4 * p.H * int64_t(sizeof(O)); }
  static int64_t work_of_step(const LstmBackward& p) {
    const int64_t gradients = (p.dw_hh ? columns(p) : 0) + (p.dx ? p.I : 0);
    return work_of<A>(p.steps.B, p.H, p.P + gradients);
  }

  // dr_t, then its product with W_hr gives the gradient of o * tanh(c).
  template <class Meet>
  void through_projection(const Member<E>& m, int64_t count, const Meet& meet) {
    O* dr = static_cast<O*>(p_.dr);
    const int64_t stride = depth_of<E>(P_) * Operand<E>::kDepth;
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = m.rows[r];
      for (int64_t j = m.proj.begin * L; j < m.proj.end * L; j += L) {
        store<A>(dr + row.row * stride + j, cells_.dh_fresh(row, j), stride - j);  // 0 past P
      }
      m.a[r] = as_elements<E>(dr + row.row * stride);
    }
    meet();
    for_panels(m.units, m, count, depth_of<E>(P_), packed_hr_, false,
               [&](int64_t block, int vectors, Range part, const A* sums) {
                 for (int64_t r = part.begin; r < part.end; ++r) {
                   for (int v = 0; v < vectors; ++v, sums += L) {
                     const int64_t j = (block + v) * L;
                     const V dout = load_full<A>(sums);
                     if (normed_) {
                       cells_.put_dout(m.rows[r], j, dout);
                     } else {
                       cells_.cell(m.rows[r], j, dout);
                     }
                   }
                 }
               });
  }

  void put_h_prev(const Row& row, Range columns) {
    S* h_prev = h_prev_ + row.slot * P_;
    if (row.reset) {
      const int64_t begin = columns.begin * L, end = std::min(P_, columns.end * L);
      if (begin < end) std::memset(h_prev + begin, 0, (end - begin) * sizeof(S));
    } else {
      const S* from = row.first ? static_cast<const S*>(p_.h0) + row.b * P_
                                : static_cast<const S*>(p_.y) + row.prev * p_.y_stride;
      if (!p_.variants.h_dropout) return copy_blocks<A>(from, h_prev, columns, P_);
      const A* factors = static_cast<const A*>(p_.variants.h_dropout) + row.b * P_;
      for (int64_t j = columns.begin * L; j < columns.end * L; j += L) {
        store<A>(h_prev + j, load<A>(from + j, P_ - j) * load<A>(factors + j, P_ - j), P_ - j);
      }
    }
  }

  const LstmBackward& p_;
  const Range batch_;
  const int64_t H_, P_;
  const int64_t K_;                  // length of the recurrent product: 4H, or 0 without one
  const bool normed_;                // layer norm
  const bool varied_;                // variants of the cell beside it, tangents, more outputs
  const Gradients<E, S> gradients_;  // if p_.dw_hh
  O* const dgates_;  // [.., 4H]: rows by Row::slot, of all steps or of those at hand
  S* const h_prev_;  // [.., P], or null
  BackwardCells<E, S> cells_;
  Barrier* meet_;
  Member<E>* members_;
  E* packed_hh_;  // [blocks of P][depth of 4H][lanes]
  E* packed_hr_;  // [blocks of H][depth of P][lanes]
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
