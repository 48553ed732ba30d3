// The cell of backward, all its variants: from the gradients of h_t and c_t to dgates_t and the
// gradient of c_{t-1}.
#pragma once

#include "norm.h"
#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// E: the element of products, S: the storage type (operand.h). dgates [.., 4H]: rows by Row::slot.
template <class E, class S>
class BackwardCells {
  using A = Acc<E>;
  using O = Stored<E>;
  using V = Vec<A>;
  using LstmCell = Cell<Math<A>>;
  static constexpr int L = Lanes<A>::kCount;
  static constexpr int kNormRows = 3;

 public:
  // For the sequences of `batch` and so many threads.
  BackwardCells(const LstmBackward& p, Range batch, int threads, Arena& arena, O* dgates)
      : p_(p),
        batch_(batch),
        H_(p.H),
        P_(p.P),
        h_stride_(blocks_of<A>(p.P) * L),
        c_stride_(blocks_of<A>(p.H) * L),
        dgates_(dgates) {
    const int64_t B = batch.size();
    const bool normed = p.variants.gamma_hh;
    dh_ = arena.take<A>(B * h_stride_);
    dc_ = arena.take<A>(B * c_stride_);
    dout_ = arena.take<A>(normed && p.w_hr ? B * c_stride_ : 0);
    norm_rows_ = arena.take<A>(normed ? threads * kNormRows * c_stride_ : 0);
  }

  void start(const Member<E>& m) {
    fill(m.proj, static_cast<const S*>(p_.dh_n), P_, dh_, h_stride_);
    fill(m.units, static_cast<const S*>(p_.dc_n), H_, dc_, c_stride_);
  }

  void finish(const Member<E>& m) {
    for (int64_t b = batch_.begin; b < batch_.end; ++b) {
      const int64_t local = b - batch_.begin;
      for (int64_t j = m.proj.begin * L; j < m.proj.end * L; j += L) {
        store<A>(static_cast<S*>(p_.dh0) + b * P_ + j, load_full<A>(dh_ + local * h_stride_ + j),
                 P_ - j);
      }
      for (int64_t j = m.units.begin * L; j < m.units.end * L; j += L) {
        store<A>(static_cast<S*>(p_.dc0) + b * H_ + j, load_full<A>(dc_ + local * c_stride_ + j),
                 H_ - j);
      }
    }
  }

  // Gradient of h_t in columns j .. j+L, what later steps sent back and what the output received,
  // as it reaches what was made at this step; what reaches h_{t-1} through zoneout waits in dh_.
  V dh_fresh(const Row& row, int64_t j) {
    A* sent = dh_ + row.local * h_stride_ + j;
    V dh = load_full<A>(sent);
    if (p_.dy) dh += load<A>(static_cast<const S*>(p_.dy) + row.row * p_.dy_stride + j, P_ - j);
    if (!p_.variants.zoneout_h()) return dh;
    const V keep = keep_h<A>(p_.variants, P_, row.row, j);
    store_full<A>(sent, keep * dh);
    return (1 - keep) * dh;
  }

  // product: the gradient of what W_hh was multiplied with.
  void put_dh(const Row& row, int64_t j, V product) {
    const Variants& v = p_.variants;
    A* dh = dh_ + row.local * h_stride_ + j;
    if (v.h_dropout) {
      product *= load<A>(static_cast<const A*>(v.h_dropout) + row.b * P_ + j, P_ - j);
    }
    if (const void* more = p_.tangents.dh_more) {
      product += load<A>(static_cast<const A*>(more) + row.row * P_ + j, P_ - j);
    }
    if (v.zoneout_h()) product += load_full<A>(dh);
    store_full<A>(dh, row.reset ? broadcast<A>(A(0)) : product);
  }

  void varied_cells(const Member<E>& m, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t u = m.units.begin; u < m.units.end; ++u) {
        cell(m.rows[r], u * L, dh_fresh(m.rows[r], u * L));
      }
    }
  }

  // As varied_cells, without asking for each variant, and in two halves: see Forward::cells.
  // Between them the gradients of o's pre-activation and of c lie where they belong.
  void plain_cells(const Member<E>& m, int64_t count) {
    const int64_t begin = m.units.begin * L, end = m.units.end * L;
    const A* c_seq = static_cast<const A*>(p_.c_seq);
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = m.rows[r];
      const A* o = static_cast<const A*>(p_.gates) + (row.row * 4 + 3) * H_;
      O* da_o = dgates_ + (row.slot * 4 + 3) * H_;
      for (int64_t j = begin; j < end; j += L) {
        const int64_t n = H_ - j;
        V dh = load_full<A>(dh_ + row.local * h_stride_ + j);
        if (p_.dy) dh += load<A>(static_cast<const S*>(p_.dy) + row.row * p_.dy_stride + j, n);
        typename LstmCell::Gates s, da;
        s.o = load<A>(o + j, n);
        V dc = LstmCell::backward_output(s, Math<A>::tanh(load<A>(c_seq + row.row * H_ + j, n)), dh,
                                         da);
        dc += sent_to_c(row, j);
        store<A>(da_o + j, da.o, n);
        store_full<A>(dc_ + row.local * c_stride_ + j, dc);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = m.rows[r];
      const A* gates = static_cast<const A*>(p_.gates) + row.row * 4 * H_;
      O* dgates = dgates_ + row.slot * 4 * H_;
      for (int64_t j = begin; j < end; j += L) {
        const int64_t n = H_ - j;
        A* dc_state = dc_ + row.local * c_stride_ + j;
        V dc = load_full<A>(dc_state);
        typename LstmCell::Gates s, da;
        s.i = load<A>(gates + j, n);
        s.f = load<A>(gates + H_ + j, n);
        s.g = load<A>(gates + 2 * H_ + j, n);
        LstmCell::backward_state(s, load_c_prev(row, j), dc, da, nullptr);
        store_full<A>(dc_state, row.reset ? broadcast<A>(A(0)) : dc);
        store<A>(dgates + j, da.i, n);
        store<A>(dgates + H_ + j, da.f, n);
        store<A>(dgates + 2 * H_ + j, da.g, n);
        if (!row.first) fetch(row, j);
      }
    }
  }

  // dout: gradient of o * tanh(c).
  void cell(const Row& row, int64_t j, V dout) {
    if (p_.tangents.gates) {
      if constexpr (std::is_same_v<S, A>) tangent(row, j, dout);
      return;
    }
    if (p_.dout_seq) {
      store<A>(static_cast<A*>(p_.dout_seq) + row.row * H_ + j, dout, H_ - j);
    }
    const Step step = load_step(row, j);
    const V tanh_c = Math<A>::tanh(step.c);
    typename LstmCell::Gates da;
    const V dc = LstmCell::backward_output(step.s, tanh_c, dout, da);
    put_cell_out(row, j, step.s.o * tanh_c);
    state(row, j, step, dc, da);
  }

  // The gradient of o * tanh(norm(c)) that normed_cell is to find, through the projection.
  void put_dout(const Row& row, int64_t j, V dout) {
    store_full<A>(dout_ + row.local * c_stride_ + j, dout);
  }

  // One sequence's units, all of them, with h = o * tanh(gamma * c_hat + beta), then the norm of
  // the recurrent product.
  void normed_cell(const Row& row, int thread) {
    const Variants& v = p_.variants;
    const S* gamma_hh = static_cast<const S*>(v.gamma_hh);
    const S* gamma_ch = static_cast<const S*>(v.gamma_ch);
    const S* beta_ch = static_cast<const S*>(v.beta_ch);
    const A* norm = static_cast<const A*>(p_.norm) + row.row * 4 * H_;
    const O* dgates = dgates_ + row.slot * 4 * H_;
    A* dproduct = static_cast<A*>(p_.dproduct) + row.row * 4 * H_;
    A* dnorm = p_.dnorm ? static_cast<A*>(p_.dnorm) + row.b * 6 * H_ : nullptr;
    A* c_row = norm_rows_ + thread * kNormRows * c_stride_;
    A* dc_hat_row = c_row + c_stride_;
    A* da_o_row = dc_hat_row + c_stride_;

    for (int64_t j = 0; j < H_; j += L) store_full<A>(c_row + j, load_step(row, j).c);
    const auto of_c = Moments<A>::of(c_row, H_, v.epsilon);
    NormGradient<A> through_c;
    for (int64_t j = 0; j < H_; j += L) {
      const int64_t n = H_ - j;
      const Step step = load_step(row, j);
      const V c_hat = of_c.normalize(step.c), gamma = load<A>(gamma_ch + j, n);
      const V tanh_c = Math<A>::tanh(c_hat * gamma + load<A>(beta_ch + j, n));
      const V dout = p_.w_hr ? load_full<A>(dout_ + row.local * c_stride_ + j) : dh_fresh(row, j);
      typename LstmCell::Gates da;
      const V dnormed = LstmCell::backward_output(step.s, tanh_c, dout, da);
      put_cell_out(row, j, step.s.o * tanh_c);
      if (dnorm) {
        add_to(dnorm + 4 * H_ + j, dnormed * c_hat, n);
        add_to(dnorm + 5 * H_ + j, dnormed, n);
      }
      through_c.add(dnormed * gamma, c_hat, n);
      store_full<A>(c_row + j, c_hat);
      store_full<A>(dc_hat_row + j, dnormed * gamma);
      store_full<A>(da_o_row + j, da.o);
    }
    through_c.finish(H_, of_c.rstd);
    NormGradient<A> through_product;
    for (int64_t j = 0; j < H_; j += L) {
      const int64_t n = H_ - j;
      typename LstmCell::Gates da;
      da.o = load_full<A>(da_o_row + j);
      const V dc = through_c.gradient(load_full<A>(dc_hat_row + j), load_full<A>(c_row + j));
      state(row, j, load_step(row, j), dc, da);
      const V gates[4] = {da.i, da.f, da.g, da.o};
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t column = gate * H_ + j;
        const V x_hat = load<A>(norm + column, n);
        through_product.add(gates[gate] * load<A>(gamma_hh + column, n), x_hat, n);
        if (dnorm) add_to(dnorm + column, gates[gate] * x_hat, n);
      }
    }
    through_product.finish(4 * H_, static_cast<const A*>(p_.norm_r)[row.row]);
    for (int64_t j = 0; j < 4 * H_; j += L) {
      const int64_t n = 4 * H_ - j;
      const V d = load<A>(dgates + j, n) * load<A>(gamma_hh + j, n);
      store<A>(dproduct + j, through_product.gradient(d, load<A>(norm + j, n)), n);
    }
  }

 private:
  // The gradients of the last state, as the caller has them: zero, unless given.
  void fill(Range blocks, const S* from, int64_t columns, A* to, int64_t stride) {
    for (int64_t b = batch_.begin; b < batch_.end; ++b, to += stride) {
      for (int64_t j = blocks.begin * L; j < blocks.end * L; j += L) {
        store_full<A>(to + j,
                      from ? load<A>(from + b * columns + j, columns - j) : broadcast<A>(A(0)));
      }
    }
  }

  // What forward had at units j .. j+L.
  struct Step {
    typename LstmCell::Gates s;
    V c_prev;
    V c;  // before zoneout
  };

  LSTM_EXT_INLINE V load_c_prev(const Row& row, int64_t j) const {
    if (row.reset) return broadcast<A>(A(0));
    if (row.first) return load<A>(static_cast<const S*>(p_.c0) + row.b * H_ + j, H_ - j);
    return load<A>(static_cast<const A*>(p_.c_seq) + row.prev * H_ + j, H_ - j);
  }

  Step load_step(const Row& row, int64_t j) const {
    const int64_t n = H_ - j;
    const A* gates = static_cast<const A*>(p_.gates) + row.row * 4 * H_ + j;
    const A* c_seq = static_cast<const A*>(p_.c_seq);
    Step step{{load<A>(gates, n), load<A>(gates + H_, n), load<A>(gates + 2 * H_, n),
               load<A>(gates + 3 * H_, n)},
              broadcast<A>(A(0)),
              load<A>(c_seq + row.row * H_ + j, n)};
    if (row.first && !row.reset) {
      step.c_prev = load<A>(static_cast<const S*>(p_.c0) + row.b * H_ + j, n);
    } else if (!row.reset) {
      step.c_prev = load<A>(c_seq + row.prev * H_ + j, n);
    }
    if (p_.variants.zoneout_c()) step.c = step.s.f * step.c_prev + step.s.i * step.s.g;
    return step;
  }

  // Asks for what the next step reads and writes at units j .. j+L, a product before it is needed:
  // pieces of rows are too short for the processor to see them coming.
  LSTM_EXT_INLINE void fetch(const Row& row, int64_t j) const {
    const A* gates = static_cast<const A*>(p_.gates) + row.prev * 4 * H_ + j;
    for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + gate * H_, 0, 2);
    if (p_.dgates) {
      const O* dgates = dgates_ + row.prev * 4 * H_ + j;
      for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(dgates + gate * H_, 1, 2);
    }
    const int64_t before = std::max<int64_t>(0, 2 * row.prev - row.row);  // often where c_prev lies
    __builtin_prefetch(static_cast<const A*>(p_.c_seq) + before * H_ + j, 0, 2);
    if (p_.dy) __builtin_prefetch(static_cast<const S*>(p_.dy) + row.prev * p_.dy_stride + j, 0, 2);
  }

  // Gradient of c from later steps and from outside.
  LSTM_EXT_INLINE V sent_to_c(const Row& row, int64_t j) const {
    const V sent = load_full<A>(dc_ + row.local * c_stride_ + j);
    if (!p_.dcells) return sent;
    return sent + load<A>(static_cast<const S*>(p_.dcells) + row.row * H_ + j, H_ - j);
  }

  void put_cell_out(const Row& row, int64_t j, V out) {
    if (p_.cell_out) store<A>(static_cast<O*>(p_.cell_out) + row.row * H_ + j, out, H_ - j);
  }

  // dc: gradient of c through h. Stores what is left of da, and the gradient of c_prev.
  void state(const Row& row, int64_t j, const Step& step, V dc, typename LstmCell::Gates& da) {
    const int64_t n = H_ - j;
    const Variants& v = p_.variants;
    A* dc_state = dc_ + row.local * c_stride_ + j;
    V sent = sent_to_c(row, j);
    V kept = broadcast<A>(A(0));
    if (v.zoneout_c()) {
      const V keep = keep_c<A>(v, H_, row.row, j);
      kept = keep * sent;
      sent = (1 - keep) * sent;
    }
    dc += sent;
    if (p_.dc_seq) store<A>(static_cast<A*>(p_.dc_seq) + row.row * H_ + j, dc, n);
    if (v.peephole) {
      const auto peephole = load_peephole<A, S>(v, H_, j);
      LstmCell::backward_state(step.s, step.c_prev, dc, da, &peephole);
      if (p_.dpeephole) {
        A* sums = static_cast<A*>(p_.dpeephole) + row.b * 3 * H_ + j;
        add_to(sums, da.i * step.c_prev, n);
        add_to(sums + H_, da.f * step.c_prev, n);
        add_to(sums + 2 * H_, da.o * step.c, n);
      }
    } else {
      LstmCell::backward_state(step.s, step.c_prev, dc, da, nullptr);
    }
    if (v.zoneout_c()) dc += kept;
    store_full<A>(dc_state, row.reset ? broadcast<A>(A(0)) : dc);
    put_dgates(row, j, da);
  }

  LSTM_EXT_INLINE void put_dgates(const Row& row, int64_t j, const typename LstmCell::Gates& da) {
    const int64_t n = H_ - j;
    O* dgates = dgates_ + row.slot * 4 * H_ + j;
    store<A>(dgates, da.i, n);
    store<A>(dgates + H_, da.f, n);
    store<A>(dgates + 2 * H_, da.g, n);
    store<A>(dgates + 3 * H_, da.o, n);
  }

  // dout: the tangent of the gradient of o * tanh(c), but for what W_hr's tangent adds.
  void tangent(const Row& row, int64_t j, V dout) {
    const Tangents& t = p_.tangents;
    const int64_t n = H_ - j, at = row.row * H_ + j;
    const Step step = load_step(row, j);
    if (t.dout_more) dout += load<A>(static_cast<const A*>(t.dout_more) + at, n);
    const A* gates = static_cast<const A*>(t.gates) + row.row * 4 * H_ + j;
    const A* c_seq = static_cast<const A*>(t.c_seq);
    V c_prev = broadcast<A>(A(0));
    if (row.first && !row.reset) {
      c_prev = load<A>(static_cast<const A*>(t.c0) + row.b * H_ + j, n);
    } else if (!row.reset) {
      c_prev = load<A>(c_seq + row.prev * H_ + j, n);
    }
    const V tanh_c = Math<A>::tanh(step.c);
    put_cell_out(row, j, step.s.o * tanh_c);
    V dc = sent_to_c(row, j);
    typename LstmCell::Gates da;
    LstmCell::backward_tangent(step.s, tanh_c, step.c_prev,
                               load<A>(static_cast<const A*>(t.dout) + at, n),
                               load<A>(static_cast<const A*>(t.dc) + at, n),
                               {load<A>(gates, n), load<A>(gates + H_, n),
                                load<A>(gates + 2 * H_, n), load<A>(gates + 3 * H_, n)},
                               load<A>(c_seq + at, n), c_prev, dout, dc, da);
    store_full<A>(dc_ + row.local * c_stride_ + j, row.reset ? broadcast<A>(A(0)) : dc);
    put_dgates(row, j, da);
  }

  static void add_to(A* sums, V v, int64_t n) { store<A>(sums, load<A>(sums, n) + v, n); }

  const LstmBackward& p_;
  const Range batch_;
  const int64_t H_, P_;
  const int64_t h_stride_, c_stride_;
  O* const dgates_;
  A* dh_;         // [B, h_stride_]: gradient of h sent back by the steps walked so far
  A* dc_;         // [B, c_stride_]: the same of c
  A* dout_;       // [B, c_stride_]
  A* norm_rows_;  // [threads][kNormRows][c_stride_]: of the row at hand
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
