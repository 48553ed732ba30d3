// Conversions are explicit here and implicit in CUDA: what builds here builds there.
#pragma once

#include "cuda_runtime.h"
#include "emu_half.h"

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float f) : value(static_cast<_Float16>(f)) {}
  explicit operator float() const { return static_cast<float>(value); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline float __half2float(__half h) { return float(h); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 p) { return {float(p.x), float(p.y)}; }
EMU_PAIR_OPERATIONS(__half2, __half)
