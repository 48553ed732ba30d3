// Backward of a whole sequence through time, one direction of one layer, by one team of threads.
//
// Steps are walked against the order forward took them. Each thread owns a slice of the hidden
// units: it turns dh_t, dc_t into its columns of dgates_t, waits for the others' columns, and
// multiplies all of dgates_t with its columns of W_hh to get its slice of dh_{t-1}. One barrier a
// step (two with a projection): dgates has memory of its own for every step.
//
// Weight gradients are not formed here: they are one matrix product each over all steps.
#pragma once

#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

template <class A, class S>
class Backward {
  using V = Vec<A>;
  using LstmCell = Cell<Math<A>>;
  static constexpr int L = Lanes<A>::kCount;

 public:
  explicit Backward(const LstmBackward& p)
      : p_(p),
        B_(p.steps.B),
        H_(p.H),
        P_(p.P),
        K_(p.w_hh ? 4 * p.H : 0),
        h_stride_(blocks_of<A>(p.P) * L),
        c_stride_(blocks_of<A>(p.H) * L) {
    Arena arena(p.workspace);
    members_ = arena.take<Member<A>>(p.threads);
    barriers_ = arena.take<Barrier>(p.threads + 1);
    packed_hh_ = arena.take<A>(blocks_of<A>(P_) * K_ * L);
    packed_hr_ = arena.take<A>(p.w_hr ? blocks_of<A>(H_) * P_ * L : 0);
    dh_ = arena.take<A>(B_ * h_stride_);
    dc_ = arena.take<A>(B_ * c_stride_);
    Member<A>::take(arena, p.threads, B_, members_);
    workspace_ = arena.used();
  }

  int64_t workspace() const { return workspace_; }

  void run() {
    run_planned(
        p_.threads, barriers_, [this](int threads) { return plan(threads); },
        [this](const Plan& plan, int thread) { work(plan, thread); });
  }

 private:
  Plan plan(int threads) const {
    return make_plan(threads, B_, blocks_of<A>(H_), B_ * std::max<int64_t>(K_, 4 * H_) * P_);
  }

  void work(const Plan& plan, int thread) {
    Member<A>& m = members_[thread];
    m.place(plan, thread, B_, H_, P_);
    if (K_) {
      pack_matrix(static_cast<const S*>(p_.w_hh), P_, K_, false, m.proj, m, plan.groups,
                  packed_hh_);
    }
    if (p_.w_hr) {
      pack_matrix(static_cast<const S*>(p_.w_hr), H_, P_, false, m.units, m, plan.groups,
                  packed_hr_);
    }
    start(m);
    barriers_[plan.groups].wait(plan.threads());
    Barrier& meet = barriers_[m.group];
    for (int64_t i = p_.steps.T - 1; i >= 0; --i) {
      const int64_t count = collect(p_.steps, p_.steps.step_at(i), m.batch, m.rows);
      if (p_.h_prev) {
        for (int64_t r = 0; r < count; ++r) put_h_prev(m.rows[r], m.proj);
      }
      if (p_.w_hr) {
        through_projection(m, count, meet, plan);
      } else {
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t u = m.units.begin; u < m.units.end; ++u) {
            cell(m.rows[r], u * L, dh_total(m.rows[r], u * L));
          }
        }
      }
      meet.wait(plan.slices);
      const A* dgates = static_cast<const A*>(p_.dgates);
      for (int64_t r = 0; r < count; ++r) m.a[r] = dgates + m.rows[r].row * 4 * H_;
      for_panels(m.proj, m, count, K_, packed_hh_,
                 [&](int64_t block, int vectors, int64_t r, const A* sums) {
                   const Row& row = m.rows[r];
                   A* dh = dh_ + row.b * h_stride_ + block * L;
                   for (int v = 0; v < vectors; ++v) {
                     store_full<A>(dh + v * L,
                                   row.reset ? broadcast<A>(A(0)) : load_full<A>(sums + v * L));
                   }
                 });
    }
    finish(m);
  }

  // Gradient of h_t in columns j .. j+L: what later steps sent back and what the output received.
  V dh_total(const Row& row, int64_t j) const {
    V dh = load_full<A>(dh_ + row.b * h_stride_ + j);
    if (p_.dy) dh += load<A>(static_cast<const S*>(p_.dy) + row.row * p_.dy_stride + j, P_ - j);
    return dh;
  }

  // dr_t, then its product with W_hr gives the gradient of o * tanh(c).
  void through_projection(const Member<A>& m, int64_t count, Barrier& meet, const Plan& plan) {
    A* dr = static_cast<A*>(p_.dr);
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = m.rows[r];
      for (int64_t j = m.proj.begin * L; j < m.proj.end * L; j += L) {
        store<A>(dr + row.row * P_ + j, dh_total(row, j), P_ - j);
      }
      m.a[r] = dr + row.row * P_;
    }
    meet.wait(plan.slices);
    for_panels(m.units, m, count, P_, packed_hr_,
               [&](int64_t block, int vectors, int64_t r, const A* sums) {
                 for (int v = 0; v < vectors; ++v) {
                   cell(m.rows[r], (block + v) * L, load_full<A>(sums + v * L));
                 }
               });
  }

  void cell(const Row& row, int64_t j, V dh) {
    const int64_t n = H_ - j;
    const A* gates = static_cast<const A*>(p_.gates) + row.row * 4 * H_ + j;
    const A* c_seq = static_cast<const A*>(p_.c_seq);
    const typename LstmCell::Gates s{load<A>(gates, n), load<A>(gates + H_, n),
                                     load<A>(gates + 2 * H_, n), load<A>(gates + 3 * H_, n)};
    const V c = load<A>(c_seq + row.row * H_ + j, n);
    V c_prev = broadcast<A>(A(0));
    if (row.first && !row.reset) {
      c_prev = load<A>(static_cast<const S*>(p_.c0) + row.b * H_ + j, n);
    } else if (!row.reset) {
      c_prev = load<A>(c_seq + row.prev * H_ + j, n);
    }
    A* dc_state = dc_ + row.b * c_stride_ + j;
    V dc = load_full<A>(dc_state);
    if (p_.dcells) dc += load<A>(static_cast<const S*>(p_.dcells) + row.row * H_ + j, n);
    typename LstmCell::Gates da;
    LstmCell::backward(s, c, c_prev, dh, dc, da);
    store_full<A>(dc_state, row.reset ? broadcast<A>(A(0)) : dc);
    A* dgates = static_cast<A*>(p_.dgates) + row.row * 4 * H_ + j;
    store<A>(dgates, da.i, n);
    store<A>(dgates + H_, da.f, n);
    store<A>(dgates + 2 * H_, da.g, n);
    store<A>(dgates + 3 * H_, da.o, n);
  }

  void put_h_prev(const Row& row, Range columns) {
    S* h_prev = static_cast<S*>(p_.h_prev) + row.row * P_;
    if (row.reset) {
      const int64_t begin = columns.begin * L, end = std::min(P_, columns.end * L);
      if (begin < end) std::memset(h_prev + begin, 0, (end - begin) * sizeof(S));
    } else {
      const S* from = row.first ? static_cast<const S*>(p_.h0) + row.b * P_
                                : static_cast<const S*>(p_.y) + row.prev * p_.y_stride;
      copy_blocks<A>(from, h_prev, columns, P_);
    }
  }

  void start(const Member<A>& m) {
    fill(m.batch, m.proj, static_cast<const S*>(p_.dh_n), P_, dh_, h_stride_);
    fill(m.batch, m.units, static_cast<const S*>(p_.dc_n), H_, dc_, c_stride_);
  }

  void fill(Range batch, Range blocks, const S* from, int64_t columns, A* to, int64_t stride) {
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      for (int64_t j = blocks.begin * L; j < blocks.end * L; j += L) {
        store_full<A>(to + b * stride + j,
                      from ? load<A>(from + b * columns + j, columns - j) : broadcast<A>(A(0)));
      }
    }
  }

  void finish(const Member<A>& m) {
    for (int64_t b = m.batch.begin; b < m.batch.end; ++b) {
      for (int64_t j = m.proj.begin * L; j < m.proj.end * L; j += L) {
        store<A>(static_cast<S*>(p_.dh0) + b * P_ + j, load_full<A>(dh_ + b * h_stride_ + j),
                 P_ - j);
      }
      for (int64_t j = m.units.begin * L; j < m.units.end * L; j += L) {
        store<A>(static_cast<S*>(p_.dc0) + b * H_ + j, load_full<A>(dc_ + b * c_stride_ + j),
                 H_ - j);
      }
    }
  }

  const LstmBackward& p_;
  const int64_t B_, H_, P_;
  const int64_t K_;  // length of the recurrent product: 4H, or 0 without one
  const int64_t h_stride_, c_stride_;
  Member<A>* members_;
  Barrier* barriers_;  // one a group, then one for the whole team
  A* packed_hh_;       // [blocks of P][4H][lanes]
  A* packed_hr_;       // [blocks of H][P][lanes]
  A* dh_;              // [B, h_stride_]: gradient of h sent back by the steps walked so far
  A* dc_;              // [B, c_stride_]: the same of c
  int64_t workspace_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
