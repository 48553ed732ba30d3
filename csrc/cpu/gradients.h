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

// Steps begin .. end in the order in which forward took them, whose rows begin at first_row.
struct StepsAtHand {
  int64_t begin, end, first_row;
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
        chunks_(chunks_of(p.steps)),
        rows_((p.steps.T + chunks_ - 1) / chunks_ * p.steps.B),
        dgates_(arena.take<O>(p.dw_hh ? rows_ * 4 * p.H : 0)),
        h_prev_(arena.take<S>(p.dw_hh ? rows_ * p.P : 0)),
        packed_ih_(arena.take<E>(p.dx ? blocks_of<A>(p.I) * depth_of<E>(4 * p.H) * L : 0)),
        weights_(of_weights(), arena) {}

  O* dgates() const { return dgates_; }  // [rows at hand, 4H]
  S* h_prev() const { return h_prev_; }  // [rows at hand, P]

  // Of all steps before the end-th, those that are at hand together with the last.
  StepsAtHand steps_before(int64_t end) const {
    const int64_t T = p_.steps.T;
    int64_t chunk = (end * chunks_ - 1) / T;
    while (share(T, chunks_, chunk).end < end) ++chunk;
    const Range steps = share(T, chunks_, chunk);
    const int64_t t = std::min(p_.steps.step_at(steps.begin), p_.steps.step_at(steps.end - 1));
    return {steps.begin, steps.end, t * p_.steps.B};
  }

  // W_ih for dx: before make, which every thread then calls with all of dgates there.
  void pack(const Member<E>& m, const Plan& plan, int thread) const {
    Member<E> member = m;
    member.group = by_columns(plan) ? 0 : thread;
    pack_matrix(static_cast<const S*>(p_.w_ih), p_.I, 4 * p_.H, false, columns(plan, thread),
                member, by_columns(plan) ? 1 : plan.threads(), packed_ih_);
  }

  void make(const StepsAtHand& steps, const Member<E>& m, const Plan& plan, int thread) const {
    const int64_t count = (steps.end - steps.begin) * p_.steps.B;
    if (p_.dx) {
      const Range rows = by_columns(plan) ? Range{0, count} : share(count, plan.threads(), thread);
      make_dx(steps.first_row, rows, columns(plan, thread), m);
    }
    const S* x = static_cast<const S*>(p_.x) + steps.first_row * p_.I;
    weights_.part(dgates_, x, h_prev_, count, steps.end == p_.steps.T).work(thread, plan.threads());
  }

 private:
  static int64_t chunks_of(const Steps& steps) {
    const int64_t most = std::max<int64_t>(1, kRows / std::max<int64_t>(1, steps.B));
    return std::max<int64_t>(1, (steps.T + most - 1) / most);
  }

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
      A* dx = static_cast<A*>(p_.dx) + (first_row + begin) * p_.I;
      for_panels(columns, m, count, depth_of<E>(4 * p_.H), packed_ih_,
                 [&](int64_t block, int vectors, Range part, const A* sums) {
                   for (int64_t r = part.begin; r < part.end; ++r) {
                     for (int v = 0; v < vectors; ++v, sums += L) {
                       const int64_t j = (block + v) * L;
                       store<A>(dx + r * p_.I + j, load_full<A>(sums), p_.I - j);
                     }
                   }
                 });
    }
  }

  const LstmBackward& p_;
  const int64_t chunks_;  // in which the steps are taken
  const int64_t rows_;    // at hand, at most
  O* const dgates_;       // [rows_, 4H]
  S* const h_prev_;       // [rows_, P]: what W_hh was multiplied with
  E* const packed_ih_;    // [blocks of I][depth of 4H][lanes]
  const MatmulOf<E, S> weights_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
