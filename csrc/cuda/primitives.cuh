// Every device instruction that the kernels use beyond plain CUDA C++, each with a twin for the
// CPU (LSTM_EXT_EMULATED: the same kernels compiled by a C++ compiler for the tests). Kernels use
// only these, so that what the tests run is what the device runs but for this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
#error "the kernels need compute capability 7.5 or more"
#endif

#define LSTM_EXT_DEVICE __device__ __forceinline__

#ifndef LSTM_EXT_EMULATED
// Dynamic shared memory of the block, 128-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define DYNAMIC_SHARED(name) unsigned char* const name = emu::cur->b->smem
#endif

namespace lstm_ext {

// ---- conversions --------------------------------------------------------------------------------

template <class T>
LSTM_EXT_DEVICE T from_acc(float x);
template <>
LSTM_EXT_DEVICE float from_acc<float>(float x) {
  return x;
}
template <>
LSTM_EXT_DEVICE __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
LSTM_EXT_DEVICE __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <class T>
LSTM_EXT_DEVICE T from_acc(double x) {
  return x;  // double only: its acc type is itself
}

LSTM_EXT_DEVICE double to_acc(double x) { return x; }
LSTM_EXT_DEVICE float to_acc(float x) { return x; }
LSTM_EXT_DEVICE float to_acc(__half x) { return __half2float(x); }
LSTM_EXT_DEVICE float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

LSTM_EXT_DEVICE double exact_exp(double x) { return exp(x); }
LSTM_EXT_DEVICE float exact_exp(float x) { return expf(x); }
LSTM_EXT_DEVICE double exact_tanh(double x) { return tanh(x); }
LSTM_EXT_DEVICE float exact_tanh(float x) { return tanhf(x); }

// Two 16-bit floats in a register, lo in the low half.
template <class T>
LSTM_EXT_DEVICE uint32_t pack2(float lo, float hi);
template <>
LSTM_EXT_DEVICE uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
template <>
LSTM_EXT_DEVICE uint32_t pack2<__half>(float lo, float hi) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// For a product on tensor cores, which do not read the low 13 bits: what rounding to TF32 adds, but
// to numbers that are not finite (as CUTLASS's round_half_ulp_truncate does). A NaN that has bits
// only there, which no arithmetic makes, is read as an infinity.
LSTM_EXT_DEVICE uint32_t tf32_operand(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return fabsf(x) < INFINITY ? bits + 0x1000 : bits;
}

#ifndef LSTM_EXT_EMULATED  // ============================ device ==================================

// x, which the compiler then keeps in a register: it would otherwise compute it anew where it is
// used, in the middle of a step.
LSTM_EXT_DEVICE int pinned(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x to 2 ulp. A result below the normal numbers is zero: exp2f() spends three instructions on it,
// and where 1 is added to it, as everywhere here, it makes no difference.
LSTM_EXT_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Rounds to TF32, ties away from zero; the low 13 bits of the result are zero.
LSTM_EXT_DEVICE uint32_t to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return __float_as_uint(x);  // no TF32 here: the plan never asks for it
#endif
}

// ---- tensor cores: d += a b, d 16x8
// --------------------------------------------------------------- With g = lane / 4 and t = lane %
// 4 a lane holds d (row g, columns 2t and 2t + 1), (row g + 8, the same); the fragments of a and b
// are those of the PTX manual.

template <class T>
LSTM_EXT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
LSTM_EXT_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing has half the depth: the two halves of k one after the other
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%8}, "
      "{%0,%1,%2,%3};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%6,%7}, {%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
LSTM_EXT_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_EXT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// ---- memory that other blocks write between steps
// --------------------------------------------------

// 16 bytes from L2: past L1, which does not see other blocks' writes. volatile: never moved out of
// the loop over the steps, nor over the wait before it.
LSTM_EXT_DEVICE uint4 load_shared_by_blocks(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// ---- shared memory

using shared_addr = uint32_t;  // an address in the .shared::cluster window

LSTM_EXT_DEVICE shared_addr shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// cp.async: 4 or 16 bytes of global memory into shared memory, for the thread alone that asks for
// it; 16 from L2, past L1; if they are passing, L2 is to give their place up early. It has all
// but the `pending` newest of its groups after async_wait(). No wait for a register waits for
// them, as it does for other loads; a fence may.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kLoadsAsync = true;
LSTM_EXT_DEVICE void async_load4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
template <bool kPassing>
LSTM_EXT_DEVICE void async_load16(void* to, const void* from) {
  if constexpr (kPassing) {
    uint64_t early;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(early));
    asm volatile(
        "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
        "l"(from), "l"(early)
        : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
  }
}
LSTM_EXT_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
LSTM_EXT_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#else  // Turing has none: no kernel asks there
constexpr bool kLoadsAsync = false;
LSTM_EXT_DEVICE void async_load4(void* to, const void* from);
template <bool kPassing>
LSTM_EXT_DEVICE void async_load16(void* to, const void* from);
LSTM_EXT_DEVICE void async_commit();
template <int pending>
LSTM_EXT_DEVICE void async_wait();
#endif

// ---- a barrier of some blocks of a grid, through a counter in global memory
// ----------------------- Arrive after a __syncthreads(), by one thread; what the block wrote
// before is then visible to every block that has waited (release and acquire at gpu scope,
// cumulative over the block's barrier). The counter only grows.

LSTM_EXT_DEVICE void arrive_at(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
LSTM_EXT_DEVICE void wait_until(const unsigned* counter, unsigned target) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (int(seen - target) < 0);  // the counter may wrap
}

// ---- words of global memory that tell by themselves whether they are there: each is written and
// read in one piece, and ordered with nothing

LSTM_EXT_DEVICE void store_word(unsigned* p, unsigned word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(word) : "memory");
}
// Four of them, each on its own.
LSTM_EXT_DEVICE void store_words(uint4* p, uint4 words) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}
LSTM_EXT_DEVICE uint4 load_words(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
// Between two looks.
LSTM_EXT_DEVICE void poll_again() {}

#else  // =============================== CPU twins ===============================================

LSTM_EXT_DEVICE int pinned(int x) { return x; }
LSTM_EXT_DEVICE float exp2_fast(float x) { return std::exp2(x); }

LSTM_EXT_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x1000) & 0xffffe000u;
}

template <class T>
LSTM_EXT_DEVICE float emulated_half(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> 16 * which);
  T value;
  memcpy(&value, &bits, 2);
  return float(value);
}

// The lanes have put a [16][K] and b [8][K] in the exchange area.
template <int K>
EMU_UNSEEN void emulated_mma(float (&d)[4], const emu::Exchange& area, int g, int t) {
  emu::rendezvous(~0u);
  for (int i = 0; i < 4; ++i) {
    const float* a = area.a + (g + i / 2 * 8) * K;
    const float* b = area.b + (2 * t + i % 2) * K;
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += a[k] * b[k];
    d[i] += sum;
  }
}

// Registers of a: (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8), two
// k's each; of b: (k 2t, column g), (k 2t + 8, column g).
template <class T>
EMU_UNSEEN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& area = emu::exchange_area();
  const int g = emu::cur->lane / 4, t = emu::cur->lane % 4;
  for (int i = 0; i < 4; ++i)
    for (int h = 0; h < 2; ++h)
      area.a[(g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8 + h] = emulated_half<T>(a[i], h);
  for (int i = 0; i < 2; ++i)
    for (int h = 0; h < 2; ++h) area.b[g * 16 + 2 * t + i * 8 + h] = emulated_half<T>(b[i], h);
  emulated_mma<16>(d, area, g, t);
}

// Registers of a: (row g, k t), (row g + 8, k t), (row g, k t + 4), (row g + 8, k t + 4); of b:
// (k t, column g), (k t + 4, column g). The low 13 bits are not looked at.
EMU_UNSEEN inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  auto& area = emu::exchange_area();
  const int g = emu::cur->lane / 4, t = emu::cur->lane % 4;
  auto value = [](uint32_t bits) {
    bits &= 0xffffe000u;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  for (int i = 0; i < 4; ++i) area.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4] = value(a[i]);
  for (int i = 0; i < 2; ++i) area.b[g * 8 + t + i * 4] = value(b[i]);
  emulated_mma<8>(d, area, g, t);
}

LSTM_EXT_DEVICE uint4 load_shared_by_blocks(const void* p) { return *static_cast<const uint4*>(p); }

using shared_addr = uintptr_t;

LSTM_EXT_DEVICE shared_addr shared_address(const void* p) { return shared_addr(p); }

constexpr bool kLoadsAsync = true;
LSTM_EXT_DEVICE void async_load4(void* to, const void* from) { emu::async_load(to, from, 4); }
template <bool kPassing>
LSTM_EXT_DEVICE void async_load16(void* to, const void* from) {
  emu::async_load(to, from, 16);
}
LSTM_EXT_DEVICE void async_commit() { emu::async_commit(); }
template <int pending>
LSTM_EXT_DEVICE void async_wait() {
  emu::async_wait(pending);
}

LSTM_EXT_DEVICE void store_word(unsigned* p, unsigned word) { emu::global_store_word(p, word); }
LSTM_EXT_DEVICE void store_words(uint4* p, uint4 words) {
  emu::global_store_words(reinterpret_cast<unsigned*>(p), &words.x, 4);
}
LSTM_EXT_DEVICE uint4 load_words(const uint4* p) {
  uint4 v;
  emu::global_load_words(reinterpret_cast<const unsigned*>(p), &v.x, 4);
  return v;
}
LSTM_EXT_DEVICE void poll_again() { emu::global_poll(); }

LSTM_EXT_DEVICE void arrive_at(unsigned* counter) { emu::global_arrive(counter); }
LSTM_EXT_DEVICE void wait_until(const unsigned* counter, unsigned target) {
  emu::global_wait(counter, target);
}

#endif

}  // namespace lstm_ext
