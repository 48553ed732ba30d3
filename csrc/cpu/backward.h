// Backward of a whole sequence through time, one direction of one layer, by one team of threads.
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
  explicit Backward(const LstmBackward& p) : Backward(p, Arena(p.workspace)) {}

  int64_t workspace() const { return workspace_; }

  void run() {
    run_planned(
        p_.threads, barriers_, [this](int threads) { return plan(threads); },
        [this](const Plan& plan, int thread) { work(plan, thread); });
  }

 private:
  Backward(const LstmBackward& p, Arena&& arena)
      : p_(p),
        B_(p.steps.B),
        H_(p.H),
        P_(p.P),
        K_(p.w_hh ? 4 * p.H : 0),
        normed_(p.variants.gamma_hh),
        varied_(p.variants.peephole || p.variants.zoneout_h() || p.variants.zoneout_c()),
        gradients_(p, arena),
        dgates_(p.dw_hh ? gradients_.dgates() : static_cast<O*>(p.dgates)),
        h_prev_(p.dw_hh ? gradients_.h_prev() : static_cast<S*>(p.h_prev)),
        cells_(p, arena, dgates_) {
    members_ = arena.take<Member<E>>(p.threads);
    barriers_ = arena.take<Barrier>(p.threads + 1);
    packed_hh_ = arena.take<E>(blocks_of<A>(P_) * depth_of<E>(K_) * L);
    packed_hr_ = arena.take<E>(p.w_hr ? blocks_of<A>(H_) * depth_of<E>(P_) * L : 0);
    Member<E>::take(arena, p.threads, B_, members_);
    workspace_ = arena.used();
  }

  Plan plan(int threads) const {
    return make_plan(threads, p_.steps.T, B_, blocks_of<A>(H_),
                     B_ * std::max<int64_t>(K_, 4 * H_) * P_);
  }

  void work(const Plan& plan, int thread) {
    Member<E>& m = members_[thread];
    m.place(plan, thread, B_, H_, P_);
    if (K_) {
      pack_matrix(static_cast<const S*>(p_.w_hh), P_, K_, false, m.proj, m, plan.groups,
                  packed_hh_);
    }
    if (p_.w_hr) {
      pack_matrix(static_cast<const S*>(p_.w_hr), H_, P_, false, m.units, m, plan.groups,
                  packed_hr_);
    }
    if (p_.dx) gradients_.pack(m, plan, thread);
    cells_.start(m);
    Barrier& everyone = barriers_[plan.groups];
    everyone.wait(plan.threads());
    Barrier& meet = barriers_[m.group];
    StepsAtHand at_hand{p_.steps.T, p_.steps.T, 0, 0};
    int64_t filled = 0;  // rows at hand of the steps walked already
    for (int64_t i = p_.steps.T - 1; i >= 0; --i) {
      const int64_t t = p_.steps.step_at(i);
      const int64_t count = collect(p_.steps, t, m.batch, m.rows);
      if (p_.dw_hh) {
        if (i < at_hand.begin) {
          at_hand = gradients_.steps_before(at_hand.begin);
          filled = 0;
        }
        const int64_t before = filled + p_.steps.count(t, 0, m.batch.begin);
        gradients_.put_x(at_hand, m.rows, count, before, m.slice, plan.slices);
        filled += p_.steps.count(t, 0, B_);
      } else {
        for (int64_t r = 0; r < count; ++r) m.rows[r].slot = m.rows[r].row;
      }
      if (h_prev_) {
        for (int64_t r = 0; r < count; ++r) put_h_prev(m.rows[r], m.proj);
      }
      if (p_.w_hr) {
        through_projection(m, count, meet, plan);
      } else if (!normed_) {
        varied_ ? cells_.varied_cells(m, count) : cells_.plain_cells(m, count);
      }
      meet.wait(plan.slices);
      if (normed_) {
        const Range own = share(count, plan.slices, m.slice);
        for (int64_t r = own.begin; r < own.end; ++r) cells_.normed_cell(m.rows[r], thread);
        meet.wait(plan.slices);
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
        if (plan.groups > 1) everyone.wait(plan.threads());
        gradients_.make(at_hand, m, plan, thread);
        everyone.wait(plan.threads());
      }
    }
    cells_.finish(m);
  }

  // dr_t, then its product with W_hr gives the gradient of o * tanh(c).
  void through_projection(const Member<E>& m, int64_t count, Barrier& meet, const Plan& plan) {
    O* dr = static_cast<O*>(p_.dr);
    const int64_t stride = depth_of<E>(P_) * Operand<E>::kDepth;
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = m.rows[r];
      for (int64_t j = m.proj.begin * L; j < m.proj.end * L; j += L) {
        store<A>(dr + row.row * stride + j, cells_.dh_fresh(row, j), stride - j);  // 0 past P
      }
      m.a[r] = as_elements<E>(dr + row.row * stride);
    }
    meet.wait(plan.slices);
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
  const int64_t B_, H_, P_;
  const int64_t K_;                  // length of the recurrent product: 4H, or 0 without one
  const bool normed_;                // layer norm
  const bool varied_;                // variants of the cell beside it
  const Gradients<E, S> gradients_;  // if p_.dw_hh
  O* const dgates_;  // [.., 4H]: rows by Row::slot, of all steps or of those at hand
  S* const h_prev_;  // [.., P], or null
  BackwardCells<E, S> cells_;
  Member<E>* members_;
  Barrier* barriers_;  // one a group, then one for the whole team
  E* packed_hh_;       // [blocks of P][depth of 4H][lanes]
  E* packed_hr_;       // [blocks of H][depth of P][lanes]
  int64_t workspace_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
