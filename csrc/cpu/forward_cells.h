// The cell of forward, all its variants: from the products of x and of h_{t-1} to c_t and h_t.
#pragma once

#include "norm.h"
#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// E: the element of products, S: the storage type (operand.h).
template <class E, class S>
class ForwardCells {
  using A = Acc<E>;
  using O = Stored<E>;
  using V = Vec<A>;
  using LstmCell = Cell<Math<A>>;
  static constexpr int L = Lanes<A>::kCount;
  static constexpr int64_t kApart = Arena::kPage / sizeof(A);
  static constexpr int kChains = 8;  // of dependent instructions side by side: see cells

 public:
  // c of the units that a thread computes, or, with a layer norm, of all: [batch][stride].
  struct CellState {
    A* first;  // of what would be unit 0
    int64_t stride;
    A* at(const Row& row, int64_t j) const { return first + row.local * stride + j; }
  };

  // Products of few sequences whose cells are not computed yet: [count][rows][4 gates][lanes].
  struct Waiting {
    CellState c;
    A* sums;
    int64_t most;  // 1 at most: there are chains enough in a block of units
    int64_t count;
    int64_t j[kChains];
  };

  // For the sequences of `batch` and so many threads. gx has room for steps_at_once.
  ForwardCells(const LstmForward& p, Range batch, int threads, int64_t steps_at_once, Arena& arena)
      : p_(p),
        batch_(batch),
        H_(p.H),
        P_(p.P),
        gx_rows_(batch.size() * steps_at_once),
        normed_(p.variants.gamma_hh),
        varied_(p.variants.peephole || p.variants.h_dropout || p.variants.zoneout_h() ||
                p.variants.zoneout_c()),
        h_stride_((blocks_of<A>(p.P) + 1) * L),  // one block more: no power of two between rows
        c_stride_(blocks_of<A>(p.H) * L) {
    const int64_t B = batch.size();
    // The h that is read, the h that is written and each thread's c lie in different pages (Arena):
    // of 1 sequence, H 64 and 128, two threads then take 2 % less time, 9 and 8 % if they do not
    // share an L3 (Zen 4).
    h_[0] = arena.take<O>(B * h_stride_);
    arena.next_page();
    h_[1] = arena.take<O>(B * h_stride_);
    arena.next_page();
    c_ = arena.take<A>(B * c_stride_ + threads * kApart);
    arena.next_page();
    cell_out_ = arena.take<O>(p.w_hr ? B * c_stride_ : 0);
    zeros_ = arena.take<O>(h_stride_);
    h_kept_ = arena.take<A>(p.variants.zoneout_h() ? B * h_stride_ : 0);
    product_ = arena.take<A>(normed_ ? B * 4 * H_ : 0);
    norm_rows_ = arena.take<A>(normed_ ? threads * 2 * c_stride_ : 0);
    gx_ = arena.take<A>(p.x ? gx_rows_ * c_stride_ * 4 : 0);
  }

  // Both h buffers start as h0: a sequence that starts late (reverse, with lengths) reads either.
  void start(const Member<E>& m) {
    if (m.slice == 0) std::memset(zeros_, 0, h_stride_ * sizeof(O));
    const S* h0 = static_cast<const S*>(p_.h0);
    const S* c0 = static_cast<const S*>(p_.c0);
    const CellState c = cell_state(m);
    for (int64_t b = batch_.begin; b < batch_.end; ++b) {
      const int64_t local = b - batch_.begin;
      const bool no_steps = p_.steps.T == 0 || (p_.steps.lengths && p_.steps.lengths[b] == 0);
      for (int64_t j = m.proj.begin * L; j < m.proj.end * L; j += L) {
        const V h = load<A>(h0 + b * P_ + j, P_ - j);
        if (p_.variants.zoneout_h()) store_full<A>(h_kept_ + local * h_stride_ + j, h);
        store_full<A>(h_[0] + local * h_stride_ + j, dropped<true>(h, b, j));
        store_full<A>(h_[1] + local * h_stride_ + j, dropped<true>(h, b, j));
      }
      for (int64_t j = m.units.begin * L; j < m.units.end * L; j += L) {
        store_full<A>(c.first + local * c.stride + j, load<A>(c0 + b * H_ + j, H_ - j));
      }
      if (no_steps) {
        copy_blocks<A>(h0 + b * P_, static_cast<S*>(p_.h_n) + b * P_, m.proj, P_);
        copy_blocks<A>(c0 + b * H_, static_cast<S*>(p_.c_n) + b * H_, m.units, H_);
      }
    }
  }

  // What W_hh is multiplied with at the i-th step.
  const O* h_before(const Row& row, int64_t i) const {
    return row.reset ? zeros_ : h_[i & 1] + row.local * h_stride_;
  }

  // What W_hr is multiplied with.
  const O* cell_out(const Row& row) const { return cell_out_ + row.local * c_stride_; }

  // gx of units j .. j+L from a row on: [rows][4 gates][lanes].
  A* own_gx(int64_t row, int64_t j) const { return gx_ + (j / L * gx_rows_ + row) * 4 * L; }

  Waiting waiting(const Member<E>& m, int64_t count) const {
    static_assert(3 * kChains * 4 * L <= Member<E>::kAcc, "room for what waits, behind a product");
    return {
        cell_state(m), m.acc + Member<E>::kAcc / 2, kChains / std::max<int64_t>(1, count), 0, {}};
  }

  // Units j .. j+L of the i-th step's product with the h of some sequences, part of its rows: sums
  // [rows of part][4 gates][lanes]. After the last of them, flush.
  void take(const Row* rows, Range part, int64_t j, A* sums, Waiting& waiting, int64_t i) {
    rows += part.begin;
    if (normed_) {
      for (int64_t r = 0; r < part.size(); ++r, sums += 4 * L) {
        A* to = product_ + rows[r].local * 4 * H_ + j;
        for (int gate = 0; gate < 4; ++gate) {
          store<A>(to + gate * H_, load_full<A>(sums + gate * L), H_ - j);
        }
      }
    } else if (waiting.most <= 1) {
      cells(rows, part.size(), &j, 1, sums, waiting.c, h_after(i));
    } else {
      const int64_t size = part.size() * 4 * L;
      std::memcpy(waiting.sums + waiting.count * size, sums, size * sizeof(A));
      waiting.j[waiting.count++] = j;
      if (waiting.count == waiting.most) flush(rows, part.size(), waiting, i);
    }
  }

  void flush(const Row* rows, int64_t count, Waiting& waiting, int64_t i) {
    cells(rows, count, waiting.j, waiting.count, waiting.sums, waiting.c, h_after(i));
    waiting.count = 0;
  }

  // One sequence's units, all of them: norm(product), and h = o * tanh(norm(c)).
  void normed_cell(const Row& row, int thread, int64_t i) {
    const Variants& v = p_.variants;
    const A* product = product_ + row.local * 4 * H_;
    const auto of_product = Moments<A>::of(product, 4 * H_, v.epsilon);
    A* c_row = norm_rows_ + thread * 2 * c_stride_;
    A* o_row = c_row + c_stride_;
    const CellState all{c_, c_stride_};
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
      store_full<A>(o_row + j, state<true>(row, j, normed, all, c));
      store_full<A>(c_row + j, c);
    }
    if (p_.norm_r) static_cast<A*>(p_.norm_r)[row.row] = of_product.rstd;
    const auto of_c = Moments<A>::of(c_row, H_, v.epsilon);
    for (int64_t j = 0; j < H_; j += L) {
      const int64_t n = H_ - j;
      const V c = of_c.normalize(load_full<A>(c_row + j)) *
                      load<A>(static_cast<const S*>(v.gamma_ch) + j, n) +
                  load<A>(static_cast<const S*>(v.beta_ch) + j, n);
      put_output<true>(row, j, load_full<A>(o_row + j) * Math<A>::tanh(c), h_after(i));
    }
  }

  // Of a step with a projection, its h in columns j .. j+L.
  void put_projected(const Row& row, int64_t j, V h, int64_t i) {
    if (const void* more = p_.tangent_of.h_more) {
      h += load<A>(static_cast<const A*>(more) + row.row * P_ + j, P_ - j);
    }
    put_h<true>(row, j, h, h_after(i));
  }

 private:
  O* h_after(int64_t i) const { return h_[(i + 1) & 1]; }

  CellState cell_state(const Member<E>& m) const {
    if (normed_) return {c_, c_stride_};  // whole rows
    const int64_t stride = m.units.size() * L, begin = m.units.begin * L;
    return {c_ + begin * batch_.size() + m.slice * kApart - begin, stride};
  }

  void cells(const Row* rows, int64_t count, const int64_t* j, int64_t blocks, A* sums,
             const CellState& c_state, O* h_new) {
    if (p_.tangent_of.gates) {
      if constexpr (std::is_same_v<S, A>) tangents(rows, count, j, blocks, sums, c_state, h_new);
    } else if (varied_) {
      cells<true>(rows, count, j, blocks, sums, c_state, h_new);
    } else {
      cells<false>(rows, count, j, blocks, sums, c_state, h_new);
    }
  }

  // sums [blocks][rows][4 gates][lanes]: of the blocks of units that begin at j.
  //
  // kVaried: with variants. The plain LSTM's cell does not ask for each of them: at T 50, B 64, H
  // 128 that took 6 % of the whole pass.
  //
  // A cell is one long chain of dependent instructions, too many for the processor to look past
  // into the next one. Half of it for all, then the other half, keeps it busier. A single sequence
  // has one chain a block of units: taken 8 blocks at a time, T 50 takes 3-5 % less at H 64 and 128
  // (one thread, Zen 5).
  template <bool kVaried>
  void cells(const Row* rows, int64_t count, const int64_t* j, int64_t blocks, A* sums,
             const CellState& c_state, O* h_new) {
    A* at = sums;
    for (int64_t u = 0; u < blocks; ++u) {
      for (int64_t r = 0; r < count; ++r, at += 4 * L) {
        const V product[4] = {load_full<A>(at), load_full<A>(at + L), load_full<A>(at + 2 * L),
                              load_full<A>(at + 3 * L)};
        V c;
        store_full<A>(at, state<kVaried>(rows[r], j[u], product, c_state, c));
        store_full<A>(at + L, c);
      }
    }
    at = sums;
    for (int64_t u = 0; u < blocks; ++u) {
      for (int64_t r = 0; r < count; ++r, at += 4 * L) {
        const V c = load_full<A>(at + L);
        put_output<kVaried>(rows[r], j[u], load_full<A>(at) * Math<A>::tanh(c), h_new);
      }
    }
  }

  // Of the cells; arguments as above.
  void tangents(const Row* rows, int64_t count, const int64_t* j, int64_t blocks, const A* sums,
                const CellState& c_state, O* h_new) {
    for (int64_t u = 0; u < blocks; ++u) {
      for (int64_t r = 0; r < count; ++r, sums += 4 * L) {
        tangent(rows[r], j[u], sums, c_state, h_new);
      }
    }
  }

  LSTM_EXT_INLINE void tangent(const Row& row, int64_t j, const A* sums, const CellState& c_state,
                               O* h_new) {
    const TangentOf& of = p_.tangent_of;
    const int64_t n = H_ - j, at = row.row * H_ + j, gates_at = row.row * 4 * H_ + j;
    const A* const made = p_.x ? own_gx(row.slot, j) : nullptr;
    const A* const gx = p_.gx ? static_cast<const A*>(p_.gx) + gates_at : nullptr;
    const A* more = nullptr;  // what the tangent of W_hh adds
    if (of.gx_after && row.first) {
      more = static_cast<const A*>(of.gx_first) + row.b * 4 * H_ + j;
    } else if (of.gx_after) {
      more = static_cast<const A*>(of.gx_after) + row.prev * 4 * H_ + j;
    }
    V a[4], s[4];
    for (int gate = 0; gate < 4; ++gate) {
      a[gate] = load_full<A>(sums + gate * L);
      if (made) a[gate] += load_full<A>(made + gate * L);
      if (gx) a[gate] += load<A>(gx + gate * H_, n);
      if (more && !row.reset) a[gate] += load<A>(more + gate * H_, n);
      s[gate] = load<A>(static_cast<const A*>(of.gates) + gates_at + gate * H_, n);
      if (p_.gates) store<A>(static_cast<A*>(p_.gates) + gates_at + gate * H_, a[gate], n);
    }
    V c_prev = broadcast<A>(A(0)), c_prev_dot = c_prev;
    A* const kept = c_state.at(row, j);
    if (!row.reset) {
      c_prev = row.first ? load<A>(static_cast<const A*>(of.c0) + row.b * H_ + j, n)
                         : load<A>(static_cast<const A*>(of.c_seq) + row.prev * H_ + j, n);
      c_prev_dot = load_full<A>(kept);
    }
    const V tanh_c = Math<A>::tanh(load<A>(static_cast<const A*>(of.c_seq) + at, n));
    V c_dot, out_dot;
    LstmCell::tangent({s[0], s[1], s[2], s[3]}, tanh_c, c_prev, {a[0], a[1], a[2], a[3]},
                      c_prev_dot, c_dot, out_dot);
    store_full<A>(kept, c_dot);
    if (p_.c_seq) store<A>(static_cast<A*>(p_.c_seq) + at, c_dot, n);
    if (row.last) store<A>(static_cast<A*>(p_.c_n) + row.b * H_ + j, c_dot, n);
    if (of.cell_out) store<A>(static_cast<A*>(of.cell_out) + at, out_dot, n);
    put_output<false>(row, j, out_dot, h_new);
  }

  // The cell up to c, which is returned before zoneout, and o. gates may be gx itself: all four
  // are read before any is written.
  template <bool kVaried>
  LSTM_EXT_INLINE V state(const Row& row, int64_t j, const V (&product)[4],
                          const CellState& c_state, V& c) {
    const int64_t n = H_ - j;
    const A* gx = p_.x ? own_gx(row.slot, j) : static_cast<const A*>(p_.gx) + row.row * 4 * H_ + j;
    const int64_t stride = p_.x ? L : H_;
    const typename LstmCell::Gates a{
        load<A>(gx, n) + product[0],
        load<A>(gx + stride, n) + product[1],
        load<A>(gx + 2 * stride, n) + product[2],
        load<A>(gx + 3 * stride, n) + product[3],
    };
    A* const kept = c_state.at(row, j);
    const V c_prev = row.reset ? broadcast<A>(A(0)) : load_full<A>(kept);
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
    store_full<A>(kept, c_next);
    if (p_.c_seq) store<A>(static_cast<A*>(p_.c_seq) + row.row * H_ + j, c_next, n);
    if (row.last) store<A>(static_cast<S*>(p_.c_n) + row.b * H_ + j, c_next, n);
    return s.o;
  }

  // out: o * tanh(c).
  template <bool kVaried>
  LSTM_EXT_INLINE void put_output(const Row& row, int64_t j, V out, O* h_new) {
    if (p_.w_hr) {
      put_operand(cell_out_ + row.local * c_stride_ + j, out, H_ - j);
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
      A* kept = h_kept_ + row.local * h_stride_ + j;
      const V h_prev = row.reset ? broadcast<A>(A(0)) : load_full<A>(kept);
      h = LstmCell::zoneout(keep_h<A>(v, P_, row.row, j), h_prev, h);
      store_full<A>(kept, rounded_to<A, S>(h));
    }
    S* y = static_cast<S*>(p_.y) + row.row * p_.y_stride + j;
    O* state = h_new + row.local * h_stride_ + j;
    if constexpr (kPaired<E>) {
      put_operand(state, h, n);
      if (n >= L) {
        std::memcpy(y, state, L * sizeof(S));
      } else {
        store_first(y, n, state);
      }
    } else {
      store<A>(y, h, n);
      store_full<A>(state, dropped<kVaried>(rounded_to<A, S>(h), row.b, j));
    }
    if (row.last) store<A>(static_cast<S*>(p_.h_n) + row.b * P_ + j, h, n);
  }

  // n elements of a row that a product reads. Of pairs, that which an odd row lacks is 0, as
  // operand.h says: what is past the last unit may be NaN, made of an h0 that is infinite.
  static void put_operand(O* to, V v, int64_t n) {
    store_full<A>(to, kPaired<E> ? first_lanes<A>(v, n) : v);
  }

  // h as the recurrent product sees it.
  template <bool kVaried>
  V dropped(V h, int64_t b, int64_t j) const {
    if (!kVaried || !p_.variants.h_dropout) return h;
    return h * load<A>(static_cast<const A*>(p_.variants.h_dropout) + b * P_ + j, P_ - j);
  }

  const LstmForward& p_;
  const Range batch_;
  const int64_t H_, P_;
  const int64_t gx_rows_;
  const bool normed_;  // layer norm
  const bool varied_;  // variants beside it
  const int64_t h_stride_, c_stride_;
  O* h_[2];       // [B, h_stride_]
  A* c_;          // a CellState a thread, apart, or one
  O* cell_out_;   // [B, c_stride_]: o * tanh(c) before the projection
  O* zeros_;      // [h_stride_]: the h of a sequence that was reset
  A* h_kept_;     // [B, h_stride_]: the last h, for zoneout
  A* product_;    // [B, 4H]: recurrent products that wait for their norm
  A* norm_rows_;  // [threads][2][c_stride_]: c and o of the row at hand
  A* gx_;         // [blocks of H][gx_rows_][4][lanes]: gx of the steps at hand
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
