// CUDA's device functions that need no PTX: barriers, shuffles, atomics, loads with cache hints.
#pragma once

#include <math.h>

#include <type_traits>

#include "emu_core.h"

inline void __syncthreads() { emu::syncthreads(); }
inline void __syncwarp(unsigned mask = ~0u) { emu::syncwarp(mask); }
inline void __nanosleep(unsigned) { emu::spin(); }

// A source outside the group of `width` lanes: the lane's own value.
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const int lane = emu::cur->lane;
  return emu::exchange(mask, v, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  const int lane = emu::cur->lane, source = lane ^ bits;
  // As the hardware has it: lanes of an earlier group can be read, those of a later one not.
  return emu::exchange(mask, v, source < (lane | (width - 1)) + 1 ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int delta, int width = 32) {
  const int lane = emu::cur->lane, source = lane + delta;
  return emu::exchange(mask, v, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int delta, int width = 32) {
  const int lane = emu::cur->lane, source = lane - delta;
  return emu::exchange(mask, v, source >= (lane & ~(width - 1)) ? source : lane);
}

// TSan knows no fences: what is published by a fence and a plain store is a race to it. Use
// emu::global_arrive and its like.
inline void __threadfence() {
#if !defined(EMU_TSAN)
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

template <class T>
T atomicAdd(T* p, T v) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  } else {
    T old, sum;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do {
      sum = old + v;
    } while (!__atomic_compare_exchange(p, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
  }
}

template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

template <class A, class B>
requires(std::is_arithmetic_v<A>&& std::is_arithmetic_v<B>) constexpr auto min(A a, B b)
    -> std::common_type_t<A, B> {
  return b < a ? b : a;
}
template <class A, class B>
requires(std::is_arithmetic_v<A>&& std::is_arithmetic_v<B>) constexpr auto max(A a, B b)
    -> std::common_type_t<A, B> {
  return a < b ? b : a;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned x) {
  float value;
  memcpy(&value, &x, 4);
  return value;
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
