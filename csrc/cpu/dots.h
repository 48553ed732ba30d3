// Products of few rows, one to four at a time, straight from the weights as the user stores them.
//
// With so few rows the weights are used once or a few times a step, and packing them would cost
// as much as several steps. Here a vector runs along k, so that each row of weights is one stream;
// kCount sums are collected and then added up across their lanes together.
#pragma once

#include <algorithm>

#include "operand.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// Below this length the additions across lanes weigh more than packing saves, unless the weights
// are used for few rows in all. Above it packing gained nothing that could be told from noise, fp32
// and bf16, at B 1 and 4 of up to 150 steps, and took 10-50 % longer at T 25, B 1, H 1024 (Zen 5).
// Rows of no whole vectors, which begin anywhere, are packed but for few steps.
constexpr int64_t kDotsMinK = 256;

// Recurrent weights of a single sequence are first copied into one piece, in the order in which
// they are read, if there are enough steps and the copy may stay in the L2s of a few cores. T 50,
// H 256, fp32 then takes 25 % less time, T 25, H 512, bf16 10 %, but fp32 (4 MB) only 2 % (Zen 5).
constexpr int64_t kCopyMinSteps = 16;
constexpr int64_t kCopyMaxBytes = 2 << 20;

// More rows than lanes would leave no weight rows for a group of sums.
template <class A>
constexpr int kDotsMaxRows = Lanes<A>::kCount < 4 ? Lanes<A>::kCount : 4;

// Lane l of the result: lane l + lane l ^ D of a where bit D of l is 0, of b where it is 1.
template <class V, int D, int... Lane>
LSTM_EXT_INLINE V fold(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int count = sizeof...(Lane);
  const V same = shuffle<((Lane & D) ? count + Lane : Lane)...>(a, b);
  const V other = shuffle<((Lane & D) ? count + (Lane ^ D) : Lane ^ D)...>(a, b);
  return same + other;
}

// Lane l of v[0] becomes the sum over the lanes of v[l]. Every vector is summed in the same
// order, whatever its place.
template <class A, int D = Lanes<A>::kCount / 2>
LSTM_EXT_INLINE void sum_lanes(Vec<A>* v) {
  if constexpr (D > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, Lanes<A>::kCount>{};
#pragma GCC unroll 16
    for (int r = 0; r < D; ++r) v[r] = fold<Vec<A>, D>(v[r], v[r + D], lanes);
    sum_lanes<A, D / 2>(v);
  }
}

// Sums kept in registers at once.
constexpr int kDotSums = kManyRegisters ? 16 : 8;

// out[r * out_stride + l] = sum over k of a[r][k] * w[l][k] for kCount rows of weights, R rows of
// a, all of K elements. `last` is the index of the last row of weights that exists; later ones
// repeat it.
//
// Few streams are read side by side: rows of weights often lie a power of two apart, and more of
// them than L1 has ways would evict each other. Registers left over split each sum along k, so
// the order of the sum depends on R, though not on the number of threads.
//
// fetch: asks for the rows of weights to come while those before are multiplied. LSTMCell, H 1024,
// bf16, B 4 to 16 takes 7 to 22 % less time, fp32 3 to 10 %. Rows that were read a step, or some
// rows of a, before are in caches that need no asking: T 25, B 2 and 4 took up to 14 % longer in
// fp32, LSTMCell's B 64 18 % (Zen 4).
template <class E, class S, int R>
__attribute__((noinline)) void dots(const E* const* a, const S* w, int64_t last, int64_t K,
                                    bool fetch, Acc<E>* out, int64_t out_stride) {
  using A = Acc<E>;
  constexpr int L = Lanes<A>::kCount;
  constexpr int rows = L / (R == 3 ? 4 : R);  // of weights whose sums are added up together
  constexpr int streams = rows < 4 ? rows : 4;
  constexpr int parts = kDotSums / (streams * R) < 1 ? 1 : kDotSums / (streams * R);
  const int64_t ahead = fetch ? streams * K : 0;
  for (int first = 0; first < L; first += rows) {
    Vec<A> total[L];
#pragma GCC unroll 4
    for (int i = R * rows; i < L; ++i) total[i] = Vec<A>{};
    for (int s0 = 0; s0 < rows; s0 += streams) {
      const S* weight[streams];
#pragma GCC unroll 4
      for (int i = 0; i < streams; ++i) {
        weight[i] = w + std::min<int64_t>(first + s0 + i, last) * K * Operand<E>::kDepth;
      }
      Vec<A> sum[parts][R][streams] = {};
      int64_t k = 0;
      for (; k + parts * L <= K; k += parts * L) {
#pragma GCC unroll 16
        for (int p = 0; p < parts; ++p) {
          Vec<A> x[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) x[r] = in_register(load_elements<E>(a[r] + k + p * L));
#pragma GCC unroll 4
          for (int i = 0; i < streams; ++i) {
            __builtin_prefetch(weight[i] + (k + p * L + ahead) * Operand<E>::kDepth);
            const Vec<A> y = in_register(load_weights<E>(weight[i], k + p * L));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              sum[p][r][i] = multiply_add<E>(sum[p][r][i], x[r], y);
            }
          }
        }
      }
      for (; k + L <= K; k += L) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int i = 0; i < streams; ++i) {
            sum[0][r][i] = multiply_add<E>(sum[0][r][i], load_elements<E>(a[r] + k),
                                           load_weights<E>(weight[i], k));
          }
        }
      }
      if (k < K) {
        Vec<A> x[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) x[r] = load_elements_partial<E>(a[r] + k, K - k);
#pragma GCC unroll 4
        for (int i = 0; i < streams; ++i) {
          const Vec<A> y = load_weights_rest<E>(weight[i], k, K - k);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[0][r][i] = multiply_add<E>(sum[0][r][i], x[r], y);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < streams; ++i) {
          Vec<A> whole = sum[0][r][i];
#pragma GCC unroll 16
          for (int p = 1; p < parts; ++p) whole += sum[p][r][i];
          total[r * rows + s0 + i] = whole;
        }
      }
    }
    sum_lanes<A>(total);
    A lanes[L];
    store_full<A>(lanes, total[0]);
    for (int r = 0; r < R; ++r) {
      std::memcpy(out + r * out_stride + first, lanes + r * rows, rows * sizeof(A));
    }
  }
}

// The same for one row of a, with each row of weights read to its end before the next: where they
// all lie in one piece, L2 gives such a stream faster than four side by side (Zen 5, 512 KB: 200
// and 120 GB/s). kVectors: of a, kept in registers; 0: as many as K has, from memory.
template <class E, class S, int kVectors>
__attribute__((noinline)) void dots_of_one(const E* a, const S* w, int64_t last, int64_t K,
                                           Acc<E>* out) {
  using A = Acc<E>;
  using V = Vec<A>;
  constexpr int L = Lanes<A>::kCount;
  constexpr int64_t kAhead = 4096;  // bytes
  const auto add = [](V sum, V x, const S* row, int64_t k) {
    __builtin_prefetch(reinterpret_cast<const char*>(row + k * Operand<E>::kDepth) + kAhead);
    return multiply_add<E>(sum, x, load_weights<E>(row, k));
  };
  [[maybe_unused]] V x[kVectors ? kVectors : 1];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) x[i] = load_elements<E>(a + i * L);
  V total[L];
  for (int l = 0; l < L; ++l) {
    const S* row = w + std::min<int64_t>(l, last) * K * Operand<E>::kDepth;
    V even = {}, odd = {};
    if constexpr (kVectors) {
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i += 2) {
        even = add(even, x[i], row, i * L);
        odd = add(odd, x[i + 1], row, (i + 1) * L);
      }
    } else {
      int64_t k = 0;
      for (; k + 4 * L <= K; k += 4 * L) {
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
          even = add(even, load_elements<E>(a + k + i * L), row, k + i * L);
          odd = add(odd, load_elements<E>(a + k + (i + 1) * L), row, k + (i + 1) * L);
        }
      }
      for (; k + L <= K; k += L) even = add(even, load_elements<E>(a + k), row, k);
      if (k < K) {
        const V y = load_weights_rest<E>(row, k, K - k);
        odd = multiply_add<E>(odd, load_elements_partial<E>(a + k, K - k), y);
      }
    }
    total[l] = even + odd;
  }
  sum_lanes<A>(total);
  store_full<A>(out, total[0]);
}

template <class E, class S>
void dots_of_rows(int rows, const E* const* a, const S* w, int64_t last, int64_t K, bool fetch,
                  Acc<E>* out, int64_t out_stride) {
  constexpr int most = kDotsMaxRows<Acc<E>>;
  switch (rows) {
    case 0:
      return;
    case 1:
      if constexpr (kManyRegisters) {
        if (K == 16 * Lanes<Acc<E>>::kCount) return dots_of_one<E, S, 16>(*a, w, last, K, out);
        if (K == 8 * Lanes<Acc<E>>::kCount) return dots_of_one<E, S, 8>(*a, w, last, K, out);
        return dots_of_one<E, S, 0>(*a, w, last, K, out);
      } else {  // a is read from memory anyway: once for four rows of weights
        return dots<E, S, 1>(a, w, last, K, fetch, out, out_stride);
      }
    case 2:
      return dots<E, S, 2>(a, w, last, K, fetch, out, out_stride);
    case 3:
      return dots<E, S, (most < 4 ? 2 : 3)>(a, w, last, K, fetch, out, out_stride);
    default:
      return dots<E, S, (most < 4 ? 2 : 4)>(a, w, last, K, fetch, out, out_stride);
  }
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
