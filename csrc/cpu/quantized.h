// Products of rows in 16 or 8 bits with weights in 8.
//
// A row of activations x becomes x ~ s q, s = max |x| / m, q whole numbers from -m to m, m 32639 or
// 127; the weights are w = s_w (u - 128), u in 0 .. 255 and s_w of each row of weights. So x . w ~
// s s_w sum q (u - 128), a sum of whole numbers, which is exact: its order, the threads and the
// rows beside it do not matter. 16 bits leave the rounding of the weights as the only error to
// speak of. A row takes twice the instructions that 8 take, and as long where the weights come from
// beyond L2: single steps of B 1, H 512 to 2048, 0.94 to 1.03 of the time; several rows take up to
// 1.75 times as long (T 25, B 4, H 1024; Zen 4, two threads).
//
// Weights of G rows that belong together (the gates) lie as [blocks of 16 rows][K / 4][G][16][4],
// whatever the instruction set: quantization.py packs them so; of absent columns q is 0.
#pragma once

#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "sequence.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

constexpr int64_t kBlockRows = QuantizedWeights::kRows, kDepth8 = QuantizedWeights::kDepth;
constexpr float kMost16 = 32639;  // 127 * 256 + 127: both bytes of q, rounded, fit theirs
constexpr float kMost8 = 127;
constexpr int kZeroPoint = 128;

// Whether there may be an instruction that multiplies bytes, four to a sum: VPDPBUSD (AVX512_VNNI)
// or SDOT. kBytes below: it is used.
#if defined(__AVX512BW__) || defined(LSTM_EXT_WITH_NEON_DOT)
constexpr bool kByteProducts = true;
#else
constexpr bool kByteProducts = false;
#endif

inline int64_t blocks_of_16(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
inline int64_t depth_of_8(int64_t K) { return (K + kDepth8 - 1) / kDepth8; }

// q of a row. An instruction that multiplies bytes takes it as q = 256 high + low, both signed, or
// in 8 bits as high alone. Others take words.
struct WholeRow {
  float scale;  // 0: a row of zeros, or of what is below 1e-30; NaN: something in it is not finite
  int16_t* words;
  int8_t *high, *low;
  int32_t sum_high, sum_low;

  // The scale of sums with weights of these scales; finite, so that no sum of 0 becomes NaN.
  LSTM_EXT_INLINE Vec<float> times(Vec<float> scales) const {
    const Vec<float> product = scale * scales;
    const Vec<float> most = broadcast<float>(std::numeric_limits<float>::max());
    return product > most ? most : product;
  }

  // Room for rows of K numbers, and for what a vector writes past them. bytes: high and low, else
  // words.
  static WholeRow* take(Arena& arena, int64_t count, int64_t K, bool bytes) {
    WholeRow* rows = arena.take<WholeRow>(count);
    const int64_t room = K + 64;
    for (int64_t r = 0; r < count; ++r) {
      WholeRow row{};
      row.words = bytes ? nullptr : arena.take<int16_t>(room);
      row.high = bytes ? arena.take<int8_t>(room) : nullptr;
      row.low = bytes ? arena.take<int8_t>(room) : nullptr;
      if (rows) rows[r] = row;
    }
    return rows;
  }

  // kWords: in 16 bits.
  template <bool kBytes, bool kWords>
  void set(const float* x, int64_t K) {
    using Bits = Lanes<float>::Bits;
    constexpr int L = Lanes<float>::kCount;
    constexpr float limit = kWords ? kMost16 : kMost8;
    Bits most{};
    for (int64_t k = 0; k < K; k += L) {
      const Bits magnitude = bit_cast<Bits>(load<float>(x + k, K - k)) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    int32_t largest = 0;
    for (int l = 0; l < L; ++l) largest = std::max<int32_t>(largest, most[l]);
    float peak;
    std::memcpy(&peak, &largest, sizeof peak);
    const bool finite = largest < 0x7f800000, some = finite && peak >= 1e-30f;
    scale = !finite ? std::numeric_limits<float>::quiet_NaN() : some ? peak / limit : 0;
    const Vec<float> factor = broadcast<float>(some ? limit / peak : 0);
    const Bits zero = bit_cast<Bits>(broadcast<float>(Lanes<float>::kRound));
    Bits highs{}, lows{};
    for (int64_t k = 0; k < (K + 3) / 4 * 4; k += L) {
      Bits whole{};
      if (some) {  // else 0 times what is there may be NaN
        const Vec<float> v = k < K ? load<float>(x + k, K - k) : Vec<float>{};
        whole = bit_cast<Bits>(v * factor + Lanes<float>::kRound) - zero;  // to nearest
      }
      if constexpr (kBytes) {
        typedef int8_t Bytes __attribute__((vector_size(L)));
        const Bits upper = kWords ? (whole + 128) >> 8 : whole, lower = whole - (upper << 8);
        highs += upper;
        lows += lower;
        const Bytes bytes[2] = {__builtin_convertvector(upper, Bytes),
                                __builtin_convertvector(lower, Bytes)};
        std::memcpy(high + k, &bytes[0], L);
        std::memcpy(low + k, &bytes[1], L);
      } else {
        typedef int16_t Words __attribute__((vector_size(2 * L)));
        const Words numbers = __builtin_convertvector(whole, Words);
        std::memcpy(words + k, &numbers, sizeof numbers);
      }
    }
    sum_high = sum_low = 0;
    for (int l = 0; l < L; ++l) {
      sum_high += highs[l];
      sum_low += lows[l];
    }
  }
};

// out as of product_of_16.
template <bool kWords, int R, int G>
void byte_product(const WholeRow* rows, const uint8_t* w, int64_t depth, const Vec<float>* scales,
                  float* out, int64_t part_stride);

// add_bytes: sum + w x, four products a lane, by an instruction of a processor that is known to
// have it, and w as it takes them: of VPDPBUSD u itself, so that 128 times the sum of x is to be
// taken off; of SDOT, whose factors are both signed, u - 128. From the intrinsic of the former gcc
// 12 makes a copy, and a spill, of each sum at every step; that of the latter is for functions
// compiled for it.
#if defined(__AVX512BW__)
constexpr int kBytesZeroPoint = kZeroPoint;
static inline void add_bytes(Lanes<float>::Bits& sum, Lanes<float>::Bits w, Lanes<float>::Bits x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}
static inline Lanes<float>::Bits as_taken(Lanes<float>::Bits u) { return u; }
#elif defined(LSTM_EXT_WITH_NEON_DOT)
constexpr int kBytesZeroPoint = 0;
static inline void add_bytes(Lanes<float>::Bits& sum, Lanes<float>::Bits w, Lanes<float>::Bits x) {
  asm(LSTM_EXT_ARM_LATER "sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x));
}
static inline Lanes<float>::Bits as_taken(Lanes<float>::Bits u) { return u ^ int32_t(0x80808080); }
#endif

#if defined(__AVX512BW__) || defined(LSTM_EXT_WITH_NEON_DOT)

template <bool kWords, int R, int G>
__attribute__((noinline)) void byte_product(const WholeRow* rows, const uint8_t* w, int64_t depth,
                                            const Vec<float>* scales, float* out,
                                            int64_t part_stride) {
  using Bits = Lanes<float>::Bits;
  constexpr int L = Lanes<float>::kCount, parts = kBlockRows / L;
  constexpr int N = std::max(1, G / parts);  // gates whose sums the registers hold
  const auto four = [](const int8_t* numbers) {
    int32_t bits;
    std::memcpy(&bits, numbers, sizeof bits);
    return Bits{} + bits;
  };
  for (int first = 0; first < G; first += N) {
    Bits high[R][N][parts], low[R][N][parts];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < N * parts; ++i) {
        high[r][i / parts][i % parts] = Bits{} - kBytesZeroPoint * rows[r].sum_high;
        if (kWords) low[r][i / parts][i % parts] = Bits{} - kBytesZeroPoint * rows[r].sum_low;
      }
    }
    const uint8_t* weights = w + first * kBlockRows * kDepth8;
    for (int64_t k = 0; k < depth; ++k, weights += G * kBlockRows * kDepth8) {
      Bits weight[N][parts];
      static_assert(sizeof weight == N * kBlockRows * kDepth8, "4 numbers of 16 rows a gate");
#pragma GCC unroll 4
      for (int i = 0; i < N * parts; ++i) {
        Bits& v = weight[i / parts][i % parts];
        std::memcpy(&v, weights + i * sizeof v, sizeof v);
        v = as_taken(v);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Bits upper = four(rows[r].high + k * kDepth8);
#pragma GCC unroll 4
        for (int i = 0; i < N * parts; ++i) {
          add_bytes(high[r][i / parts][i % parts], weight[i / parts][i % parts], upper);
        }
        if constexpr (kWords) {
          const Bits lower = four(rows[r].low + k * kDepth8);
#pragma GCC unroll 4
          for (int i = 0; i < N * parts; ++i) {
            add_bytes(low[r][i / parts][i % parts], weight[i / parts][i % parts], lower);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < N * parts; ++i) {
        const int g = first + i / parts, p = i % parts;
        Vec<float> sum = __builtin_convertvector(high[r][i / parts][p], Vec<float>);
        if (kWords) {
          sum = sum * 256.0f + __builtin_convertvector(low[r][i / parts][p], Vec<float>);
        }
        store_full<float>(out + p * part_stride + (r * G + g) * L,
                          sum * rows[r].times(scales[g * parts + p]));
      }
    }
  }
}

#endif

// Of what is summed in 32 bits: 256 times two products, of 32639 and 128 at most, just fit.
constexpr int64_t kStretch = 256;

// What multiplies pairs of 16 bits, a vector of them; rows at once, and of those rows how many
// gates' sums the registers hold.
#if defined(__AVX512BW__)
typedef __m512i Words;
constexpr int kMostRows = 3;
constexpr int gates_at_once(int) { return 4; }
static inline Words four_words(int64_t x) { return _mm512_set1_epi64(x); }
static inline Words weights_at(const uint8_t* w) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)w);
  return _mm512_sub_epi16(_mm512_cvtepu8_epi16(bytes), _mm512_set1_epi16(kZeroPoint));
}
static inline Words add_pairs(Words sum, Words a, Words b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
#elif defined(__AVX2__)
typedef __m256i Words;
constexpr int kMostRows = 2;
constexpr int gates_at_once(int rows) { return 2 / rows; }
static inline Words four_words(int64_t x) { return _mm256_set1_epi64x(x); }
static inline Words weights_at(const uint8_t* w) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)w);
  return _mm256_sub_epi16(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi16(kZeroPoint));
}
static inline Words add_pairs(Words sum, Words a, Words b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
#elif defined(__SSE2__)
typedef __m128i Words;
constexpr int kMostRows = 1;
constexpr int gates_at_once(int) { return 1; }
static inline Words four_words(int64_t x) { return _mm_set1_epi64x(x); }
static inline Words weights_at(const uint8_t* w) {
  const __m128i words = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)w), _mm_setzero_si128());
  return _mm_sub_epi16(words, _mm_set1_epi16(kZeroPoint));
}
static inline Words add_pairs(Words sum, Words a, Words b) {
  return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
}
#elif defined(__aarch64__)
typedef int32x4_t Words;
constexpr int kMostRows = 3;
constexpr int gates_at_once(int) { return 1; }
static inline Words four_words(int64_t x) { return vreinterpretq_s32_s64(vdupq_n_s64(x)); }
static inline Words weights_at(const uint8_t* w) {
  const int16x8_t words = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(w)));
  return vreinterpretq_s32_s16(vsubq_s16(words, vdupq_n_s16(kZeroPoint)));
}
static inline Words add_pairs(Words sum, Words a, Words b) {
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
  return vaddq_s32(sum, vpaddq_s32(low, high));
}
#else
struct Words {
  int32_t lane[2];  // two sums, or four numbers of 16 bits
};
constexpr int kMostRows = 1;
constexpr int gates_at_once(int) { return 1; }
static inline Words four_words(int64_t x) { return bit_cast<Words>(x); }
static inline Words weights_at(const uint8_t* w) {
  int16_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = int16_t(w[i] - kZeroPoint);
  Words all;
  std::memcpy(&all, words, sizeof all);
  return all;
}
static inline Words add_pairs(Words sum, Words a, Words b) {
  int16_t x[4], y[4];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 2; ++i) sum.lane[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}
#endif

// Adds sum q (u - 128) over [k0, k1) for R rows and a block's weights of N gates, in two parts
// each.
template <int R, int N>
void add_products(const WholeRow* rows, const uint8_t* w, int64_t stride, int64_t k0, int64_t k1,
                  float (*sums)[N][2 * kBlockRows]) {
  constexpr int numbers = sizeof(Words) / 2, vectors = kBlockRows * kDepth8 / numbers;
  Words sum[R][N][vectors] = {};
  for (int64_t k = k0; k < k1; ++k) {
    Words x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int64_t four;
      std::memcpy(&four, rows[r].words + k * kDepth8, sizeof four);
      x[r] = four_words(four);
    }
#pragma GCC unroll 4
    for (int g = 0; g < N; ++g) {
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) {
        const Words weight = weights_at(w + k * stride + g * kBlockRows * kDepth8 + i * numbers);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][g][i] = add_pairs(sum[r][g][i], weight, x[r]);
      }
    }
  }
  int32_t whole[R][N][2 * kBlockRows];
  static_assert(sizeof sum == sizeof whole, "all of them");
  std::memcpy(whole, sum, sizeof whole);
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < N; ++g) {
      for (int l = 0; l < 2 * kBlockRows; ++l) sums[r][g][l] += float(whole[r][g][l]);
    }
  }
}

template <int R, int G>
__attribute__((noinline)) void word_product(const WholeRow* rows, const uint8_t* w, int64_t depth,
                                            const Vec<float>* scales, float* out,
                                            int64_t part_stride) {
  constexpr int L = Lanes<float>::kCount, parts = kBlockRows / L;
  constexpr int N = std::min(G, gates_at_once(R));
  const int64_t bytes = kBlockRows * kDepth8;
  for (int first = 0; first < G; first += N) {
    float sums[R][N][2 * kBlockRows] = {};
    for (int64_t k = 0; k < depth; k += kStretch) {
      add_products<R, N>(rows, w + first * bytes, G * bytes, k, std::min(depth, k + kStretch),
                         sums);
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < N; ++i) {
        const int g = first + i;
        float pairs[kBlockRows];
        for (int l = 0; l < kBlockRows; ++l) pairs[l] = sums[r][i][2 * l] + sums[r][i][2 * l + 1];
        for (int p = 0; p < parts; ++p) {
          const Vec<float> sum = load_full<float>(pairs + p * L);
          store_full<float>(out + p * part_stride + (r * G + g) * L,
                            sum * rows[r].times(scales[g * parts + p]));
        }
      }
    }
  }
}

// Rows at once: of bytes, 2 x 3 x 4 sums, or 6 x 4, 4 weights and a broadcast fit 32 registers.
template <bool kBytes, bool kWords>
constexpr int kRowsAtOnce = kBytes ? (kWords ? 3 : 6) : kMostRows;

// out[p * part_stride + (r * G + g) * lanes + l] for a block of 16 rows of weights and R rows: the
// lanes of a vector are a part of the block. scales [G][parts].
template <bool kBytes, bool kWords, int R, int G>
void product_of_16(const WholeRow* rows, const uint8_t* w, int64_t depth, const Vec<float>* scales,
                   float* out, int64_t part_stride) {
  if constexpr (kBytes) {
    byte_product<kWords, R, G>(rows, w, depth, scales, out, part_stride);
  } else {
    word_product<R, G>(rows, w, depth, scales, out, part_stride);
  }
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
