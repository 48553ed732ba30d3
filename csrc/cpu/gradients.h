// What backward makes of dgates while they are in the caches, some steps at a time: the gradients
// of x, of W_ih and W_hh, and of the biases.
//
// Kept for all steps, dgates would be written to memory and read from there twice. How many steps
// are at hand follows from the problem and the groups, not from the threads OpenMP grants.
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
  using V = Vec<A>;
  static constexpr int L = Lanes<A>::kCount;
  static constexpr int64_t kRows = 384;        // at hand, unless a step has more
  static constexpr int64_t kBlocksAdded = 64;  // at once: they stay in L1

 public:
  // Of the sequences of `batch`, by so many threads. The first group's sums go where they belong,
  // those of the others to memory of their own, until they are added.
  Gradients(const LstmBackward& p, Range batch, int threads, Arena& arena)
      : p_(p),
        batch_(batch),
        in_one_piece_(batch.size() == p.steps.B &&
                      (p.steps.offsets || (p.steps.stride_b == 1 && !p.steps.lengths))),
        rows_(std::min(std::max(kRows, batch.size()), p.steps.T * batch.size())),
        row_of_(arena.take<int64_t>(p.dw_hh && !in_one_piece_ ? rows_ : 0)),
        x_(arena.take<S>(p.dw_hh && !in_one_piece_ ? rows_ * p.I : 0)),
        dgates_(arena.take<O>(p.dw_hh ? rows_ * 4 * p.H : 0)),
        h_prev_(arena.take<S>(p.dw_hh ? rows_ * p.P : 0)),
        packed_ih_(arena.take<E>(p.dx ? blocks_of<A>(p.I) * depth_of<E>(4 * p.H) * L : 0)),
        weights_(of_weights(threads, arena), arena) {}

  O* dgates() const { return dgates_; }  // [rows at hand, 4H]
  S* h_prev() const { return h_prev_; }  // [rows at hand, P]

  // Of all steps before the end-th, those that are at hand together with the last.
  StepsAtHand steps_before(int64_t end) const {
    StepsAtHand steps{end, end, 0, 0};
    while (steps.begin > 0) {
      const int64_t more =
          p_.steps.count(p_.steps.step_at(steps.begin - 1), batch_.begin, batch_.end);
      if (steps.rows + more > rows_) break;
      --steps.begin;
      steps.rows += more;
    }
    const int64_t t = std::min(p_.steps.step_at(steps.begin), p_.steps.step_at(end - 1));
    steps.first_row = p_.steps.row(t, batch_.begin);
    return steps;
  }

  // Gives the sequences of a step their slots, all but its x already in place, or, after `before`
  // rows of the steps walked already, puts x there, the columns of one of the slices.
  void put_x(const StepsAtHand& steps, Row* rows, int64_t count, int64_t before, int slices,
             int slice) const {
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
  void pack(int threads, int thread) const {
    const int64_t blocks = blocks_of<A>(p_.I);
    Range own = columns(threads, thread);
    if (!by_columns(threads)) {
      own = share((blocks + kPanelVectors - 1) / kPanelVectors, threads, thread);
      own = {own.begin * kPanelVectors, std::min(blocks, own.end * kPanelVectors)};
    }
    pack_matrix(static_cast<const S*>(p_.w_ih), p_.I, 4 * p_.H, false, own, packed_ih_);
  }

  void make(const StepsAtHand& steps, const Member<E>& m, int threads, int thread) const {
    if (!steps.rows) {
      if (steps.end == p_.steps.T && sums_.out != p_.dw_ih && thread == 0) clear();
      return;
    }
    if (p_.dx) {
      const Range all{0, steps.rows};
      const Range rows = by_columns(threads) ? all : share(steps.rows, threads, thread);
      make_dx(steps.first_row, rows, columns(threads, thread), m);
    }
    const S* x = in_one_piece_ ? static_cast<const S*>(p_.x) + steps.first_row * p_.I : x_;
    weights_.part(dgates_, x, h_prev_, steps.rows, steps.end == p_.steps.T).work(thread, threads);
  }

  // Adds one thread's share of other groups' sums, in order: other(i), i < others.
  template <class Other>
  void add(int others, const Other& other, int threads, int thread) const {
    add_arrays(p_.dw_ih, p_.I, others, [&](int i) { return other(i).sums_.out; }, threads, thread);
    add_arrays(
        p_.dw_hh, p_.P, others, [&](int i) { return other(i).sums_.more_out; }, threads, thread);
    add_arrays(p_.db, 1, others, [&](int i) { return other(i).sums_.sums; }, threads, thread);
  }

 private:
  Matmul of_weights(int threads, Arena& arena) {
    if (!p_.dw_hh) return sums_;
    const auto own = [&](void* given, int64_t columns) -> void* {
      if (batch_.begin == 0 || !given) return given;
      return arena.take<A>(4 * p_.H * columns);
    };
    sums_.threads = threads;
    sums_.M = 4 * p_.H;
    sums_.N = p_.I;
    sums_.more_N = p_.P;
    sums_.K = rows_;
    sums_.a_transposed = true;
    sums_.out = own(p_.dw_ih, p_.I);
    sums_.more_out = own(p_.dw_hh, p_.P);
    sums_.sums = own(p_.db, 1);
    return sums_;
  }

  // Of a group without steps.
  void clear() const {
    std::memset(sums_.out, 0, 4 * p_.H * p_.I * sizeof(A));
    std::memset(sums_.more_out, 0, 4 * p_.H * p_.P * sizeof(A));
    if (sums_.sums) std::memset(sums_.sums, 0, 4 * p_.H * sizeof(A));
  }

  // to and the others' arrays: [4H][columns].
  template <class From>
  void add_arrays(void* to, int64_t columns, int others, const From& from, int threads,
                  int thread) const {
    if (!to) return;
    const int64_t count = 4 * p_.H * columns;
    const Range own = share((count + L - 1) / L, threads, thread);
    for (int64_t block = own.begin; block < own.end; block += kBlocksAdded) {
      for (int i = 0; i < others; ++i) {
        const int64_t end = std::min(own.end, block + kBlocksAdded) * L;
        for (int64_t j = block * L; j < end; j += L) {
          A* at = static_cast<A*>(to) + j;
          const V more = load<A>(static_cast<const A*>(from(i)) + j, count - j);
          store<A>(at, load<A>(at, count - j) + more, count - j);
        }
      }
    }
  }

  // Threads share the columns of dx, and with them W_ih, or, of few columns, the rows.
  bool by_columns(int threads) const { return blocks_of<A>(p_.I) >= kPanelVectors * threads; }

  Range columns(int threads, int thread) const {
    const int64_t blocks = blocks_of<A>(p_.I);
    return by_columns(threads) ? share(blocks, threads, thread) : Range{0, blocks};
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
  const Range batch_;
  const bool in_one_piece_;  // the rows of steps one after the other, without padding
  const int64_t rows_;       // at hand, at most
  int64_t* const row_of_;    // [rows_]: where a slot's row lies, unless in one piece
  S* const x_;               // [rows_, I]: x by slots, unless in one piece
  O* const dgates_;          // [rows_, 4H]
  S* const h_prev_;          // [rows_, P]: what W_hh was multiplied with
  E* const packed_ih_;       // [blocks of I][depth of 4H][lanes]
  Matmul sums_{};            // of the weights' gradients: where they go
  const MatmulOf<E, S> weights_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
