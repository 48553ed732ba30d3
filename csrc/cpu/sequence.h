// What forward and backward of a whole sequence share: the plan, the workspace, the rows of a
// step, packing, and the walk over panels of packed weights.
#pragma once

#include <algorithm>
#include <memory>

#include "../params.h"
#include "product.h"
#include "team.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// Hands out 64-byte aligned pieces of the workspace. Without a base it only counts, so that the
// size asked for and the pieces taken come from the same code.
class Arena {
 public:
  static constexpr int64_t kPage = 4096;

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  // Leaves a page free: what one thread writes next to another's would be fetched by the other's
  // prefetcher, which stops at the end of a page, and have to be fetched back.
  void next_page() { used_ += kPage; }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

inline Barrier* take_barrier(Arena& arena, int members) {
  Barrier* barrier = arena.take<Barrier>(members);
  if (barrier) std::uninitialized_default_construct_n(barrier, members);
  return barrier;
}

template <class A>
int64_t blocks_of(int64_t columns) {
  return (columns + Lanes<A>::kCount - 1) / Lanes<A>::kCount;
}

// Work is counted in multiply-adds, of whole blocks of units: those of products, and for a cell
// those of so many columns more. A thread does 55 a nanosecond (Zen 4, 16 lanes).
constexpr int64_t kColumnsOfCell = 32;
// With less work a step and thread, meeting at the barrier costs more than a third thread, or a
// fourth, saves.
constexpr int64_t kWorkPerThread = 40960;
// Two threads meet sooner than more do. Time on one thread over that on two, where they share an L3
// and where not (T 50, Zen 4): B 2, H 32 1.32 and 1.10, B 8, H 8 1.43 and 1.21, B 1, H 64 1.33 and
// 0.76; below, B 4, H 8 1.24 and 1.11, B 1, H 32 0.97 and 0.55.
constexpr int64_t kWorkPerThreadOfTwo = 12288;
constexpr int64_t kStepsOfTwo = 16;
// Fewer steps do not save what starting more threads costs, unless the work of all steps is so much
// a thread. The same ratio just above, at 1.3 to 1.6 million: T 4, B 32, H 32 1.37 and 1.09, T 8, B
// 64, H 8 1.49 and 1.12, T 1, B 32, H 64 1.23 and 0.75; at half of it: T 8, B 8, H 32 1.18 and
// 0.99, T 8, B 32, H 8 1.37 and 1.01, T 1, B 16, H 64 1.16 and 0.68. With backward as well, nearer
// to 1.
constexpr int64_t kWorkOfFewSteps = 640 << 10;
// Groups (groups.h) read all weights for few rows. A group wants 4 sequences at least, or one, of
// so few weights that L2 gives them fast enough; so many rows of all steps to a column of weights
// that its copies, and those of their gradients, weigh little; and weights of a step that stay in
// its L2: with 2 MB, threads that share the units are as fast or faster where they share an L3 (Zen
// 4, L2 of 1 MB).
constexpr int64_t kSequencesOfGroup = 4;
constexpr int64_t kFewWeights = 256 << 10;  // bytes
constexpr int64_t kMostWeights = 1 << 20;
constexpr int64_t kColumnsPerRow = 4;

// Of B sequences' step: their cells and products of so many columns for each gate.
template <class A>
int64_t work_of(int64_t B, int64_t H, int64_t columns) {
  return B * 4 * blocks_of<A>(H) * Lanes<A>::kCount * (columns + kColumnsOfCell);
}

// A pure function of the problem and the number of threads: the same call gives the same plan.
// Sequences of different lengths make no groups: they would not have the same work.
// work: of a step; columns: of W_ih and W_hh together, as far as they are used here; step_weights:
// bytes of them that a step reads.
static inline Plan make_plan(int threads, const Steps& steps, int64_t B, int64_t unit_blocks,
                             int64_t work, int64_t columns, int64_t step_weights) {
  const int64_t T = steps.T;
  const int64_t useful =
      T < kStepsOfTwo
          ? T * work / kWorkOfFewSteps
          : std::max<int64_t>(work >= 2 * kWorkPerThreadOfTwo ? 2 : 1, work / kWorkPerThread);
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(threads, useful));
  const int64_t most_slices = std::max<int64_t>(1, unit_blocks);
  const int64_t slices = std::min(wanted, most_slices);
  const int64_t sequences = step_weights > kFewWeights ? kSequencesOfGroup : 1;
  int64_t most_groups =
      std::min(B / sequences, kColumnsPerRow * T * B / std::max<int64_t>(1, columns));
  if (steps.lengths || step_weights > kMostWeights) most_groups = 1;
  Plan best{1, int(slices)};
  for (int64_t groups = 2; groups <= std::min(wanted, most_groups); ++groups) {
    const Plan plan{int(groups), int(std::min(wanted / groups, most_slices))};
    if (plan.threads() >= best.threads()) best = plan;
  }
  // More threads than blocks of units: sequences are split, few as they may be.
  const Plan all{int(std::max<int64_t>(1, std::min(wanted / slices, B))), int(slices)};
  return all.threads() > best.threads() ? all : best;
}

// Whether two directions, of such steps each, are to share the threads, rather than the threads the
// units of one after the other: under the conditions of groups, which they are, too. Inference on
// two threads with a shared L3 (fp32, Zen 4): T 50, B 1, H 128 287 instead of 376 us, T 50, B 4, H
// 128 574 instead of 683, T 100, B 4, H 64 333 instead of 449; some 45 us of each difference are
// Python's.
static inline bool directions_share(int threads, const Steps& steps, int64_t work,
                                    int64_t step_weights) {
  const int64_t most = steps.B < kSequencesOfGroup ? kFewWeights : kMostWeights;
  return threads % 2 == 0 && steps.T * work >= kWorkOfFewSteps && step_weights <= most;
}

struct Row {
  int64_t b;      // sequence
  int64_t local;  // the same, counted from the first of its group
  int64_t row;    // where this step lies
  int64_t slot;   // where its row lies in a buffer of the steps at hand, if the caller has one
  int64_t prev;   // where the step taken before it lies; meaningless if first
  bool first;     // no step of this sequence was taken before
  bool last;      // none will be taken after
  bool reset;     // starts from a zero state
};

// Lists the sequences of `batch` that take step t.
static inline int64_t collect(const Steps& s, int64_t t, Range batch, Row* rows) {
  int64_t count = 0;
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    if (!s.active(t, b)) continue;
    const bool first = t == s.first_step(b);
    rows[count++] = {b,
                     b - batch.begin,
                     s.row(t, b),
                     0,
                     first ? -1 : s.row(s.reverse ? t + 1 : t - 1, b),
                     first,
                     t == s.last_step(b),
                     s.reset && s.reset[t * s.B + b]};
  }
  return count;
}

// Units j .. j+L of what variants give to the cell.
template <class A, class S>
LSTM_EXT_INLINE typename Cell<Math<A>>::Peephole load_peephole(const Variants& v, int64_t H,
                                                               int64_t j) {
  const S* p = static_cast<const S*>(v.peephole) + j;
  return {load<A>(p, H - j), load<A>(p + H, H - j), load<A>(p + 2 * H, H - j)};
}

template <class A>
LSTM_EXT_INLINE Vec<A> keep_h(const Variants& v, int64_t P, int64_t row, int64_t j) {
  if (v.keep_h) return load_flags<A>(v.keep_h + row * P + j, P - j);
  return broadcast<A>(A(v.keep_h_all));
}

template <class A>
LSTM_EXT_INLINE Vec<A> keep_c(const Variants& v, int64_t H, int64_t row, int64_t j) {
  if (v.keep_c) return load_flags<A>(v.keep_c + row * H + j, H - j);
  return broadcast<A>(A(v.keep_c_all));
}

// What one thread owns of a group's work, and its scratch.
template <class E>
struct Member {
  using A = Acc<E>;

  int slice;
  Range units;  // blocks of hidden units (columns of H)
  Range proj;   // blocks of columns of P
  Row* rows;    // [B]
  const E** a;  // [max(B, kChunkRows)] left-hand rows of a product
  A* acc;       // [2][kChunkRows][kPanelVectors][lanes]

  static constexpr int64_t kAcc = int64_t(kChunkRows) * kPanelVectors * Lanes<A>::kCount;

  // Scratch of `threads` members, for B sequences, taken from the arena thread by thread.
  static Member* take(Arena& arena, int threads, int64_t B) {
    Member* members = arena.take<Member>(threads);
    for (int i = 0; i < threads; ++i) {
      if (i) arena.next_page();
      Member m{};
      m.rows = arena.take<Row>(B);
      m.a = arena.take<const E*>(std::max<int64_t>(B, kChunkRows));
      m.acc = arena.take<A>(2 * kAcc);
      if (members) members[i] = m;
    }
    return members;
  }

  void place(int own, int slices, int64_t H, int64_t P) {
    slice = own;
    units = share(blocks_of<A>(H), slices, slice);
    proj = share(blocks_of<A>(P), slices, slice);
  }
};

// Visits the panels of a range of column blocks: up to four blocks each.
template <class Visit>
void each_panel(Range blocks, Visit&& visit) {
  for (int64_t b = blocks.begin; b < blocks.end; b += kPanelVectors) {
    visit(b, int(std::min<int64_t>(kPanelVectors, blocks.end - b)));
  }
}

// Packs weights [4H, K], rows i, f, g, o: unit block u becomes column blocks 4u .. 4u+3, its
// gates, so that one panel holds what a cell needs.
template <class E, class S>
void pack_gates(const S* w, int64_t H, int64_t K, Range units, E* packed) {
  constexpr int L = Lanes<Acc<E>>::kCount;
  const int64_t depth = depth_of<E>(K);
  for (int64_t u = units.begin; u < units.end; ++u) {
    const int count = int(std::min<int64_t>(L, H - u * L));
    for (int gate = 0; gate < 4; ++gate) {
      pack_rows<E>(w + (gate * H + u * L) * K, K, count, K, packed + (4 * u * depth + gate) * L,
                   4 * L);
    }
  }
}

// Packs a [N, K] matrix for products that sum over its K columns (transposed = false: over its
// rows, the matrix then being [K, N]).
template <class E, class S>
void pack_matrix(const S* w, int64_t N, int64_t K, bool transposed, Range blocks, E* packed) {
  constexpr int L = Lanes<Acc<E>>::kCount;
  each_panel(blocks, [&](int64_t block, int vectors) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t column = (block + v) * L;
      const int count = int(std::min<int64_t>(L, N - column));
      E* dst = packed + block * depth_of<E>(K) * L + v * L;
      if (transposed) {
        pack_rows<E>(w + column * K, K, count, K, dst, vectors * L);
      } else {
        pack_columns<E>(w + column, N, count, K, dst, vectors * L);
      }
    }
  });
}

// done(block, vectors, part, values): the panel that starts at `block` of the product's rows
// `part`, values [rows of part][vectors][lanes], which done may change. The left-hand rows are m.a,
// of K elements; K = 0 gives zeros.
//
// `backwards` takes the panels in the opposite order. Weights too many for a cache, walked so every
// other step, are read first where they were read last, and part of them is still there: 1 row's
// product takes 28 % less at H 64 (64 KB), 22 % at H 128 (256 KB; fp32, Zen 5).
template <class E, class Done>
void for_panels(Range blocks, const Member<E>& m, int64_t rows, int64_t K, const E* packed,
                bool backwards, Done&& done) {
  using A = Acc<E>;
  constexpr int L = Lanes<A>::kCount;
  const int64_t width = (rows == 1 ? 2 : 1) * kPanelVectors;
  const int64_t groups = (blocks.size() + width - 1) / width;
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  for (int64_t i = 0; i < groups; ++i) {
    int64_t block = blocks.begin + (backwards ? groups - 1 - i : i) * width;
    const int64_t end = std::min(blocks.end, block + width);
    const int panels = end - block == 2 * kPanelVectors ? 2 : 1;
    while (block < end) {
      const int vectors = int(std::min<int64_t>(kPanelVectors, end - block));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range part = share(rows, chunks, chunk);
        if (K) {
          product<E>(m.a + part.begin, int(part.size()), K, packed + block * K * L, vectors, panels,
                     vectors * K * L, m.acc, Member<E>::kAcc);
        } else {
          std::memset(m.acc, 0, 2 * Member<E>::kAcc * sizeof(A));
        }
        for (int p = 0; p < panels; ++p) {
          done(block + p * vectors, vectors, part, m.acc + p * Member<E>::kAcc);
        }
      }
      block += int64_t(panels) * vectors;
    }
  }
}

// Copies columns [begin, end) in blocks from one row of storage to another.
template <class A, class S>
void copy_blocks(const S* from, S* to, Range blocks, int64_t columns) {
  const int64_t begin = blocks.begin * Lanes<A>::kCount;
  const int64_t end = std::min<int64_t>(columns, blocks.end * Lanes<A>::kCount);
  if (begin < end) std::memcpy(to + begin, from + begin, (end - begin) * sizeof(S));
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
