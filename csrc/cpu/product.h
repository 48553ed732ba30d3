// Small matrix products against packed weights: out[r, :] += a[r, :] * W for a list of rows.
//
// W's columns are cut into blocks of one vector; 1 to 4 neighbouring blocks form a panel, stored
// [K][NV][lanes], so that the inner loop reads one stream. The rows of `a` are given by pointers:
// sequences that have ended are left out of the list, a reset state is a pointer to zeros.
//
// Every output element is summed over k in order, whatever the tile it falls in: results do not
// depend on the batch around a sequence nor on the number of threads. (Those of dots.h depend on
// how many sequences there are.)
#pragma once

#include <algorithm>

#include "operand.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

constexpr int kPanelVectors = 4;
// Rows of a register tile of a whole panel: R x 4 accumulators, 4 weights and a broadcast fit the
// registers.
constexpr int kTileRows = kManyRegisters ? 6 : 3;
// Of the last tile of a chunk. With few registers 4 and 5 rows take a panel by halves: an FMA a
// cycle and unit needs 8 sums at least, and 2 rows have just those. GFLOP/s of 101, in one run (Zen
// 3, fp32, W in L2): 3 rows 97, 4 rows 92 (2 + 2: 73), 5 rows 93 (3 + 2: 88).
constexpr int kLastTileRows = kManyRegisters ? kTileRows : 5;
// A chunk of rows keeps its accumulators in L1 (48 x 4 x 64 B = 12 KB) while tiles of it take one
// slice of K after the other.
constexpr int kChunkRows = 48;
// Wide vectors take a panel from L2 as fast as they use it (80 KB a slice): 2 % faster than with
// 96, as fast as without slices (Zen 4; on Zen 5 within 4 %). Vectors of 32 bytes keep it in L1:
// W's gradient was 6 % slower with 320 (AVX2 on Zen 4).
constexpr int64_t kSliceK = LSTM_EXT_VECTOR_BYTES == 64 ? 320 : 96;

// acc[p][r][v] (+)= sum over k in [k0, k1) of a[r][k * a_step] * w[p][k][v], for NP panels at once,
// NV vectors of each, which has kWidth.
template <class E, int R, int NV, int NP, int kWidth = NV>
__attribute__((noinline)) void tile(const E* const* a, int64_t k0, int64_t k1, const E* w,
                                    int64_t panel_stride, Acc<E>* acc, int64_t acc_stride,
                                    int64_t a_step) {
  using A = Acc<E>;
  constexpr int L = Lanes<A>::kCount;
  Vec<A> sum[NP][R][NV];
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        sum[p][r][v] =
            k0 ? load_full<A>(acc + p * acc_stride + (r * kWidth + v) * L) : broadcast<A>(A(0));
      }
    }
  }
  const E* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = a[r];
  w += k0 * kWidth * L;
  for (int64_t k = k0 * a_step; k < k1 * a_step; k += a_step, w += kWidth * L) {
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p) {
      Vec<A> weight[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        weight[v] = load_elements<E>(w + p * panel_stride + v * L);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> x = broadcast_element<E>(row[r] + k);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          sum[p][r][v] = multiply_add<E>(sum[p][r][v], x, weight[v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < NP; ++p) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        store_full<A>(acc + p * acc_stride + (r * kWidth + v) * L, sum[p][r][v]);
      }
    }
  }
}

template <class E>
using TileFn = void (*)(const E* const*, int64_t, int64_t, const E*, int64_t, Acc<E>*, int64_t,
                        int64_t);

// The same in two halves, which are too many sums for the registers at once.
template <class E, int R, int NV>
void halves(const E* const* a, int64_t k0, int64_t k1, const E* w, int64_t, Acc<E>* acc, int64_t,
            int64_t a_step) {
  constexpr int low = NV / 2, high = NV - low, L = Lanes<Acc<E>>::kCount;
  tile<E, R, low, 1, NV>(a, k0, k1, w, 0, acc, 0, a_step);
  tile<E, R, high, 1, NV>(a, k0, k1, w + low * L, 0, acc + low * L, 0, a_step);
}

template <class E, int R, int NV>
constexpr TileFn<E> tile_or_halves() {
  if constexpr (kManyRegisters || R * NV <= kTileRows * kPanelVectors) {
    return tile<E, R, NV, 1>;
  } else {
    return halves<E, R, NV>;
  }
}

template <class E, int NV>
TileFn<E> tile_of_rows(int rows) {
  static_assert(kLastTileRows == 5 || kLastTileRows == 6, "cases below");
  switch (rows) {
    case 1:
      return tile_or_halves<E, 1, NV>();
    case 2:
      return tile_or_halves<E, 2, NV>();
    case 3:
      return tile_or_halves<E, 3, NV>();
    case 4:
      return tile_or_halves<E, 4, NV>();
    case 5:
      return tile_or_halves<E, 5, NV>();
    default:
      return tile_or_halves<E, kLastTileRows, NV>();
  }
}

template <class E>
TileFn<E> tile_for(int rows, int vectors) {
  switch (vectors) {
    case 1:
      return tile_of_rows<E, 1>(rows);
    case 2:
      return tile_of_rows<E, 2>(rows);
    case 3:
      return tile_of_rows<E, 3>(rows);
    default:
      return tile_of_rows<E, 4>(rows);
  }
}

// Where the i-th of a chunk's tiles ends, which begins at r0. With many registers as even as they
// go: 8 rows are 4 + 4, not 6 + 2; with few, all have kTileRows but the last.
inline int tile_end(int rows, int tiles, int i, int r0) {
  if (kManyRegisters) return rows * (i + 1) / tiles;
  return rows - r0 <= kLastTileRows ? rows : r0 + kTileRows;
}

// acc[p][r][vectors * lanes] = a[r][0..K) * panel p, for `panels` panels of `vectors` vectors that
// lie `panel_stride` elements apart, and `rows` rows (at most kChunkRows). Two panels are taken
// at once for a single row, where one has too few independent sums to hide the FMA's latency.
// Elements of a row of `a` lie a_step apart.
template <class E>
void product(const E* const* a, int rows, int64_t K, const E* w, int vectors, int panels,
             int64_t panel_stride, Acc<E>* acc, int64_t acc_stride, int64_t a_step = 1) {
  constexpr int L = Lanes<Acc<E>>::kCount;
  if (rows == 1 && panels == 2 && vectors == kPanelVectors) {
    return tile<E, 1, kPanelVectors, 2>(a, 0, K, w, panel_stride, acc, acc_stride, a_step);
  }
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t slice = tiles > 1 ? kSliceK : K;  // a single tile gains nothing from slices
  for (int p = 0; p < panels; ++p) {
    for (int64_t k0 = 0; k0 < K; k0 += slice) {
      const int64_t k1 = std::min(K, k0 + slice);
      for (int i = 0, r0 = 0, r1; r0 < rows; ++i, r0 = r1) {
        r1 = tile_end(rows, tiles, i, r0);
        tile_for<E>(r1 - r0, vectors)(a + r0, k0, k1, w + p * panel_stride, 0,
                                      acc + p * acc_stride + int64_t(r0) * vectors * L, 0, a_step);
      }
    }
  }
}

// Packs `count` (at most kCount) rows of a row-major matrix, each K numbers long, `stride` apart,
// as vector v of a panel: dst[k * NV * L + v * L + l] = element k of row l; absent lanes become 0.
template <class E, class S>
void pack_rows(const S* src, int64_t stride, int count, int64_t K, E* dst, int64_t panel_width) {
  using A = Acc<E>;
  constexpr int L = Lanes<A>::kCount, depth = Operand<E>::kDepth;
  for (int64_t k = 0; k < K; k += depth * L) {
    Vec<A> block[L];
    for (int l = 0; l < L; ++l) {
      block[l] = l < count ? load_weights_partial<E>(src + l * stride + k, K - k) : Vec<A>{};
    }
    transpose<A>(block);
    const int64_t n = std::min<int64_t>(L, depth_of<E>(K - k));
    for (int64_t j = 0; j < n; ++j) {
      std::memcpy(dst + (k / depth + j) * panel_width, &block[j], sizeof block[j]);
    }
  }
}

// Packs columns [0, count) of a row-major [K, stride] matrix as vector v of a panel.
template <class E, class S>
void pack_columns(const S* src, int64_t stride, int count, int64_t K, E* dst, int64_t panel_width) {
  if constexpr (kPaired<E>) {
    // Two rows of the matrix, a number of each in every pair.
    constexpr int L = Lanes<float>::kCount;
    for (int64_t k = 0; k < K; k += 2) {
      const Vec<float> low = load<float>(src + k * stride, count);
      const Vec<float> high =
          k + 1 < K ? load<float>(src + (k + 1) * stride, count) : broadcast<float>(0);
      typedef uint32_t U __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
      const U pairs = bit_cast<U>(low) >> 16 | bit_cast<U>(high);
      static_assert(sizeof pairs == L * sizeof(E), "a pair a lane");
      std::memcpy(dst + k / 2 * panel_width, &pairs, sizeof pairs);
    }
  } else {
    for (int64_t k = 0; k < K; ++k) {
      store_full<E>(dst + k * panel_width, load<E>(src + k * stride, count));
    }
  }
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
