// Clusters: the cluster barrier, distributed shared memory, mbarrier, st.async, bulk copies.
// Built without -fsanitize, like emu.cpp.
#include <algorithm>

#include "emu_internal.h"

#if defined(EMU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace emu {

// ---- cluster barrier. Only threads that have not exited count.

static void complete_if_all_here(Cluster* c) {  // the lock is held
  if (!c->live || c->arrived != c->live) return;
  c->arrived = 0;
  ++c->phase;
}

void cluster_arrive() {
  Fiber* f = cur;
  Cluster* c = f->b->cluster;
  if (f->cluster_arrivals != f->cluster_waits) fail("cluster_arrive twice without cluster_wait");
  hb_release(c->hb.at(f->cluster_arrivals++));
  c->lock.lock();
  ++c->arrived;
  complete_if_all_here(c);
  c->lock.unlock();
  ++f->b->grid->events;
  maybe_delay();  // what the thread writes now is not covered by this arrival
}

void cluster_wait() {
  Fiber* f = cur;
  Cluster* c = f->b->cluster;
  if (f->cluster_arrivals == f->cluster_waits) fail("cluster_wait without cluster_arrive");
  while (c->phase == f->cluster_waits) spin();
  hb_acquire(c->hb.at(f->cluster_waits++));
}

void cluster_thread_exit(Block* b) {
  if (cur->cluster_arrivals != cur->cluster_waits)
    fail("thread ends between cluster_arrive and cluster_wait");
  Cluster* c = b->cluster;
  c->lock.lock();
  --c->live;
  complete_if_all_here(c);
  c->lock.unlock();
}

// ---- distributed shared memory

static Block* owner(const void* p) {
  const auto* address = static_cast<const unsigned char*>(p);
  for (Block* b : cur->b->cluster->blocks)
    if (b->smem && address >= b->smem && address < b->smem + b->grid->smem) return b;
  return nullptr;
}

void* map_to_rank(const void* p, unsigned rank) {
  Block* b = cur->b;
  const auto& blocks = b->cluster->blocks;
  if (owner(p) != b) fail("map to rank: %p is not in this block's dynamic shared memory", p);
  if (rank >= blocks.size()) fail("map to rank %u of a cluster of %zu", rank, blocks.size());
  return blocks[rank]->smem + (static_cast<const unsigned char*>(p) - b->smem);
}

// ---- mbarrier: 8 bytes of shared memory, as on the device

struct Mbarrier {
  uint64_t magic : 6, phase : 3, expected : 14, pending : 14;
  int64_t tx : 27;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr unsigned kMagic = 0x2a;
constexpr int kTxLimit = (1 << 20) - 1;

static uint64_t bits(Mbarrier m) {
  uint64_t u;
  std::memcpy(&u, &m, 8);
  return u;
}

static Mbarrier load(uint64_t* p) {
  if (uintptr_t(p) % 8) fail("mbarrier at %p is not 8-byte aligned", static_cast<void*>(p));
  const uint64_t u = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  Mbarrier m;
  std::memcpy(&m, &u, 8);
  if (m.magic != kMagic)
    fail("mbarrier at %p is used before it is initialised (or was overwritten)",
         static_cast<void*>(p));
  return m;
}

// One TSan address per phase.
static char* hb_of(uint64_t* p, unsigned phase) { return reinterpret_cast<char*>(p) + phase % 8; }

// Applies `change` and completes the phase if nothing is pending.
template <class Change>
static void update(uint64_t* p, Change change) {
  for (;;) {
    const Mbarrier old = load(p);
    Mbarrier m = old;
    change(m);
    if (m.tx > kTxLimit || m.tx < -kTxLimit)
      fail("mbarrier: tx-count %lld out of range", static_cast<long long>(m.tx));
    if (!m.pending && !m.tx) {
      m.pending = m.expected;
      ++m.phase;
    }
    hb_release(hb_of(p, old.phase));
    uint64_t expected = bits(old);
    if (__atomic_compare_exchange_n(p, &expected, bits(m), false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE))
      break;
  }
  ++cur->b->grid->events;
}

void mbarrier_init(uint64_t* p, unsigned count) {
  if (owner(p) != cur->b || uintptr_t(p) % 8)
    fail("mbarrier %p: not an 8-byte aligned place in this block's dynamic shared memory",
         static_cast<void*>(p));
  __atomic_store_n(p, bits({kMagic, 0, count, count, 0}), __ATOMIC_RELEASE);
}

void mbarrier_arrive(uint64_t* p, unsigned expect_bytes) {
  Block* b = owner(p);
  if (!b || !b->running)
    fail(
        "mbarrier arrive: the block that holds %p does not run (a cluster barrier is missing at "
        "its start or end)",
        static_cast<void*>(p));
  update(p, [&](Mbarrier& m) {
    if (!m.pending) fail("mbarrier: more arrivals than the phase expects");
    m.tx += expect_bytes;
    --m.pending;
  });
  maybe_delay();
}

void mbarrier_complete_tx(uint64_t* p, unsigned bytes) {
  update(p, [&](Mbarrier& m) { m.tx -= bytes; });
}

// ---- st.async, and bulk copies in pieces. When a store arrives is the seed's choice: 0 as late as
// possible (when the destination waits for it), 1 at once, more: random. Late arrival shows a
// missing wait, early arrival a buffer that is overwritten too soon. TSan needs the store in the
// issuing thread: at once.

static bool send(void* dst, const void* data, bool read_late, unsigned bytes, uint64_t* mbar) {
  Block* to = owner(dst);
  if (!to || owner(static_cast<char*>(dst) + bytes - 1) != to)
    fail("st.async: %p is not shared memory of this cluster", dst);
  if (owner(mbar) != to) fail("st.async: the mbarrier is not in the destination's block");
  if (uintptr_t(dst) % bytes) fail("st.async: %p is not aligned to %u bytes", dst, bytes);
  to->lock.lock();
  if (!to->running)
    fail(
        "st.async to block %u, which does not run (a cluster barrier is missing at its start or "
        "end)",
        to->id.x);
#if defined(EMU_TSAN)
  const bool now = true;
#else
  const uint64_t seed = cur->b->grid->seed;
  const bool now = seed == 1 || (seed > 1 && cur->b->rng() % 2);
#endif
  if (!now) {
    RemoteStore store{dst, {}, read_late ? data : nullptr, bytes, mbar};
    if (!read_late) std::memcpy(store.data, data, bytes);
    to->in_flight.push_back(store);
    ++cur->b->grid->events;
  }
  to->lock.unlock();
  return now;
}

bool st_async(void* dst, const void* data, unsigned bytes, uint64_t* mbar) {
  maybe_delay();
  return send(dst, data, false, bytes, mbar);
}

void copies_see() { hb_release(&cur->b->hb_copies); }

#if defined(EMU_TSAN)
// TSan takes a copy for no thread's: whoever asks for one goes on beside it, and learns of its end
// from the mbarrier alone. It reads what was written before a barrier, which the asking thread has
// met, and before copies_see().
static void copy_beside(void* dst, const void* source, unsigned bytes, uint64_t* mbar) {
  Fiber* f = cur;
  if (!f->tsan_copier) f->tsan_copier = __tsan_create_fiber(0);
  void* from = const_cast<void*>(source);
  __tsan_read_range(from, bytes);
  __tsan_switch_to_fiber(f->tsan_copier, __tsan_switch_to_fiber_no_sync);
  hb_acquire(&f->b->hb_copies);
  __tsan_read_range(from, bytes);
  __tsan_switch_to_fiber(f->tsan, __tsan_switch_to_fiber_no_sync);
  __tsan_switch_to_fiber(f->tsan_copier, 0);
  __tsan_write_range(dst, bytes);
  void* to = dst;
  size_t count = bytes;
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count)::"memory");  // not memcpy
  mbarrier_complete_tx(mbar, bytes);
  __tsan_switch_to_fiber(f->tsan, __tsan_switch_to_fiber_no_sync);
}
#endif

bool copy_async(void* dst, const void* source, unsigned bytes, uint64_t* mbar) {
  if (owner(source) != cur->b) fail("a copy from %p, not this block's shared memory", source);
  const bool now = send(dst, source, true, bytes, mbar);
#if defined(EMU_TSAN)
  copy_beside(dst, source, bytes, mbar);
  return false;
#endif
  return now;
}

static void deliver_to(uint64_t* p) {
  Block* b = cur->b;
  std::vector<RemoteStore> arriving;
  b->lock.lock();
  auto& waiting = b->in_flight;
  const bool random = b->grid->seed > 1;
  if (random) std::shuffle(waiting.begin(), waiting.end(), b->rng);
  for (size_t i = 0; i < waiting.size();) {
    if (waiting[i].mbar == p && (!random || b->rng() % 2)) {
      arriving.push_back(waiting[i]);
      waiting.erase(waiting.begin() + ptrdiff_t(i));
    } else {
      ++i;
    }
  }
  b->lock.unlock();
  for (auto& store : arriving) {
    std::memcpy(store.dst, store.source ? store.source : store.data, store.bytes);
    mbarrier_complete_tx(store.mbar, store.bytes);
  }
}

bool mbarrier_try_wait(uint64_t* p, unsigned parity) {
  if (owner(p) != cur->b)
    fail("mbarrier wait: %p is not in this block's shared memory", static_cast<void*>(p));
  deliver_to(p);
  const Mbarrier m = load(p);
  if ((m.phase & 1) == (parity & 1)) return false;
  hb_acquire(hb_of(p, m.phase - 1));
  return true;
}

}  // namespace emu
