// Vectors of one instruction set: loads, stores, conversions and the activations.
//
// Included only by kernels_<isa>.cpp, after LSTM_EXT_ISA (a namespace) and LSTM_EXT_VECTOR_BYTES
// are defined. Everything lives in that namespace, so that no function compiled for one
// instruction set can be merged by the linker with its twin compiled for another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// In front of an ARM instruction that the compiler may not have been told of: what the assembler is
// to accept from there on, which must hold all that the compiler was told of too.
#if defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define LSTM_EXT_ARM_LATER ""
#else
#define LSTM_EXT_ARM_LATER ".arch armv8.6-a+sve\n\t"
#endif

#include "../cell.h"
#include "../half.h"
#include "transpose.h"

namespace lstm_ext {
namespace LSTM_EXT_ISA {

// 32 vector registers, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

// GCC's and Clang's vector extension: the operators work lane by lane, a scalar operand is
// broadcast, and a * b + c becomes one FMA where the instruction set has it.
template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = LSTM_EXT_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES / 2)));
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kExponentBias = 127;
  static constexpr float kExpMin = -87.0f;           // exp of it is still a normal number
  static constexpr float kExpMax = 89.0f;            // exp of it is infinity
  static constexpr float kRound = 12582912.0f;       // 1.5 * 2^23
  static constexpr float kLn2High = 0.693359375f;    // ln 2 in two parts (Cody & Waite), so that
  static constexpr float kLn2Low = -2.12194440e-4f;  // x - n ln 2 keeps all its bits
  // (e^r - 1 - r) / r^2 on |r| <= ln2 / 2, highest power first (Cephes expf).
  static constexpr float kExpm1[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                     4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct Lanes<double> {
  static constexpr int kCount = LSTM_EXT_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kExpMin = -708.0;
  static constexpr double kExpMax = 710.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  // Taylor: 1/n! for n = 14 .. 2; the first term left out is below 1e-18 on |r| <= ln2 / 2.
  static constexpr double kExpm1[] = {
      1.0 / 87178291200.0, 1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
      1.0 / 362880.0,      1.0 / 40320.0,      1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,
      1.0 / 24.0,          1.0 / 6.0,          1.0 / 2.0};
};

template <class A>
using Vec = typename Lanes<A>::V;

template <class A>
LSTM_EXT_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};  // x - 0 is x, -0.0 included, which x + 0 is not
}

template <class To, class From>
LSTM_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// v, loaded once: gcc would make the load a part of each instruction that uses it, and loads are
// then what a loop waits for.
template <class V>
LSTM_EXT_INLINE V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  asm("" : "+x"(v));
#endif
  return v;
}

// The larger, the smaller of limit and x; x if it is a NaN. Compilers do not find the instruction.
template <class A>
LSTM_EXT_INLINE Vec<A> at_least(A limit, Vec<A> x) {
#if defined(__AVX512F__) && LSTM_EXT_VECTOR_BYTES == 64
  // Masked, for gcc 12's -Wmaybe-uninitialized, which the others trip in its own header.
  if constexpr (sizeof(A) == 4) {
    return (Vec<A>)_mm512_maskz_max_ps(0xffff, (__m512)broadcast<A>(limit), (__m512)x);
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(A) == 4) return vmaxq_f32(broadcast<A>(limit), x);
  if constexpr (sizeof(A) == 8) return vmaxq_f64(broadcast<A>(limit), x);
#endif
  return x < limit ? broadcast<A>(limit) : x;
}

template <class A>
LSTM_EXT_INLINE Vec<A> at_most(A limit, Vec<A> x) {
#if defined(__AVX512F__) && LSTM_EXT_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    return (Vec<A>)_mm512_maskz_min_ps(0xffff, (__m512)broadcast<A>(limit), (__m512)x);
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(A) == 4) return vminq_f32(broadcast<A>(limit), x);
  if constexpr (sizeof(A) == 8) return vminq_f64(broadcast<A>(limit), x);
#endif
  return x > limit ? broadcast<A>(limit) : x;
}

// Activations of a vector of hidden units: the Math policy of cell.h.
template <class A>
struct Math {
  using L = Lanes<A>;
  using V = typename L::V;
  using Bits = typename L::Bits;

  // x = n ln 2 + r; returns e^r - 1 and, in scale, 2^(n - kLess). x is clamped to where 2^n is a
  // normal number, or the next power above; a NaN passes the clamp (both comparisons are false)
  // and reaches r.
  template <int kLess>
  static LSTM_EXT_INLINE V expm1_reduced(V x, V& scale) {
    x = at_most<A>(L::kExpMax, at_least<A>(L::kExpMin, x));
    const V shifted = x * A(1.44269504088896340736) + L::kRound;  // n in the low mantissa bits
    const V n = shifted - L::kRound;
    const V r = (x - n * L::kLn2High) - n * L::kLn2Low;
    V p = broadcast<A>(L::kExpm1[0]);
    for (unsigned j = 1; j < sizeof L::kExpm1 / sizeof L::kExpm1[0]; ++j) p = p * r + L::kExpm1[j];
    const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<Bits>(broadcast<A>(L::kRound));
    scale = bit_cast<V>((exponent + (L::kExponentBias - kLess)) << L::kMantissaBits);
    return p * r * r + r;
  }

  // By half of e^-x, which is a number where e^-x is infinity: a closed gate is 0.
  static LSTM_EXT_INLINE V sigmoid(V x) {
    V scale;
    const V em1 = expm1_reduced<1>(-x, scale);
    return 1 / (1 + 2 * (scale * em1 + scale));
  }

  // tanh |x| = -m / (2 + m) with m = e^(-2|x|) - 1: no overflow, and near zero the relative
  // error stays that of expm1.
  static LSTM_EXT_INLINE V tanh(V x) {
    const Bits sign_bit = bit_cast<Bits>(broadcast<A>(A(-0.0)));
    const Bits sign = bit_cast<Bits>(x) & sign_bit;
    const V magnitude = bit_cast<V>(bit_cast<Bits>(x) & ~sign_bit);
    V scale;
    const V em1 = expm1_reduced<0>(magnitude * A(-2), scale);
    const V m = scale * em1 + (scale - 1);
    const V t = -m / (2 + m);
    return bit_cast<V>(bit_cast<Bits>(t) | sign);
  }
};

// load / store: `n` hidden units of storage type S as a vector of A; lanes from n on read as 0
// and are not written.
template <class A>
LSTM_EXT_INLINE Vec<A> load_full(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
LSTM_EXT_INLINE void store_full(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class A>
LSTM_EXT_INLINE Vec<float> load_full(const bfloat16* p) {
  Lanes<float>::Half h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec<float>>(__builtin_convertvector(h, Lanes<float>::Bits) << 16);
}

template <class A>
LSTM_EXT_INLINE void store_full(bfloat16* p, Vec<float> v) {
  typedef uint32_t U __attribute__((vector_size(LSTM_EXT_VECTOR_BYTES)));
  const U bits = bit_cast<U>(v);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const U nan = (bits >> 16) | 0x40u;                              // stays a NaN, made quiet
  const U out = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  const Lanes<float>::Half h = __builtin_convertvector(out, Lanes<float>::Half);
  std::memcpy(p, &h, sizeof h);
}

template <class A>
LSTM_EXT_INLINE Vec<float> load_full(const float16* p) {
  Vec<float> v;
#if defined(__AVX512F__) && LSTM_EXT_VECTOR_BYTES == 64
  // The unmasked intrinsics trip gcc 12's -Wmaybe-uninitialized inside its own header.
  v = (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && LSTM_EXT_VECTOR_BYTES == 32
  v = (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  v = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  for (int l = 0; l < Lanes<float>::kCount; ++l) v[l] = to_float(p[l]);
#endif
  return v;
}

template <class A>
LSTM_EXT_INLINE void store_full(float16* p, Vec<float> v) {
#if defined(__AVX512F__) && LSTM_EXT_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && LSTM_EXT_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  for (int l = 0; l < Lanes<float>::kCount; ++l) p[l] = to_float16(v[l]);
#endif
}

#if defined(__AVX2__) && LSTM_EXT_VECTOR_BYTES == 32
LSTM_EXT_INLINE __m256i first_of_eight(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first n numbers of a vector's, fewer than all, between p and `whole`, which has room for all;
// the others are not touched or made zero. By masks: a memcpy of n bytes, and a load that waits for
// it, take about as long as a cell. T 30, B 32 takes 33 % less time at H 8, 13 at H 50, 5 at H 100
// (inference, fp32, Zen 4; on AVX2 34 at H 4, 17 at H 20, 8 at H 50).
template <class S>
LSTM_EXT_INLINE void load_first(const S* p, int64_t n, S* whole) {
#if defined(__AVX512BW__) && LSTM_EXT_VECTOR_BYTES == 64
  const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (sizeof(S) == 2) {
    _mm256_storeu_si256((__m256i*)whole, _mm256_maskz_loadu_epi16(__mmask16(mask), p));
  } else if constexpr (sizeof(S) == 4) {
    _mm512_storeu_ps(whole, _mm512_maskz_loadu_ps(__mmask16(mask), p));
  } else {
    _mm512_storeu_pd(whole, _mm512_maskz_loadu_pd(__mmask8(mask), p));
  }
#else
#if defined(__AVX2__) && LSTM_EXT_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<S, float>) {
    return _mm256_storeu_ps(whole, _mm256_maskload_ps(p, first_of_eight(n)));
  }
#endif
  std::memcpy(whole, p, n * sizeof(S));
#endif
}

template <class S>
LSTM_EXT_INLINE void store_first(S* p, int64_t n, const S* whole) {
#if defined(__AVX512BW__) && LSTM_EXT_VECTOR_BYTES == 64
  const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (sizeof(S) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), _mm256_loadu_si256((const __m256i*)whole));
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(mask), _mm512_loadu_ps(whole));
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(mask), _mm512_loadu_pd(whole));
  }
#else
#if defined(__AVX2__) && LSTM_EXT_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<S, float>) {
    return _mm256_maskstore_ps(p, first_of_eight(n), _mm256_loadu_ps(whole));
  }
#endif
  std::memcpy(p, whole, n * sizeof(S));
#endif
}

template <class A, class S>
LSTM_EXT_INLINE Vec<A> load(const S* p, int64_t n) {
  if (n >= Lanes<A>::kCount) return load_full<A>(p);
  S whole[Lanes<A>::kCount] = {};
  load_first(p, n, whole);
  return load_full<A>(whole);
}

// n flags as 0 or 1, the lanes from n on as 0.
template <class A>
LSTM_EXT_INLINE Vec<A> load_flags(const uint8_t* p, int64_t n) {
  typedef uint8_t Bytes __attribute__((vector_size(Lanes<A>::kCount)));
  Bytes bytes{};
  if (n >= Lanes<A>::kCount) {
    std::memcpy(&bytes, p, sizeof bytes);
  } else {
    std::memcpy(&bytes, p, n);
  }
  return __builtin_convertvector(bytes, Vec<A>);
}

template <class A, class S>
LSTM_EXT_INLINE void store(S* p, Vec<A> v, int64_t n) {
  if (n >= Lanes<A>::kCount) return store_full<A>(p, v);
  S whole[Lanes<A>::kCount];
  store_full<A>(whole, v);
  store_first(p, n, whole);
}

// v as it reads back after a round trip through S: what the next step must see.
template <class A, class S>
LSTM_EXT_INLINE Vec<A> rounded_to(Vec<A> v) {
  S part[Lanes<A>::kCount];
  store_full<A>(part, v);
  return load_full<A>(part);
}

// In-register transpose of a kCount x kCount block, log2(kCount) exchanges between rows that lie
// D apart.
template <class V, int D, int... Lane>
LSTM_EXT_INLINE void exchange(V& low, V& high, std::integer_sequence<int, Lane...>) {
  constexpr int count = sizeof...(Lane);
  const V a = low, b = high;
  low = shuffle<((Lane & D) ? count + Lane - D : Lane)...>(a, b);
  high = shuffle<((Lane & D) ? count + Lane : Lane + D)...>(a, b);
}

template <class A, int D = 1>
LSTM_EXT_INLINE void transpose(Vec<A>* rows) {
  constexpr int count = Lanes<A>::kCount;
  if constexpr (D < count) {
    for (int r = 0; r < count; ++r) {
      if (!(r & D)) {
        exchange<Vec<A>, D>(rows[r], rows[r + D], std::make_integer_sequence<int, count>{});
      }
    }
    transpose<A, 2 * D>(rows);
  }
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
