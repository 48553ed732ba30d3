// What backward makes of dgates while they are in the caches, some steps at a time: the gradients
// of x, of W_ih and W_hh, and of the biases.
//
// Kept for all steps, dgates would be written to memory and read from there twice. How many steps
// are at hand follows from the problem alone, so that the order of sums does not depend on the
// number of threads.
#pragma once

#include "matmul.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// Steps begin .. end in the order in which forward took them.
struct StepsAtHand {
  int64_t begin, end;
  int64_t rows;       // that these steps have
  int64_t first_row;  // where they begin, if they lie in one piece
};

// E: the element of products, S: the storage type (operand.h).
template <class E, class S>
class Gradients {
  using A = Acc<E>;
  using O = Stored<E>;
  static constexpr int L = Lanes<A>::kCount;
  static constexpr int64_t kRows = 384;  // at hand, unless a step has more

 public:
  Gradients(const LstmBackward& p, Arena& arena)
      : p_(p),
        in_one_piece_(p.steps.offsets || (p.steps.stride_b == 1 && !p.steps.lengths)),
        rows_(std::min(std::max(kRows, p.steps.B), p.steps.T * p.steps.B)),
        row_of_(arena.take<int64_t>(p.dw_hh && !in_one_piece_ ? rows_ : 0)),
        x_(arena.take<S>(p.dw_hh && !in_one_piece_ ? rows_ * p.I : 0)),
        dgates_(arena.take<O>(p.dw_hh ? rows_ * 4 * p.H : 0)),
        h_prev_(arena.take<S>(p.dw_hh ? rows_ * p.P : 0)),
        packed_ih_(arena.take<E>(p.dx ? blocks_of<A>(p.I) * depth_of<E>(4 * p.H) * L : 0)),
        weights_(of_weights(), arena) {}

  O* dgates() const { return dgates_; }  // [rows at hand, 4H]
  S* h_prev() const { return h_prev_; }  // [rows at hand, P]

  // Of all steps before the end-th, those that are at hand together with the last.
  StepsAtHand steps_before(int64_t end) const {
    StepsAtHand steps{end, end, 0, 0};
    while (steps.begin > 0) {
      const int64_t more = p_.steps.count(p_.steps.step_at(steps.begin - 1), 0, p_.steps.B);
      if (steps.rows + more > rows_) break;
      --steps.begin;
      steps.rows += more;
    }
    const int64_t t = std::min(p_.steps.step_at(steps.begin), p_.steps.step_at(end - 1));
    steps.first_row = p_.steps.row(t, 0);
    return steps;
  }

  // Gives the sequences of a step their slots, all but its x already in place, or, with `before`
  // rows of other steps and sequences before them, puts x there, the columns of one of the slices.
  void put_x(const StepsAtHand& steps, Row* rows, int64_t count, int64_t before, int64_t slice,
             int64_t slices) const {
    if (in_one_piece_) {
      for (int64_t r = 0; r < count; ++r) rows[r].slot = rows[r].row - steps.first_row;
      return;
    }
    const Range columns = share(blocks_of<A>(p_.I), slices, slice);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t slot = rows[r].slot = before + r;
      if (slice == 0) row_of_[slot] = rows[r].row;
      copy_blocks<A>(static_cast<const S*>(p_.x) + rows[r].row * p_.I, x_ + slot * p_.I, columns,
                     p_.I);
    }
  }

  // W_ih for dx: before make, which every thread then calls with all of dgates there.
  void pack(const Member<E>& m, const Plan& plan, int thread) const {
    Member<E> member = m;
    member.group = by_columns(plan) ? 0 : thread;
    pack_matrix(static_cast<const S*>(p_.w_ih), p_.I, 4 * p_.H, false, columns(plan, thread),
                member, by_columns(plan) ? 1 : plan.threads(), packed_ih_);
  }

  void make(const StepsAtHand& steps, const Member<E>& m, const Plan& plan, int thread) const {
    if (!steps.rows) return;
    if (p_.dx) {
      const Range all{0, steps.rows};
      const Range rows = by_columns(plan) ? all : share(steps.rows, plan.threads(), thread);
      make_dx(steps.first_row, rows, columns(plan, thread), m);
    }
    const S* x = in_one_piece_ ? static_cast<const S*>(p_.x) + steps.first_row * p_.I : x_;
    weights_.part(dgates_, x, h_prev_, steps.rows, steps.end == p_.steps.T)
        .work(thread, plan.threads());
  }

 private:
  Matmul of_weights() const {
    Matmul product{};
    if (!p_.dw_hh) return product;
    product.threads = p_.threads;
    product.M = 4 * p_.H;
    product.N = p_.I;
    product.more_N = p_.P;
    product.K = rows_;
    product.a_transposed = true;
    product.out = p_.dw_ih;
    product.more_out = p_.dw_hh;
    product.sums = p_.db;
    return product;
  }

  // Threads share the columns of dx, and with them W_ih, or, of few columns, the rows.
  bool by_columns(const Plan& plan) const {
    return blocks_of<A>(p_.I) >= kPanelVectors * plan.threads();
  }

  Range columns(const Plan& plan, int thread) const {
    const int64_t blocks = blocks_of<A>(p_.I);
    return by_columns(plan) ? share(blocks, plan.threads(), thread) : Range{0, blocks};
  }

  void make_dx(int64_t first_row, Range rows, Range columns, const Member<E>& m) const {
    for (int64_t begin = rows.begin; begin < rows.end; begin += kChunkRows) {
      const int64_t count = std::min<int64_t>(kChunkRows, rows.end - begin);
      for (int64_t r = 0; r < count; ++r) {
        m.a[r] = as_elements<E>(dgates_ + (begin + r) * 4 * p_.H);
      }
      for_panels(columns, m, count, depth_of<E>(4 * p_.H), packed_ih_, false,
                 [&](int64_t block, int vectors, Range part, const A* sums) {
                   for (int64_t r = part.begin; r < part.end; ++r) {
                     const int64_t slot = begin + r;
                     const int64_t row = in_one_piece_ ? first_row + slot : row_of_[slot];
                     A* dx = static_cast<A*>(p_.dx) + row * p_.I;
                     for (int v = 0; v < vectors; ++v, sums += L) {
                       const int64_t j = (block + v) * L;
                       store<A>(dx + j, load_full<A>(sums), p_.I - j);
                     }
                   }
                 });
    }
  }

  const LstmBackward& p_;
  const bool in_one_piece_;  // the rows of steps one after the other, without padding
  const int64_t rows_;       // at hand, at most
  int64_t* const row_of_;    // [rows_]: where a slot's row lies, unless in one piece
  S* const x_;               // [rows_, I]: x by slots, unless in one piece
  O* const dgates_;          // [rows_, 4H]
  S* const h_prev_;          // [rows_, P]: what W_hh was multiplied with
  E* const packed_ih_;       // [blocks of I][depth of 4H][lanes]
  const MatmulOf<E, S> weights_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
