// The two 16-bit storage types: bits only, converted where they are loaded and stored.
#pragma once

#include <cstdint>
#include <cstring>

namespace lstm_ext {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// IEEE half to single, for machines without an instruction for it.
static inline float to_float(float16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16;
  const uint32_t magnitude = h.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000u | (magnitude << 13);  // infinity, NaN with its payload
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + 0x38000000u;  // the exponent counts from -127, not from -15
  } else {
    // Subnormal, a multiple of 2^-24, the last bit of 0.5's mantissa. No float on the way is
    // subnormal: a processor may take those for 0.
    bits = magnitude | 0x3f000000u;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value -= 0.5f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// To nearest, ties to even. Not of numbers too large for a bfloat16.
static inline float rounded_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return x;  // NaN
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Single to IEEE half, to nearest, ties to even.
static inline float16 to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint16_t magnitude;
  if (bits > 0x7f800000) {
    magnitude = 0x7e00 | uint16_t((bits >> 13) & 0x3ff);  // NaN, made quiet
  } else if (bits >= 0x477ff000) {
    magnitude = 0x7c00;  // 65520 and more round to infinity
  } else if (bits >= 0x38800000) {
    magnitude = uint16_t((bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13);
  } else {
    // Subnormal: adding 0.5 puts the unit of a half subnormal (2^-24) in the last mantissa bit.
    float value, shifted;
    std::memcpy(&value, &bits, sizeof value);
    shifted = value + 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    magnitude = uint16_t(bits - 0x3f000000);
  }
  float16 out;
  out.bits = uint16_t(sign | magnitude);
  return out;
}

}  // namespace lstm_ext
