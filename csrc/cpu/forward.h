// Forward of a whole sequence, one direction of one layer, by one team of threads.
//
// Each thread owns a slice of the hidden units: it multiplies its rows of W_hh (packed, unless the
// sequences are few: dots.h) with every sequence's h, applies the cell while the sums are in L1,
// and writes its slice of h. One barrier a step (two with a projection), because h has two buffers:
// the one written at a step was last read at the step before.
//
// A layer norm needs whole rows: there the product goes to memory, the threads meet, and each
// applies the cell to sequences of its own, so that one barrier more is all it takes and sums do
// not depend on the number of threads.
#pragma once

#include "dots.h"
#include "norm.h"
#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// E: the element of products, S: the storage type (operand.h). With pairs there are no variants.
template <class E, class S>
class Forward {
  using A = Acc<E>;
  using O = Stored<E>;
  using V = Vec<A>;
  using LstmCell = Cell<Math<A>>;
  static constexpr int L = Lanes<A>::kCount;

 public:
  explicit Forward(const LstmForward& p)
      : p_(p),
        B_(p.steps.B),
        H_(p.H),
        P_(p.P),
        K_(p.w_hh ? p.P : 0),
        dots_(B_ <= kDotsMaxRows<A> && dots_suit<E>(K_)),
        copied_(dots_ && B_ == 1 && p.steps.T >= kCopyMinSteps &&
                4 * H_ * K_ * int64_t(sizeof(S)) <= kCopyMaxBytes),
        input_dots_(p.x && !p.pack_input && dots_suit<E>(p.I) && p.steps.rows <= kChunkRows),
        steps_at_once_(std::max<int64_t>(1, kChunkRows / std::max<int64_t>(1, B_))),
        normed_(p.variants.gamma_hh),
        varied_(p.variants.peephole || p.variants.h_dropout || p.variants.zoneout_h() ||
                p.variants.zoneout_c()),
        h_stride_((blocks_of<A>(p.P) + 1) * L),  // one block more: no power of two between rows
        c_stride_(blocks_of<A>(p.H) * L) {
    Arena arena(p.workspace);
    members_ = arena.take<Member<E>>(p.threads);
    barriers_ = arena.take<Barrier>(p.threads + 1);
    packed_hh_ = arena.take<E>(dots_ ? 0 : 4 * blocks_of<A>(H_) * depth_of<E>(K_) * L);
    copied_hh_ = arena.take<S>(copied_ ? 4 * blocks_of<A>(H_) * L * K_ : 0);
    packed_ih_ =
        arena.take<E>(p.x && !input_dots_ ? 4 * blocks_of<A>(H_) * depth_of<E>(p.I) * L : 0);
    packed_hr_ = arena.take<E>(p.w_hr ? blocks_of<A>(P_) * depth_of<E>(H_) * L : 0);
    h_[0] = arena.take<O>(B_ * h_stride_);
    h_[1] = arena.take<O>(B_ * h_stride_);
    c_ = arena.take<A>(B_ * c_stride_);
    cell_out_ = arena.take<O>(p.w_hr ? B_ * c_stride_ : 0);
    zeros_ = arena.take<O>(h_stride_);
    h_kept_ = arena.take<A>(p.variants.zoneout_h() ? B_ * h_stride_ : 0);
    product_ = arena.take<A>(normed_ ? B_ * 4 * H_ : 0);
    norm_rows_ = arena.take<A>(normed_ ? p.threads * 2 * c_stride_ : 0);
    bias_ = arena.take<A>(p.x ? c_stride_ * 4 : 0);
    gx_ = arena.take<A>(p.x ? B_ * steps_at_once_ * c_stride_ * 4 : 0);
    Member<E>::take(arena, p.threads, B_, members_);
    workspace_ = arena.used();
  }

  int64_t workspace() const { return workspace_; }

  void run() {
    std::memset(zeros_, 0, h_stride_ * sizeof(O));
    run_planned(
        p_.threads, barriers_, [this](int threads) { return plan(threads); },
        [this](const Plan& plan, int thread) { work(plan, thread); });
  }

 private:
  // Where rows of weights for dots lie: those of a block of units and of its next gate begin so
  // many rows after the ones before.
  struct Weights {
    const S* first;
    int64_t block, gate;
  };

  Plan plan(int threads) const {
    const int64_t macs = B_ * 4 * H_ * std::max<int64_t>(K_, 1);
    // Dots of fewer sequences add up in another order: not split, they do not depend on threads.
    return make_plan(threads, dots_ ? 1 : B_, blocks_of<A>(H_), macs);
  }

  void work(const Plan& plan, int thread) {
    Member<E>& m = members_[thread];
    m.place(plan, thread, B_, H_, P_);
    if (K_ && !dots_) {
      pack_gates(static_cast<const S*>(p_.w_hh), H_, K_, m, m.group, plan.groups, packed_hh_);
    }
    if (copied_) copy_w_hh(m);
    if (p_.w_hr) {
      pack_matrix(static_cast<const S*>(p_.w_hr), P_, H_, true, m.proj, m, plan.groups, packed_hr_);
    }
    if (p_.x && !input_dots_) {
      pack_gates(static_cast<const S*>(p_.w_ih), H_, p_.I, m, m.group, plan.groups, packed_ih_);
    }
    if (p_.x && m.group == 0) add_biases(m);
    start(m);
    barriers_[plan.groups].wait(plan.threads());
    Barrier& meet = barriers_[m.group];
    const Weights w_hh =
        copied_ ? Weights{copied_hh_, 4 * L, L} : Weights{static_cast<const S*>(p_.w_hh), L, H_};
    int64_t made = 0;  // row of gx_ where the rows of the step begin
    for (int64_t i = 0; i < p_.steps.T; ++i) {
      if (p_.x && i % steps_at_once_ == 0) {
        input_product(m, i);
        made = m.batch.begin * steps_at_once_;
      }
      const int64_t count = collect(p_.steps, p_.steps.step_at(i), m.batch, m.rows);
      const O* h_old = h_[i & 1];
      O* h_new = h_[(i + 1) & 1];
      for (int64_t r = 0; r < count; ++r) {
        m.rows[r].slot = made++;
        m.a[r] = as_elements<E>(m.rows[r].reset ? zeros_ : h_old + m.rows[r].b * h_stride_);
      }
      if (dots_) {
        each_dots(m, count, w_hh, K_, i & 1,
                  [&](int64_t j, A* sums) { take(m.rows, Range{0, count}, j, sums, h_new); });
      } else {
        for_panels(Range{4 * m.units.begin, 4 * m.units.end}, m, count, depth_of<E>(K_), packed_hh_,
                   [&](int64_t block, int, Range part, A* sums) {
                     take(m.rows, part, block / 4 * L, sums, h_new);
                   });
      }
      meet.wait(plan.slices);
      if (normed_) {
        const Range own = share(count, plan.slices, m.slice);
        for (int64_t r = own.begin; r < own.end; ++r) normed_cell(m.rows[r], thread, h_new);
        meet.wait(plan.slices);
      }
      if (!p_.w_hr) continue;
      for (int64_t r = 0; r < count; ++r) {
        m.a[r] = as_elements<E>(cell_out_ + m.rows[r].b * c_stride_);
      }
      for_panels(m.proj, m, count, depth_of<E>(H_), packed_hr_,
                 [&](int64_t block, int vectors, Range part, const A* sums) {
                   for (int64_t r = part.begin; r < part.end; ++r) {
                     for (int v = 0; v < vectors; ++v, sums += L) {
                       put_h<true>(m.rows[r], (block + v) * L, load_full<A>(sums), h_new);
                     }
                   }
                 });
      meet.wait(plan.slices);
    }
  }

  // gx = x W_ih^T + b_ih + b_hh for the columns of one thread and the steps from the i-th on, as
  // many as are made at once.
  void input_product(const Member<E>& m, int64_t i) {
    const S* w_ih = static_cast<const S*>(p_.w_ih);
    const int64_t depth = depth_of<E>(p_.I), first = m.batch.begin * steps_at_once_;
    int64_t count = 0;
    for (int64_t end = std::min(p_.steps.T, i + steps_at_once_); i < end; ++i) {
      const int64_t active = collect(p_.steps, p_.steps.step_at(i), m.batch, m.rows);
      for (int64_t r = 0; r < active; ++r) {
        m.a[count++] = static_cast<const E*>(p_.x) + m.rows[r].row * depth;
      }
    }
    if (input_dots_) {
      each_dots(m, count, {w_ih, L, H_}, p_.I, false,
                [&](int64_t j, const A* sums) { put_gx(Range{first, first + count}, j, sums); });
    } else {
      for_panels(Range{4 * m.units.begin, 4 * m.units.end}, m, count, depth, packed_ih_,
                 [&](int64_t block, int, Range part, const A* sums) {
                   put_gx(Range{first + part.begin, first + part.end}, block / 4 * L, sums);
                 });
    }
  }

  void put_gx(Range rows, int64_t j, const A* sums) {
    A* gx = own_gx(rows.begin, j);
    for (int gate = 0; gate < 4; ++gate) {
      const V bias = load_full<A>(bias_ + j * 4 + gate * L);
      for (int64_t r = 0; r < rows.size(); ++r) {
        const int64_t at = (r * 4 + gate) * L;
        store_full<A>(gx + at, load_full<A>(sums + at) + bias);
      }
    }
  }

  A* own_gx(int64_t row, int64_t j) const {
    return gx_ + (j / L * B_ * steps_at_once_ + row) * 4 * L;
  }

  void copy_w_hh(const Member<E>& m) {
    for (int64_t j = m.units.begin * L; j < m.units.end * L; j += L) {
      for (int gate = 0; gate < 4; ++gate) {
        std::memcpy(copied_hh_ + (j * 4 + gate * L) * K_,
                    static_cast<const S*>(p_.w_hh) + (gate * H_ + j) * K_,
                    std::min<int64_t>(L, H_ - j) * K_ * sizeof(S));
      }
    }
  }

  void add_biases(const Member<E>& m) {
    for (int64_t j = m.units.begin * L; j < m.units.end * L; j += L) {
      for (int gate = 0; gate < 4; ++gate) {
        V sum = broadcast<A>(A(0));
        for (const void* bias : {p_.b_ih, p_.b_hh}) {
          if (bias) sum += load<A>(static_cast<const S*>(bias) + gate * H_ + j, H_ - j);
        }
        store_full<A>(bias_ + j * 4 + gate * L, sum);
      }
    }
  }

  // done(j, sums): units j .. j+L of all rows, at most kChunkRows, sums [rows][4 gates][lanes]. The
  // weights lie unpacked. Backwards every other step: weights too many for a cache are then read
  // first where they were read last, and part of them is still there.
  template <class Done>
  void each_dots(const Member<E>& m, int64_t count, const Weights& weights, int64_t K,
                 bool backwards, Done&& done) {
    constexpr int64_t most = kDotsMaxRows<A>;
    for (int64_t i = 0; i < m.units.size(); ++i) {
      const int64_t j = (backwards ? m.units.end - 1 - i : m.units.begin + i) * L;
      for (int gate = 0; gate < 4; ++gate) {
        const S* rows = weights.first + (j / L * weights.block + gate * weights.gate) * K;
        for (int64_t r = 0; r < count; r += most) {
          dots_of_rows<E, S>(int(std::min(most, count - r)), m.a + r, rows, H_ - j - 1,
                             depth_of<E>(K), m.acc + (r * 4 + gate) * L, 4 * L);
        }
      }
      done(j, m.acc);
    }
  }

  // Both h buffers start as h0: a sequence that starts late (reverse, with lengths) reads either.
  void start(const Member<E>& m) {
    const S* h0 = static_cast<const S*>(p_.h0);
    const S* c0 = static_cast<const S*>(p_.c0);
    for (int64_t b = m.batch.begin; b < m.batch.end; ++b) {
      const bool no_steps = p_.steps.T == 0 || (p_.steps.lengths && p_.steps.lengths[b] == 0);
      for (int64_t j = m.proj.begin * L; j < m.proj.end * L; j += L) {
        const V h = load<A>(h0 + b * P_ + j, P_ - j);
        if (p_.variants.zoneout_h()) store_full<A>(h_kept_ + b * h_stride_ + j, h);
        store_full<A>(h_[0] + b * h_stride_ + j, dropped<true>(h, b, j));
        store_full<A>(h_[1] + b * h_stride_ + j, dropped<true>(h, b, j));
      }
      for (int64_t j = m.units.begin * L; j < m.units.end * L; j += L) {
        store_full<A>(c_ + b * c_stride_ + j, load<A>(c0 + b * H_ + j, H_ - j));
      }
      if (no_steps) {
        copy_blocks<A>(h0 + b * P_, static_cast<S*>(p_.h_n) + b * P_, m.proj, P_);
        copy_blocks<A>(c0 + b * H_, static_cast<S*>(p_.c_n) + b * H_, m.units, H_);
      }
    }
  }

  // Units j .. j+L of the product with the h of some sequences: sums [rows][4 gates][lanes].
  void take(const Row* rows, Range part, int64_t j, A* sums, O* h_new) {
    rows += part.begin;
    if (normed_) {
      for (int64_t r = 0; r < part.size(); ++r, sums += 4 * L) {
        A* to = product_ + rows[r].b * 4 * H_ + j;
        for (int gate = 0; gate < 4; ++gate) {
          store<A>(to + gate * H_, load_full<A>(sums + gate * L), H_ - j);
        }
      }
    } else if (varied_) {
      cells<true>(rows, part.size(), j, sums, h_new);
    } else {
      cells<false>(rows, part.size(), j, sums, h_new);
    }
  }

  // kVaried: with variants. The plain LSTM's cell does not ask for each of them: at T 50, B 64, H
  // 128 that took 6 % of the whole pass.
  //
  // A cell is one long chain of dependent instructions, too many for the processor to look past
  // into the next sequence's. Half of it for all sequences, then the other half, keeps it busier.
  template <bool kVaried>
  void cells(const Row* rows, int64_t count, int64_t j, A* sums, O* h_new) {
    for (int64_t r = 0; r < count; ++r) {
      A* at = sums + r * 4 * L;
      const V product[4] = {load_full<A>(at), load_full<A>(at + L), load_full<A>(at + 2 * L),
                            load_full<A>(at + 3 * L)};
      V c;
      store_full<A>(at, state<kVaried>(rows[r], j, product, c));
      store_full<A>(at + L, c);
    }
    for (int64_t r = 0; r < count; ++r) {
      const A* at = sums + r * 4 * L;
      const V c = load_full<A>(at + L);
      put_output<kVaried>(rows[r], j, load_full<A>(at) * Math<A>::tanh(c), h_new);
    }
  }

  // One sequence's units, all of them: norm(product), and h = o * tanh(norm(c)).
  void normed_cell(const Row& row, int thread, O* h_new) {
    const Variants& v = p_.variants;
    const A* product = product_ + row.b * 4 * H_;
    const auto of_product = Moments<A>::of(product, 4 * H_, v.epsilon);
    A* c_row = norm_rows_ + thread * 2 * c_stride_;
    A* o_row = c_row + c_stride_;
    const S* gamma_hh = static_cast<const S*>(v.gamma_hh);
    for (int64_t j = 0; j < H_; j += L) {
      const int64_t n = H_ - j;
      V normed[4];
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t column = gate * H_ + j;
        const V x = of_product.normalize(load<A>(product + column, n));
        if (p_.norm) store<A>(static_cast<A*>(p_.norm) + row.row * 4 * H_ + column, x, n);
        normed[gate] = x * load<A>(gamma_hh + column, n);
      }
      V c;
      store_full<A>(o_row + j, state<true>(row, j, normed, c));
      store_full<A>(c_row + j, c);
    }
    if (p_.norm_r) static_cast<A*>(p_.norm_r)[row.row] = of_product.rstd;
    const auto of_c = Moments<A>::of(c_row, H_, v.epsilon);
    for (int64_t j = 0; j < H_; j += L) {
      const int64_t n = H_ - j;
      const V c = of_c.normalize(load_full<A>(c_row + j)) *
                      load<A>(static_cast<const S*>(v.gamma_ch) + j, n) +
                  load<A>(static_cast<const S*>(v.beta_ch) + j, n);
      put_output<true>(row, j, load_full<A>(o_row + j) * Math<A>::tanh(c), h_new);
    }
  }

  // The cell up to c, which is returned before zoneout, and o. gates may be gx itself: all four
  // are read before any is written.
  template <bool kVaried>
  LSTM_EXT_INLINE V state(const Row& row, int64_t j, const V (&product)[4], V& c) {
    const int64_t n = H_ - j;
    const A* gx = p_.x ? own_gx(row.slot, j) : static_cast<const A*>(p_.gx) + row.row * 4 * H_ + j;
    const int64_t stride = p_.x ? L : H_;
    const typename LstmCell::Gates a{
        load<A>(gx, n) + product[0],
        load<A>(gx + stride, n) + product[1],
        load<A>(gx + 2 * stride, n) + product[2],
        load<A>(gx + 3 * stride, n) + product[3],
    };
    A* c_state = c_ + row.b * c_stride_ + j;
    const V c_prev = row.reset ? broadcast<A>(A(0)) : load_full<A>(c_state);
    typename LstmCell::Gates s;
    const Variants& v = p_.variants;
    if (kVaried && v.peephole) {
      const auto peephole = load_peephole<A, S>(v, H_, j);
      LstmCell::forward_state(a, c_prev, s, c, &peephole);
    } else {
      LstmCell::forward_state(a, c_prev, s, c, nullptr);
    }
    if (p_.gates) {
      A* gates = static_cast<A*>(p_.gates) + row.row * 4 * H_ + j;
      store<A>(gates, s.i, n);
      store<A>(gates + H_, s.f, n);
      store<A>(gates + 2 * H_, s.g, n);
      store<A>(gates + 3 * H_, s.o, n);
    }
    const V c_next =
        kVaried && v.zoneout_c() ? LstmCell::zoneout(keep_c<A>(v, H_, row.row, j), c_prev, c) : c;
    store_full<A>(c_state, c_next);
    if (p_.c_seq) store<A>(static_cast<A*>(p_.c_seq) + row.row * H_ + j, c_next, n);
    if (row.last) store<A>(static_cast<S*>(p_.c_n) + row.b * H_ + j, c_next, n);
    return s.o;
  }

  // out: o * tanh(c).
  template <bool kVaried>
  LSTM_EXT_INLINE void put_output(const Row& row, int64_t j, V out, O* h_new) {
    if (p_.w_hr) {
      store_full<A>(cell_out_ + row.b * c_stride_ + j, out);
    } else {
      put_h<kVaried>(row, j, out, h_new);
    }
  }

  // The recurrence goes on with h as the user sees it: rounded to the storage type.
  template <bool kVaried>
  LSTM_EXT_INLINE void put_h(const Row& row, int64_t j, V h, O* h_new) {
    const int64_t n = P_ - j;
    const Variants& v = p_.variants;
    if (kVaried && v.zoneout_h()) {
      A* kept = h_kept_ + row.b * h_stride_ + j;
      const V h_prev = row.reset ? broadcast<A>(A(0)) : load_full<A>(kept);
      h = LstmCell::zoneout(keep_h<A>(v, P_, row.row, j), h_prev, h);
      store_full<A>(kept, rounded_to<A, S>(h));
    }
    S* y = static_cast<S*>(p_.y) + row.row * p_.y_stride + j;
    O* state = h_new + row.b * h_stride_ + j;
    if constexpr (kPaired<E>) {
      store_full<A>(state, h);
      std::memcpy(y, state, std::min<int64_t>(n, L) * sizeof(S));
    } else {
      store<A>(y, h, n);
      store_full<A>(state, dropped<kVaried>(rounded_to<A, S>(h), row.b, j));
    }
    if (row.last) store<A>(static_cast<S*>(p_.h_n) + row.b * P_ + j, h, n);
  }

  // h as the recurrent product sees it.
  template <bool kVaried>
  V dropped(V h, int64_t b, int64_t j) const {
    if (!kVaried || !p_.variants.h_dropout) return h;
    return h * load<A>(static_cast<const A*>(p_.variants.h_dropout) + b * P_ + j, P_ - j);
  }

  const LstmForward& p_;
  const int64_t B_, H_, P_;
  const int64_t K_;              // length of the recurrent product: P, or 0 without one
  const bool dots_;              // few sequences: W_hh is read as it lies, not packed
  const bool copied_;            // W_hh is read from a copy
  const bool input_dots_;        // the same as dots_ of W_ih
  const int64_t steps_at_once_;  // of the input product: enough rows to use each weight often
  const bool normed_;            // layer norm
  const bool varied_;            // variants beside it
  const int64_t h_stride_, c_stride_;
  Member<E>* members_;
  Barrier* barriers_;  // one a group, then one for the whole team
  E* packed_hh_;       // [4 * blocks of H][depth of K][lanes]
  S* copied_hh_;       // [blocks of H][4][lanes][K]
  E* packed_ih_;       // [4 * blocks of H][depth of I][lanes]
  E* packed_hr_;       // [blocks of P][depth of H][lanes]
  O* h_[2];            // [B, h_stride_]
  A* c_;               // [B, c_stride_]
  O* cell_out_;        // [B, c_stride_]: o * tanh(c) before the projection
  O* zeros_;           // [h_stride_]: the h of a sequence that was reset
  A* h_kept_;          // [B, h_stride_]: the last h, for zoneout
  A* product_;         // [B, 4H]: recurrent products that wait for their norm
  A* bias_;            // [blocks of H][4][lanes]: b_ih + b_hh, if x is given
  A* gx_;              // [blocks of H][B * steps_at_once_][4][lanes]: gx of the steps at hand
  A* norm_rows_;       // [threads][2][c_stride_]: c and o of the row at hand
  int64_t workspace_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
