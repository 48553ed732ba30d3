// The products of backward over all steps at once: out = a w, or a^T w, on the same tiles as the
// recurrence.
//
// The longer side of out is shared among the threads, which need nothing of each other. K is cut
// into slices, which are added in order, and the columns of w into pieces, packed one after the
// other. A group of rows of a, packed too if it is transposed, meets each panel of the piece as a
// whole, so that a panel, which may come from L3, is read once a group: the group's slice (614 KB
// of floats) has L2 to itself, or nearly. An out that is to be rounded is written with the last
// slice; the sums of those before are scratch.
#pragma once

#include <cstring>
#include <type_traits>

#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// E: the element of products, S: the storage type of w (operand.h).
template <class E, class S>
class MatmulOf {
  using A = Acc<E>;
  using O = Stored<E>;
  static constexpr int L = Lanes<A>::kCount;
  static constexpr int kDepth = Operand<E>::kDepth;
  static constexpr int64_t kPackRows = 8;  // elements of K packed at once
  // Elements of K in a slice, at most. Every slice but the first reads and writes all of out: with
  // 128, at H 512 and 1024, W's gradient ran at 82 GFLOP/s, with 384 at 96, with 640 at 101, of 117
  // (Zen 4, fp32, one thread).
  static constexpr int64_t kMostSlice = 640;
  static constexpr int64_t kPackedBytes = 640 * 1024;  // of a piece of w, one thread's
  // Rows of a that meet a panel at once, and are packed together: what lies side by side in a^T is
  // read together.
  static constexpr int64_t kGroupRows = 5 * kChunkRows;

  struct Scratch {
    E* w;    // [blocks_at_once_][slice_][lanes]
    E* a;    // [kGroupRows / kChunkRows][slice_][kChunkRows], if a is transposed
    A* acc;  // [kChunkRows][kPanelVectors][lanes]
    A* out;  // [M][N], [M][more_N], of all threads: the sums of slices, if out is rounded
  };

  // One right-hand side, and the columns of it that a thread makes.
  struct Side {
    const S* w;
    void* out;
    A* slices;  // where their sums are kept: out itself, unless that is rounded
    int64_t N;
    Range columns;  // blocks
    E* packed;
  };

 public:
  explicit MatmulOf(const Matmul& p) : p_(of_useful_threads(p)) {
    Arena arena(p.workspace);
    take_scratch(arena);
    workspace_ = arena.used();
  }
  // With scratch of a caller that runs the threads itself.
  MatmulOf(const Matmul& p, Arena& arena) : p_(p) { take_scratch(arena); }

  int64_t workspace() const { return workspace_; }

  void run() {
    run_team(p_.threads, [this](int thread, int threads) { work(thread, threads); });
  }

  // The product over K rows more, of an a that is transposed. first: there were none before. Not of
  // an out that is rounded.
  MatmulOf part(const void* a, const void* w, const void* more_w, int64_t K, bool first) const {
    MatmulOf part = *this;
    part.p_.a = a;
    part.p_.w = w;
    part.p_.more_w = more_w;
    part.p_.K = K;
    part.add_ = !first;
    return part;
  }

  // One thread's share.
  void work(int thread, int threads) const {
    if (!p_.K) {
      if (thread == 0) clear();
      return;
    }
    const int64_t row_blocks = blocks_of<A>(p_.M);
    const Range own = by_rows_ ? share(row_blocks, threads, thread) : Range{0, row_blocks};
    const int64_t m0 = own.begin * L, m1 = std::min(p_.M, own.end * L);
    if (m0 >= m1) return;
    const Scratch& s = scratch_[thread];
    Side sides[2] = {side(p_.w, p_.out, s.out, p_.N, thread, threads),
                     side(p_.more_w, p_.more_out, s.out ? s.out + p_.M * p_.N : nullptr, p_.more_N,
                          thread, threads)};
    // Of a that is not split, every thread could make the sums.
    A* sums = by_rows_ || thread == 0 ? static_cast<A*>(p_.sums) : nullptr;
    const int64_t depth = depth_of<E>(p_.K);
    const int64_t blocks = sides[0].columns.size() + sides[1].columns.size();
    for (int64_t k0 = 0; k0 < depth; k0 += slice_) {
      const int64_t length = std::min(slice_, depth - k0);
      int64_t block = 0;
      do {  // at least once, for the sums
        Side pieces[2] = {sides[0], sides[1]};
        int64_t skip = block, room = blocks_at_once_;
        E* to = s.w;
        for (Side& piece : pieces) {
          const Range all = piece.columns;
          piece.columns.begin = std::min(all.end, all.begin + skip);
          piece.columns.end = std::min(all.end, piece.columns.begin + room);
          skip = std::max<int64_t>(0, skip - all.size());
          room -= piece.columns.size();
          piece.packed = to;
          pack_side(piece, k0, length);
          to += piece.columns.size() * length * L;
        }
        for (int64_t group = m0; group < m1; group += kGroupRows) {
          const Range rows{group, std::min(m1, group + kGroupRows)};
          multiply_group(pieces, rows, k0, length, s, block == 0 ? sums : nullptr);
        }
        block += blocks_at_once_;
      } while (block < blocks);
    }
  }

 private:
  // The sums of nothing.
  void clear() const {
    const size_t size = p_.rounded ? sizeof(S) : sizeof(A);
    const auto zeros = [](void* to, size_t bytes) {
      if (bytes) std::memset(to, 0, bytes);
    };
    zeros(p_.out, p_.M * p_.N * size);
    zeros(p_.more_out, p_.M * p_.more_N * size);
    if (p_.sums) zeros(p_.sums, p_.M * sizeof(A));
  }

  // A team is started for this product alone, as for a single step.
  static Matmul of_useful_threads(Matmul p) {
    const int64_t useful = p.M * (p.N + p.more_N) * p.K / kWorkOfFewSteps;
    p.threads = int(std::clamp<int64_t>(useful, 1, p.threads));
    return p;
  }

  void take_scratch(Arena& arena) {
    scratch_ = arena.take<Scratch>(p_.threads);
    const bool kept = rounded_ && slice_ < depth_of<E>(p_.K);
    A* const out = arena.take<A>(kept ? p_.M * (p_.N + p_.more_N) : 0);
    for (int i = 0; i < p_.threads; ++i) {
      Scratch s{};
      s.w = arena.take<E>(blocks_at_once_ * L * slice_);
      s.a = arena.take<E>(p_.a_transposed ? slice_ * kGroupRows : 0);
      s.acc = arena.take<A>(kChunkRows * kPanelVectors * L);
      s.out = out;
      if (scratch_) scratch_[i] = s;
    }
  }

  // Of the problem alone, not of the number of threads: sums are cut where it ends. As even as it
  // goes.
  static int64_t slice_of(int64_t depth) {
    const int64_t slices = (depth + kMostSlice - 1) / kMostSlice;
    return slices ? (depth + slices - 1) / slices : 0;
  }

  // As many as whole panels have.
  static int64_t blocks_at_once(int64_t blocks, int64_t slice) {
    const int64_t panel = std::max<int64_t>(1, slice) * kPanelVectors * L * int64_t(sizeof(E));
    static_assert(kPackedBytes >= kMostSlice * kPanelVectors * L * int64_t(sizeof(E)));
    return std::min(blocks, kPackedBytes / panel * kPanelVectors);
  }

  Side side(const void* w, void* out, A* slices, int64_t N, int thread, int threads) const {
    const int64_t blocks = blocks_of<A>(N);
    return {static_cast<const S*>(w),
            out,
            rounded_ ? slices : static_cast<A*>(out),
            N,
            by_rows_ ? Range{0, blocks} : share(blocks, threads, thread),
            nullptr};
  }

  void pack_side(const Side& side, int64_t k0, int64_t length) const {
    for (int64_t k = 0; k < length; k += kPackRows) {
      each_panel(side.columns, [&](int64_t block, int vectors) {
        E* panel = side.packed + (block - side.columns.begin) * length * L;
        pack(side.w + block * L, side.N, side.N - block * L, k0 + k,
             std::min(kPackRows, length - k), panel + k * vectors * L, vectors);
      });
    }
  }

  // Rows `all` of a^T as [chunks][length][kChunkRows]; adds them up over k on the way.
  void pack_group(Range all, int64_t k0, int64_t length, E* to, A* sums) const {
    constexpr int vectors = kChunkRows / L;
    for (int64_t k = 0; k < length; k += kPackRows) {
      for (int64_t m = all.begin; m < all.end; m += kChunkRows) {
        pack(static_cast<const O*>(p_.a) + m, p_.M, all.end - m, k0 + k,
             std::min(kPackRows, length - k), to + (m - all.begin) * length + k * kChunkRows,
             vectors);
      }
    }
    if (!sums) return;
    for (int64_t m = all.begin; m < all.end; m += kChunkRows) {
      const E* from = to + (m - all.begin) * length;
      Vec<A> sum[vectors] = {};
      for (int64_t k = 0; k < length; ++k) {
        for (int v = 0; v < vectors; ++v) {
          sum[v] = multiply_add<E>(sum[v], load_elements<E>(from + k * kChunkRows + v * L), ones());
        }
      }
      for (int v = 0; v < vectors && m + v * L < all.end; ++v) {
        A* at = sums + m + v * L;
        const int64_t n = all.end - m - v * L;
        if (k0 || add_) sum[v] += load<A>(at, n);
        store<A>(at, sum[v], n);
      }
    }
  }

  // `length` elements from k0 on of `vectors` blocks of columns, of which `columns` exist.
  template <class T>
  void pack(const T* src, int64_t stride, int64_t columns, int64_t k0, int64_t length, E* dst,
            int vectors) const {
    const int64_t rows = std::min(length * kDepth, p_.K - k0 * kDepth);
    for (int v = 0; v < vectors; ++v) {
      const int count = int(std::max<int64_t>(0, std::min<int64_t>(L, columns - v * L)));
      pack_columns<E>(src + k0 * kDepth * stride + v * L, stride, count, rows, dst + v * L,
                      vectors * L);
    }
  }

  static Vec<A> ones() {
    if constexpr (kPaired<E>) {
      const E one{{0x3f80}, {0x3f80}};
      return broadcast_element<E>(&one);
    } else {
      return broadcast<A>(A(1));
    }
  }

  void multiply_group(const Side (&pieces)[2], Range rows, int64_t k0, int64_t length,
                      const Scratch& s, A* sums) const {
    if (p_.a_transposed) pack_group(rows, k0, length, s.a, sums);
    const E* a[kGroupRows];
    for (int64_t r = 0; r < rows.size(); ++r) {
      a[r] = p_.a_transposed
                 ? s.a + r / kChunkRows * kChunkRows * length + r % kChunkRows
                 : as_elements<E>(static_cast<const O*>(p_.a) + (rows.begin + r) * p_.K) + k0;
    }
    const bool last = k0 + length == depth_of<E>(p_.K);
    for (const Side& piece : pieces) {
      if (rounded_ && last) {
        multiply(piece, static_cast<S*>(piece.out), rows, a, k0, length, s.acc);
      } else {
        multiply(piece, piece.slices, rows, a, k0, length, s.acc);
      }
    }
  }

  template <class Out>
  void multiply(const Side& piece, Out* out, Range rows, const E* const* a, int64_t k0,
                int64_t length, A* acc) const {
    const bool more = k0 || add_;
    each_panel(piece.columns, [&](int64_t block, int vectors) {
      const E* panel = piece.packed + (block - piece.columns.begin) * length * L;
      for (int64_t begin = rows.begin; begin < rows.end; begin += kChunkRows) {
        const int64_t end = std::min(rows.end, begin + kChunkRows);
        // What is added to is asked for before the product: it lies in short pieces, which the
        // processor does not see coming.
        for (int64_t m = begin; more && m < end; ++m) {
          for (int v = 0; v < vectors; ++v) {
            __builtin_prefetch(piece.slices + m * piece.N + (block + v) * L, 1, 2);
          }
        }
        product<E>(a + (begin - rows.begin), int(end - begin), length, panel, vectors, 1, 0, acc, 0,
                   p_.a_transposed ? kChunkRows : 1);
        const A* sums = acc;
        for (int64_t m = begin; m < end; ++m) {
          for (int v = 0; v < vectors; ++v, sums += L) {
            const int64_t j = (block + v) * L;
            const int64_t at = m * piece.N + j;
            Vec<A> sum = load_full<A>(sums);
            if (more) sum += load<A>(piece.slices + at, piece.N - j);
            store<A>(out + at, sum, piece.N - j);
          }
        }
      }
    });
  }

  Matmul p_;
  bool rounded_ = p_.rounded && !std::is_same_v<A, S>;
  bool add_ = false;  // to what out, more_out and sums hold
  int64_t blocks_ = blocks_of<A>(p_.N) + blocks_of<A>(p_.more_N);  // of columns, both sides
  bool by_rows_ = p_.M >= p_.N + p_.more_N;      // threads share the rows of out, else its columns
  int64_t slice_ = slice_of(depth_of<E>(p_.K));  // of K at once
  int64_t blocks_at_once_ = blocks_at_once(blocks_, slice_);  // of columns, in a piece
  Scratch* scratch_ = nullptr;
  int64_t workspace_ = 0;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
