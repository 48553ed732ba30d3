// Blocks that work together: clusters, distributed shared memory, mbarriers, st.async (Hopper and
// later), and ldmatrix. As primitives.cuh: each instruction with a twin for the CPU.
//
// Whatever peers touch must lie in dynamic shared memory (DYNAMIC_SHARED).
#pragma once

#include "cuda/primitives.cuh"

namespace lstm_ext {

#ifndef LSTM_EXT_EMULATED  // ============================ device ==================================

// ---- ldmatrix: four 8x8 matrices of 16-bit elements. Lane 8 m + i gives the address of row i of
// matrix m, 16-byte aligned; with g = lane / 4 and t = lane % 4, r[m] gets elements (g, 2t) and
// (g, 2t + 1) of it; .trans: (2t, g) and (2t + 1, g).

LSTM_EXT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LSTM_EXT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// ---- clusters. What was written before arrive is seen after wait. Not .aligned: that would ask
// for warps that have come together again, e.g. after `if (tid == 0)`.

LSTM_EXT_DEVICE unsigned cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
LSTM_EXT_DEVICE unsigned cluster_size() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
LSTM_EXT_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
LSTM_EXT_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The same place in a peer's shared memory.
LSTM_EXT_DEVICE shared_addr map_to_rank(shared_addr a, unsigned rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank));
  return r;
}
// As a pointer, for plain loads and stores.
template <class T>
LSTM_EXT_DEVICE T* map_shared_rank(T* p, unsigned rank) {
  uint64_t r;
  asm("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(r);
}

// ---- mbarriers. `count` arrivals complete a phase, once the bytes they expect have come too.

LSTM_EXT_DEVICE void mbarrier_init(uint64_t* m, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(m)), "r"(count)
               : "memory");
}
// After the inits, before the barrier that lets peers see them.
LSTM_EXT_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
LSTM_EXT_DEVICE void mbarrier_arrive(uint64_t* m) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(m)) : "memory");
}
LSTM_EXT_DEVICE void mbarrier_arrive_expect_tx(uint64_t* m, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(m)),
               "r"(bytes)
               : "memory");
}
// At a peer's mbarrier (map_to_rank).
LSTM_EXT_DEVICE void mbarrier_arrive_remote(shared_addr m) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(m) : "memory");
}
// True when the phase of this parity (0 for the first, then by turns) has completed; then what was
// counted there is to be seen. .cta, the default, as is usual for copies from peers too: they write
// to this block's own memory. .cluster would drop the multiprocessor's L1 (CCTL.IVALL) or, as a
// fence after a relaxed wait, hold the warp up until all of its loads have come: half of a step,
// measured on an H100.
LSTM_EXT_DEVICE bool mbarrier_try_wait(uint64_t* m, unsigned parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(m)), "r"(parity)
      : "memory");
  return done;
}
LSTM_EXT_DEVICE void mbarrier_wait(uint64_t* m, unsigned parity) {
  while (!mbarrier_try_wait(m, parity)) {
  }
}

// ---- st.async: 16 bytes into a peer's shared memory. On arrival they count at the mbarrier, which
// lies in the same block's.

LSTM_EXT_DEVICE void st_async(shared_addr dst, uint4 v, shared_addr mbar) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, "
      "[%5];" ::"r"(dst),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mbar)
      : "memory");
}

// ---- cp.async.bulk: `bytes`, a multiple of 16, of this block's shared memory into a peer's (or
// its own); both 16-byte aligned. On arrival they count at the mbarrier, which lies in the same
// block's. Only what was written before copies_see() and a barrier after it is copied, whoever
// wrote it.

LSTM_EXT_DEVICE void copies_see() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
LSTM_EXT_DEVICE void copy_async(shared_addr dst, const void* src, unsigned bytes,
                                shared_addr mbar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(dst),
      "r"(shared_address(src)), "r"(bytes), "r"(mbar)
      : "memory");
}

#endif

#else  // =============================== CPU twins ===============================================

EMU_UNSEEN inline void emulated_ldmatrix(uint32_t (&r)[4], uint4 row, bool trans) {
  auto& rows = emu::exchange_area().lane;
  const int lane = emu::cur->lane, g = lane / 4, t = lane % 4;
  memcpy(rows[lane], &row, 16);
  emu::rendezvous(~0u);
  for (int m = 0; m < 4; ++m) {
    uint16_t v[2];
    for (int e = 0; e < 2; ++e) {
      const unsigned char* element =
          trans ? rows[8 * m + 2 * t + e] + 2 * g : rows[8 * m + g] + 2 * (2 * t + e);
      memcpy(&v[e], element, 2);
    }
    r[m] = v[0] | uint32_t(v[1]) << 16;
  }
}
LSTM_EXT_DEVICE uint4 emulated_row(const void* row) {
  if (uintptr_t(row) % 16) emu::fail("ldmatrix: row address %p is not 16-byte aligned", row);
  return *static_cast<const uint4*>(row);  // TSan sees this read, by the lane that names the row
}
LSTM_EXT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulated_ldmatrix(r, emulated_row(row), false);
}
LSTM_EXT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulated_ldmatrix(r, emulated_row(row), true);
}

LSTM_EXT_DEVICE unsigned cluster_rank() { return emu::cur->b->rank; }
LSTM_EXT_DEVICE unsigned cluster_size() { return unsigned(emu::cur->b->cluster->blocks.size()); }
LSTM_EXT_DEVICE void cluster_arrive() { emu::cluster_arrive(); }
LSTM_EXT_DEVICE void cluster_wait() { emu::cluster_wait(); }
LSTM_EXT_DEVICE shared_addr map_to_rank(shared_addr a, unsigned rank) {
  return shared_addr(emu::map_to_rank(reinterpret_cast<void*>(a), rank));
}
template <class T>
LSTM_EXT_DEVICE T* map_shared_rank(T* p, unsigned rank) {
  return static_cast<T*>(emu::map_to_rank(p, rank));
}

LSTM_EXT_DEVICE void mbarrier_init(uint64_t* m, unsigned count) { emu::mbarrier_init(m, count); }
LSTM_EXT_DEVICE void fence_mbarrier_init() {}
LSTM_EXT_DEVICE void mbarrier_arrive(uint64_t* m) { emu::mbarrier_arrive(m, 0); }
LSTM_EXT_DEVICE void mbarrier_arrive_expect_tx(uint64_t* m, unsigned bytes) {
  emu::mbarrier_arrive(m, bytes);
}
LSTM_EXT_DEVICE void mbarrier_arrive_remote(shared_addr m) {
  emu::mbarrier_arrive(reinterpret_cast<uint64_t*>(m), 0);
}
LSTM_EXT_DEVICE bool mbarrier_try_wait(uint64_t* m, unsigned parity) {
  return emu::mbarrier_try_wait(m, parity);
}
LSTM_EXT_DEVICE void mbarrier_wait(uint64_t* m, unsigned parity) {
  while (!emu::mbarrier_try_wait(m, parity)) emu::spin();
}

// The store itself stands here, not in the emulator, so that TSan sees it.
LSTM_EXT_DEVICE void st_async(shared_addr dst, uint4 v, shared_addr mbar) {
  auto* to = reinterpret_cast<uint4*>(dst);
  auto* m = reinterpret_cast<uint64_t*>(mbar);
  if (!emu::st_async(to, &v, sizeof v, m)) return;  // delivered later
  *to = v;
  emu::mbarrier_complete_tx(m, sizeof v);
}

LSTM_EXT_DEVICE void copies_see() { emu::copies_see(); }
LSTM_EXT_DEVICE void copy_async(shared_addr dst, const void* src, unsigned bytes,
                                shared_addr mbar) {
  if (bytes % 16 || uintptr_t(src) % 16) emu::fail("a copy of %u bytes from %p", bytes, src);
  auto* m = reinterpret_cast<uint64_t*>(mbar);
  for (unsigned done = 0; done < bytes; done += 16) {
    auto* to = reinterpret_cast<uint4*>(dst + done);
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(src) + done);
    if (!emu::copy_async(to, from, 16, m)) continue;  // read and delivered later
    *to = *from;
    emu::mbarrier_complete_tx(m, 16);
  }
}

#endif

// Kernels for clusters have no body elsewhere.
#if defined(LSTM_EXT_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define LSTM_EXT_CLUSTERS 1

LSTM_EXT_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
#endif

}  // namespace lstm_ext
