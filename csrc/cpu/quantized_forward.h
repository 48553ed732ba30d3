// Forward with weights in 8 bits (quantized.h), of one group: as in forward.h, but that the weights
// lie packed already, and that each thread makes whole numbers of the rows that it multiplies
// itself: next to the product that is little, and needs no further meeting.
#pragma once

#include "forward.h"
#include "quantized.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// The element of such products.
struct Byte {};

// S: the storage type of states and of y. x, the biases and sums are float. No layer norm.
template <class S>
class Forward<Byte, S> {
  using V = Vec<float>;
  static constexpr int L = Lanes<float>::kCount;
  static constexpr int kParts = kBlockRows / L;
  static_assert(kParts * L == kBlockRows, "whole parts of a block");

 public:
  static Plan plan(const LstmForward& p) {
    return make_plan(p.threads, p.steps, p.steps.B, blocks_of_16(p.H), work_of_step(p), columns(p),
                     step_weights(p));
  }

  static bool side_by_side(const LstmForward& p) {
    return directions_share(p.threads, p.steps, work_of_step(p), step_weights(p));
  }

  Forward(const LstmForward& p, Range batch, int slices, Arena& arena)
      : p_(p),
        batch_(batch),
        H_(p.H),
        P_(p.P),
        bytes_(p.quantized.byte_products),
        words_(p.quantized.row_bits == 16),
        steps_at_once_(input_steps(batch)),
        cells_(p, batch, slices, steps_at_once_, arena) {
    meet_ = take_barrier(arena, slices);
    members_ = Member<float>::take(arena, slices, batch.size());
    const int64_t most = std::max<int64_t>(batch.size(), kChunkRows);
    scratch_ = arena.take<Scratch>(slices);
    for (int i = 0; i < slices; ++i) {
      arena.next_page();
      Scratch s{};
      s.rows = WholeRow::take(arena, most, std::max(std::max(p.I, p.H), p.P), bytes_);
      s.sums = arena.take<float>(kChunkRows * 4 * kBlockRows);
      if (scratch_) scratch_[i] = s;
    }
  }

  static void combine(Forward*, int, Barrier&, int, int) {}

  void work(int slices, int slice) {
    Member<float>& m = members_[slice];
    const Range units = share(blocks_of_16(H_), slices, slice);
    const Range proj = share(blocks_of_16(P_), slices, slice);
    m.slice = slice;
    m.units = parts(units, H_);
    m.proj = parts(proj, P_);
    const Scratch& s = scratch_[slice];
    cells_.start(m);
    const auto meet = [&] { meet_->wait(slice, slices); };
    meet();
    int64_t made = 0;  // row of gx where the rows of the step begin
    for (int64_t i = 0; i < p_.steps.T; ++i) {
      if (p_.x && i % steps_at_once_ == 0) {
        input_product(m, s, units, i);
        made = 0;
      }
      const int64_t count = collect(p_.steps, p_.steps.step_at(i), batch_, m.rows);
      for (int64_t r = 0; r < count; ++r) {
        m.rows[r].slot = made++;
        set(s.rows[r], cells_.h_before(m.rows[r], i), P_);
      }
      auto waiting = cells_.waiting(m, count);
      each_block<4>(units, s, count, p_.w_hh, P_, p_.quantized.hh_scale, H_, i & 1,
                    [&](int64_t j, Range part, float* sums) {
                      cells_.take(m.rows, part, j, sums, waiting, i);
                    });
      cells_.flush(m.rows, count, waiting, i);
      meet();
      if (!p_.w_hr) continue;
      for (int64_t r = 0; r < count; ++r) set(s.rows[r], cells_.cell_out(m.rows[r]), H_);
      each_block<1>(proj, s, count, p_.w_hr, H_, p_.quantized.hr_scale, P_, false,
                    [&](int64_t j, Range part, const float* sums) {
                      for (int64_t r = part.begin; r < part.end; ++r, sums += L) {
                        cells_.put_projected(m.rows[r], j, load_full<float>(sums), i);
                      }
                    });
      meet();
    }
  }

 private:
  struct Scratch {
    WholeRow* rows;  // [max(batch, kChunkRows)]
    float* sums;     // [parts][rows of a chunk][gates][lanes]
  };

  static int64_t columns(const LstmForward& p) { return p.I + p.P; }
  static int64_t step_weights(const LstmForward& p) { return columns(p) * 4 * p.H; }
  static int64_t work_of_step(const LstmForward& p) {
    return work_of<float>(p.steps.B, p.H, columns(p));
  }

  // Of blocks of 16 columns, those of a vector.
  static Range parts(Range blocks, int64_t columns) {
    const int64_t all = blocks_of<float>(columns);
    return {std::min(all, blocks.begin * kParts), std::min(all, blocks.end * kParts)};
  }

  template <bool kBytes, bool kWords>
  struct Kind {
    static constexpr bool bytes = kBytes, words = kWords;
  };

  // What body returns for the products at hand.
  template <class Body>
  auto of_kind(const Body& body) const {
    if constexpr (kByteProducts) {
      if (bytes_) return words_ ? body(Kind<true, true>{}) : body(Kind<true, false>{});
    }
    return words_ ? body(Kind<false, true>{}) : body(Kind<false, false>{});
  }

  void set(WholeRow& row, const float* x, int64_t K) const {
    of_kind([&](auto kind) { row.set<kind.bytes, kind.words>(x, K); });
  }

  // gx = x W_ih^T + b for the columns of one thread and the steps from the i-th on.
  void input_product(const Member<float>& m, const Scratch& s, Range units, int64_t i) {
    int64_t count = 0;
    for (int64_t end = std::min(p_.steps.T, i + steps_at_once_); i < end; ++i) {
      const int64_t active = collect(p_.steps, p_.steps.step_at(i), batch_, m.rows);
      for (int64_t r = 0; r < active; ++r) {
        set(s.rows[count++], static_cast<const float*>(p_.x) + m.rows[r].row * p_.I, p_.I);
      }
    }
    const float* const bias = static_cast<const float*>(p_.b_ih);
    each_block<4>(units, s, count, p_.w_ih, p_.I, p_.quantized.ih_scale, H_, false,
                  [&](int64_t j, Range rows, const float* sums) {
                    float* gx = cells_.own_gx(rows.begin, j);
                    V b[4] = {};
                    for (int gate = 0; bias && gate < 4; ++gate) {
                      b[gate] = load<float>(bias + gate * H_ + j, H_ - j);
                    }
                    for (int64_t r = 0; r < rows.size() * 4; ++r) {
                      store_full<float>(gx + r * L, load_full<float>(sums + r * L) + b[r % 4]);
                    }
                  });
  }

  // done(j, part, sums): columns j .. j+L, of n for each of G gates, of the rows `part`, sums [rows
  // of part][G][lanes]. backwards: as in for_panels.
  template <int G, class Done>
  void each_block(Range blocks, const Scratch& s, int64_t count, const void* w, int64_t K,
                  const float* scale, int64_t n, bool backwards, Done&& done) const {
    const int64_t depth = depth_of_8(K), chunks = (count + kChunkRows - 1) / kChunkRows;
    for (int64_t i = 0; i < blocks.size(); ++i) {
      const int64_t block = backwards ? blocks.end - 1 - i : blocks.begin + i;
      const int64_t first = block * kBlockRows;
      const uint8_t* const weights = static_cast<const uint8_t*>(w) + first * G * depth * kDepth8;
      V scales[G * kParts] = {};
      for (int g = 0; g < G; ++g) {
        for (int p = 0; p < kParts && first + p * L < n; ++p) {
          const int64_t j = first + p * L;
          scales[g * kParts + p] = load<float>(scale + g * n + j, n - j);
        }
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range part = share(count, chunks, chunk);
        const int64_t stride = part.size() * G * L;
        of_kind([&](auto kind) {
          constexpr int at_once = kRowsAtOnce<kind.bytes, kind.words>;
          const int64_t tiles = (part.size() + at_once - 1) / at_once;
          for (int64_t t = 0; t < tiles; ++t) {
            const Range tile = share(part.size(), tiles, t);
            rows_of_block<decltype(kind), G, at_once>(
                int(tile.size()), s.rows + part.begin + tile.begin, weights, depth, scales,
                s.sums + tile.begin * G * L, stride);
          }
        });
        for (int p = 0; p < kParts && first + p * L < n; ++p) {
          done(first + p * L, part, s.sums + p * stride);
        }
      }
    }
  }

  // R: at most so many.
  template <class Kind, int G, int R, class... Arguments>
  static void rows_of_block(int rows, Arguments... arguments) {
    if constexpr (R > 1) {
      if (rows < R) return rows_of_block<Kind, G, R - 1>(rows, arguments...);
    }
    product_of_16<Kind::bytes, Kind::words, R, G>(arguments...);
  }

  const LstmForward& p_;
  const Range batch_;
  const int64_t H_, P_;
  const bool bytes_;             // an instruction multiplies bytes
  const bool words_;             // rows in 16 bits, else in 8
  const int64_t steps_at_once_;  // of the input product
  ForwardCells<float, S> cells_;
  Barrier* meet_;
  Member<float>* members_;
  Scratch* scratch_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
