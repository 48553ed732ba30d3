// Forward of a whole sequence, one direction of one layer, of one group (groups.h).
//
// Each thread owns a slice of the hidden units: it multiplies its rows of W_hh (packed, unless the
// sequences or the steps are few: dots.h) with every sequence's h, applies the cell while the sums
// are in L1, and writes its slice of h. One barrier a step (two with a projection), because h has
// two buffers: the one written at a step was last read at the step before.
//
// A layer norm needs whole rows: there the product goes to memory, the threads meet, and each
// applies the cell to sequences of its own, so that one barrier more is all it takes and sums do
// not depend on the number of threads.
#pragma once

#include "dots.h"
#include "forward_cells.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// Steps of the input product at once: enough rows to use each weight often.
inline int64_t input_steps(Range batch) {
  return std::max<int64_t>(1, kChunkRows / std::max<int64_t>(1, batch.size()));
}

// E: the element of products, S: the storage type (operand.h). With pairs there are no variants.
template <class E, class S>
class Forward {
  using A = Acc<E>;
  using O = Stored<E>;
  using V = Vec<A>;
  static constexpr int L = Lanes<A>::kCount;
  // Of few rows: packing W_hh costs more than dots do. LSTMCell beside nn.LSTMCell at H 1024, B 5
  // and 16: bf16 0.67 and 0.73, now 1.81 and 1.66; fp32 1.74 and 1.43, now 3.90 and 2.41. 8 steps
  // of B 5 would take 10 % more (Zen 4).
  static constexpr int64_t kFewSteps = 4;
  // A single step uses its weights once: it does not pack them for more rows either, in proportion
  // to what a copy costs. LSTMCell, less time unpacked: bf16 H 512, B 64 and 128 7 and 3 %, H 1024,
  // B 64 to 256 31 to 6 %, H 2048, B 192 to 768 40 to 16 %; fp32 H 1024, B 64 to 384 24 to 6 %.
  // More time: bf16 H 256, B 128 10 %, H 1024, B 768 2 %; fp32 H 512, B 384 4 % (Zen 4, two
  // threads).
  static constexpr int64_t kBytesPerFewRows = 768 << 10;  // of weights, to kChunkRows rows
  // Short rows of weights are read as they lie too for as many rows of x or h, over all of few
  // steps, as K has of these. A single step, packed over unpacked, one thread and two: fp32 and
  // bf16 H 64, B 1 and 8 1.1 to 1.2 and 1.05, H 128, B 1, 8 and 16 1.6, 1.3 and 1.1, H 224, B 1, 8
  // and 24 1.9 to 2.3, 1.4 to 1.6 and 1.1; AVX2 and the baseline alike. Four steps of B 1: 1.0 to
  // 1.4, eight 0.94 to 1.15. Half as many columns: 0.87 to 1.03. Of no whole vectors, fp32, B 1: H
  // 100, 200, 300 and 650 1.4, 1.8, 2.1 and 5 (Zen 4).
  static constexpr int64_t kColumnsPerRow = 8;

 public:
  static Plan plan(const LstmForward& p) {
    // Dots of fewer sequences add up in another order: not split, they do not depend on threads.
    const int64_t B = dots(p) || input_dots(p) ? 1 : p.steps.B;
    return make_plan(p.threads, p.steps, B, blocks_of<A>(p.H), work_of_step(p), columns(p),
                     step_weights(p));
  }

  // Whether both directions of a layer at once, each on half of the threads, take less time than
  // one after the other on all.
  static bool side_by_side(const LstmForward& p) {
    return directions_share(p.threads, p.steps, work_of_step(p), step_weights(p));
  }

  Forward(const LstmForward& p, Range batch, int slices, Arena& arena)
      : p_(p),
        batch_(batch),
        H_(p.H),
        P_(p.P),
        K_(length(p)),
        dots_(dots(p)),
        copied_(dots_ && p.steps.B == 1 && p.steps.T >= kCopyMinSteps &&
                4 * H_ * K_ * int64_t(sizeof(S)) <= kCopyMaxBytes),
        input_dots_(input_dots(p)),
        steps_at_once_(input_steps(batch)),
        normed_(p.variants.gamma_hh),
        cells_(p, batch, slices, steps_at_once_, arena) {
    meet_ = take_barrier(arena, slices);
    packed_hh_ = arena.take<E>(dots_ ? 0 : 4 * blocks_of<A>(H_) * depth_of<E>(K_) * L);
    copied_hh_ = arena.take<S>(copied_ ? 4 * blocks_of<A>(H_) * L * K_ : 0);
    packed_ih_ =
        arena.take<E>(p.x && !input_dots_ ? 4 * blocks_of<A>(H_) * depth_of<E>(p.I) * L : 0);
    packed_hr_ = arena.take<E>(p.w_hr ? blocks_of<A>(P_) * depth_of<E>(H_) * L : 0);
    bias_ = arena.take<A>(p.x ? blocks_of<A>(H_) * L * 4 : 0);
    members_ = Member<E>::take(arena, slices, batch.size());
  }

  static void combine(Forward*, int, Barrier&, int, int) {}

  void work(int slices, int slice) {
    Member<E>& m = members_[slice];
    m.place(slice, slices, H_, P_);
    if (K_ && !dots_) {
      pack_gates(static_cast<const S*>(p_.w_hh), H_, K_, m.units, packed_hh_);
    }
    if (copied_) copy_w_hh(m);
    if (p_.w_hr) {
      pack_matrix(static_cast<const S*>(p_.w_hr), P_, H_, true, m.proj, packed_hr_);
    }
    if (p_.x && !input_dots_) {
      pack_gates(static_cast<const S*>(p_.w_ih), H_, p_.I, m.units, packed_ih_);
    }
    if (p_.x) add_biases(m);
    cells_.start(m);
    const auto meet = [&] { meet_->wait(slice, slices); };
    meet();
    const Weights w_hh =
        copied_ ? Weights{copied_hh_, 4 * L, L} : Weights{static_cast<const S*>(p_.w_hh), L, H_};
    int64_t made = 0;  // row of gx where the rows of the step begin
    for (int64_t i = 0; i < p_.steps.T; ++i) {
      if (p_.x && i % steps_at_once_ == 0) {
        input_product(m, i);
        made = 0;
      }
      const int64_t count = collect(p_.steps, p_.steps.step_at(i), batch_, m.rows);
      for (int64_t r = 0; r < count; ++r) {
        m.rows[r].slot = made++;
        m.a[r] = as_elements<E>(cells_.h_before(m.rows[r], i));
      }
      auto waiting = cells_.waiting(m, count);
      if (dots_) {
        each_dots(m, count, w_hh, K_, i & 1, [&](int64_t j, Range part, A* sums) {
          cells_.take(m.rows, part, j, sums, waiting, i);
        });
      } else {
        for_panels(Range{4 * m.units.begin, 4 * m.units.end}, m, count, depth_of<E>(K_), packed_hh_,
                   i & 1, [&](int64_t block, int, Range part, A* sums) {
                     cells_.take(m.rows, part, block / 4 * L, sums, waiting, i);
                   });
      }
      cells_.flush(m.rows, count, waiting, i);
      meet();
      if (normed_) {
        const Range own = share(count, slices, slice);
        for (int64_t r = own.begin; r < own.end; ++r) cells_.normed_cell(m.rows[r], slice, i);
        meet();
      }
      if (!p_.w_hr) continue;
      for (int64_t r = 0; r < count; ++r) m.a[r] = as_elements<E>(cells_.cell_out(m.rows[r]));
      for_panels(m.proj, m, count, depth_of<E>(H_), packed_hr_, false,
                 [&](int64_t block, int vectors, Range part, const A* sums) {
                   for (int64_t r = part.begin; r < part.end; ++r) {
                     for (int v = 0; v < vectors; ++v, sums += L) {
                       cells_.put_projected(m.rows[r], (block + v) * L, load_full<A>(sums), i);
                     }
                   }
                 });
      meet();
    }
  }

 private:
  // Where rows of weights for dots lie: those of a block of units and of its next gate begin so
  // many rows after the ones before.
  struct Weights {
    const S* first;
    int64_t block, gate;
  };

  // Of the weights that are used here.
  static int64_t columns(const LstmForward& p) { return (p.x ? p.I : 0) + length(p); }
  static int64_t step_weights(const LstmForward& p) {
    return columns(p) * 4 * p.H * int64_t(sizeof(O));
  }
  static int64_t work_of_step(const LstmForward& p) {
    return work_of<A>(p.steps.B, p.H, columns(p));
  }

  // Of the recurrent product: P, or 0 without one.
  static int64_t length(const LstmForward& p) { return p.w_hh ? p.P : 0; }

  // Of all steps: not worth packing weights of K columns for.
  static bool few_rows(const LstmForward& p, int64_t K) {
    const int64_t bytes = 4 * p.H * K * int64_t(sizeof(S));
    const int64_t most = p.steps.T == 1
                             ? std::max(int64_t{kChunkRows}, kChunkRows * bytes / kBytesPerFewRows)
                             : kChunkRows;
    return !p.pack_input && p.steps.rows <= most;
  }

  // Rows of K columns, for few rows of x or h or few steps. Of pairs, rows of an odd length do not
  // begin on pairs.
  static bool dots_suit(const LstmForward& p, int64_t K) {
    const bool few_steps = !p.pack_input && p.steps.T <= kFewSteps;
    const bool few_in_all = few_steps && p.steps.rows * kColumnsPerRow <= K;
    const bool whole_vectors = K % (Operand<E>::kDepth * L) == 0;
    return K % Operand<E>::kDepth == 0 && (whole_vectors || few_steps) &&
           (K >= kDotsMinK || few_in_all);
  }

  // Few sequences, or steps: W_hh is read as it lies, not packed.
  static bool dots(const LstmForward& p) {
    return (p.steps.B <= kDotsMaxRows<A> || (few_rows(p, length(p)) && p.steps.T <= kFewSteps)) &&
           dots_suit(p, length(p));
  }

  // Of W_ih.
  static bool input_dots(const LstmForward& p) {
    return p.x && few_rows(p, p.I) && dots_suit(p, p.I);
  }

  // gx = x W_ih^T + b_ih + b_hh for the columns of one thread and the steps from the i-th on, as
  // many as are made at once.
  void input_product(const Member<E>& m, int64_t i) {
    const S* w_ih = static_cast<const S*>(p_.w_ih);
    const int64_t depth = depth_of<E>(p_.I);
    int64_t count = 0;
    for (int64_t end = std::min(p_.steps.T, i + steps_at_once_); i < end; ++i) {
      const int64_t active = collect(p_.steps, p_.steps.step_at(i), batch_, m.rows);
      for (int64_t r = 0; r < active; ++r) {
        m.a[count++] = static_cast<const E*>(p_.x) + m.rows[r].row * depth;
      }
    }
    if (input_dots_) {
      each_dots(m, count, {w_ih, L, H_}, p_.I, false,
                [&](int64_t j, Range part, const A* sums) { put_gx(part, j, sums); });
    } else {
      for_panels(Range{4 * m.units.begin, 4 * m.units.end}, m, count, depth, packed_ih_, false,
                 [&](int64_t block, int, Range part, const A* sums) {
                   put_gx(part, block / 4 * L, sums);
                 });
    }
  }

  void put_gx(Range rows, int64_t j, const A* sums) {
    A* gx = cells_.own_gx(rows.begin, j);
    for (int gate = 0; gate < 4; ++gate) {
      const V bias = load_full<A>(bias_ + j * 4 + gate * L);
      for (int64_t r = 0; r < rows.size(); ++r) {
        const int64_t at = (r * 4 + gate) * L;
        store_full<A>(gx + at, load_full<A>(sums + at) + bias);
      }
    }
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

  // done(j, part, sums): units j .. j+L of rows `part`, sums [rows of part][4 gates][lanes]. The
  // weights lie unpacked. backwards: see for_panels.
  template <class Done>
  void each_dots(const Member<E>& m, int64_t count, const Weights& weights, int64_t K,
                 bool backwards, Done&& done) {
    constexpr int64_t most = kDotsMaxRows<A>;
    const int64_t chunks = (count + kChunkRows - 1) / kChunkRows;
    const bool few_steps = p_.steps.T <= kFewSteps;
    for (int64_t i = 0; i < m.units.size(); ++i) {
      const int64_t j = (backwards ? m.units.end - 1 - i : m.units.begin + i) * L;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range part = share(count, chunks, chunk);
        for (int gate = 0; gate < 4; ++gate) {
          const S* rows = weights.first + (j / L * weights.block + gate * weights.gate) * K;
          for (int64_t r = 0; r < part.size(); r += most) {
            dots_of_rows<E, S>(int(std::min(most, part.size() - r)), m.a + part.begin + r, rows,
                               H_ - j - 1, depth_of<E>(K), few_steps && !chunk && !r,
                               m.acc + (r * 4 + gate) * L, 4 * L);
          }
        }
        done(j, part, m.acc);
      }
    }
  }

  const LstmForward& p_;
  const Range batch_;
  const int64_t H_, P_, K_;
  const bool dots_;
  const bool copied_;  // W_hh is read from a copy
  const bool input_dots_;
  const int64_t steps_at_once_;  // of the input product
  const bool normed_;            // layer norm
  ForwardCells<E, S> cells_;
  Barrier* meet_;
  Member<E>* members_;
  E* packed_hh_;  // [4 * blocks of H][depth of K][lanes]
  S* copied_hh_;  // [blocks of H][4][lanes][K]
  E* packed_ih_;  // [4 * blocks of H][depth of I][lanes]
  E* packed_hr_;  // [blocks of P][depth of H][lanes]
  A* bias_;       // [blocks of H][4][lanes]: b_ih + b_hh, if x is given
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
