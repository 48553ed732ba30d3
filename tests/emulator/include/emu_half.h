// Arithmetic on pairs of 16-bit floats, for cuda_bf16.h and cuda_fp16.h: computed in float,
// rounded once.
#pragma once

#define EMU_PAIR_OPERATIONS(Pair, Element)                                       \
  inline Pair __hadd2(Pair a, Pair b) {                                          \
    return {Element(float(a.x) + float(b.x)), Element(float(a.y) + float(b.y))}; \
  }                                                                              \
  inline Pair __hmul2(Pair a, Pair b) {                                          \
    return {Element(float(a.x) * float(b.x)), Element(float(a.y) * float(b.y))}; \
  }                                                                              \
  inline Pair __hfma2(Pair a, Pair b, Pair c) {                                  \
    return {Element(float(a.x) * float(b.x) + float(c.x)),                       \
            Element(float(a.y) * float(b.y) + float(c.y))};                      \
  }                                                                              \
  inline float __low2float(Pair p) { return float(p.x); }                        \
  inline float __high2float(Pair p) { return float(p.y); }
