// The products of backward over all steps at once: out = a w, or a^T w, on the same tiles as the
// recurrence.
//
// The longer side of out is shared among the threads, which need nothing of each other. K is cut
// into slices, so that a slice of packed w and of transposed a stays in L2; slices are added in
// order.
#pragma once

#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

template <class A, class S>
class MatmulOf {
  static constexpr int L = Lanes<A>::kCount;
  static constexpr int64_t kSlice = 384;  // times 512 columns times 4 B: 768 KB of packed w

  struct Scratch {
    Member<A> member;
    A* w;  // [blocks of N][kSlice][lanes]
    A* a;  // [M][a_stride_], transposed; null if a is not
  };

 public:
  explicit MatmulOf(const Matmul& p)
      : p_(p), by_rows_(p.M >= p.N), a_stride_((std::min(p.K, kSlice) + L - 1) / L * L + L) {
    Arena arena(p.workspace);
    const int64_t w_size = blocks_of<A>(p.N) * L * std::min(p.K, kSlice);
    const int64_t a_size = p.a_transposed ? blocks_of<A>(p.M) * L * a_stride_ : 0;
    scratch_ = arena.take<Scratch>(p.threads);
    // The threads' parts of the longer side do not overlap and share one buffer.
    A* shared = arena.take<A>(by_rows_ ? a_size : w_size);
    for (int i = 0; i < p.threads; ++i) {
      Scratch s{};
      Member<A>::take(arena, 1, p.M, &s.member);
      A* own = arena.take<A>(by_rows_ ? w_size : a_size);
      s.w = by_rows_ ? own : shared;
      s.a = by_rows_ ? shared : own;
      if (p.workspace) scratch_[i] = s;
    }
    workspace_ = arena.used();
  }

  int64_t workspace() const { return workspace_; }

  void run() {
    // A team is started for this product alone, which costs more than meeting once.
    const int64_t useful = std::max<int64_t>(1, p_.M * p_.N * p_.K / (4 * kMacsPerThread));
    run_team(int(std::min<int64_t>(p_.threads, useful)),
             [this](int thread, int threads) { work(thread, threads); });
  }

 private:
  void work(int thread, int threads) {
    const int64_t row_blocks = blocks_of<A>(p_.M), blocks = blocks_of<A>(p_.N);
    const Range rows = by_rows_ ? share(row_blocks, threads, thread) : Range{0, row_blocks};
    const Range columns = by_rows_ ? Range{0, blocks} : share(blocks, threads, thread);
    const int64_t m0 = rows.begin * L, m1 = std::min(p_.M, rows.end * L);
    if (m0 >= m1 || columns.size() == 0) return;
    Scratch& s = scratch_[thread];
    A* out = static_cast<A*>(p_.out);
    for (int64_t k0 = 0; k0 < p_.K; k0 += kSlice) {
      const int64_t length = std::min(kSlice, p_.K - k0);
      const S* w = static_cast<const S*>(p_.w) + k0 * p_.N;
      // Blocks start where they would in a whole slice: another thread may be at a shorter one.
      A* packed = s.w + columns.begin * L * (std::min(p_.K, kSlice) - length);
      pack_matrix(w, p_.N, length, false, columns, s.member, 1, packed);
      if (p_.a_transposed) transpose_slice(k0, length, m0, m1, s.a);
      for (int64_t m = m0; m < m1; ++m) {
        s.member.a[m - m0] =
            p_.a_transposed ? s.a + m * a_stride_ : static_cast<const A*>(p_.a) + m * p_.K + k0;
      }
      for_panels(columns, s.member, m1 - m0, length, packed,
                 [&](int64_t block, int vectors, Range part, const A* sums) {
                   for (int64_t r = part.begin; r < part.end; ++r) {
                     for (int v = 0; v < vectors; ++v, sums += L) {
                       const int64_t j = (block + v) * L;
                       A* to = out + (m0 + r) * p_.N + j;
                       Vec<A> sum = load_full<A>(sums);
                       if (k0) sum += load<A>(to, p_.N - j);
                       store<A>(to, sum, p_.N - j);
                     }
                   }
                 });
    }
  }

  // to[m][k] = a[k0 + k][m], in blocks of lanes x lanes.
  void transpose_slice(int64_t k0, int64_t length, int64_t m0, int64_t m1, A* to) {
    const A* a = static_cast<const A*>(p_.a) + k0 * p_.M;
    for (int64_t k = 0; k < length; k += L) {
      for (int64_t m = m0; m < m1; m += L) {
        Vec<A> block[L];
        for (int i = 0; i < L; ++i) {
          block[i] =
              k + i < length ? load<A>(a + (k + i) * p_.M + m, p_.M - m) : broadcast<A>(A(0));
        }
        transpose<A>(block);
        for (int i = 0; i < L; ++i) store_full<A>(to + (m + i) * a_stride_ + k, block[i]);
      }
    }
  }

  const Matmul& p_;
  const bool by_rows_;      // threads share the rows of out, else its columns
  const int64_t a_stride_;  // of transposed rows: not a power of two
  Scratch* scratch_;
  int64_t workspace_;
};

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
