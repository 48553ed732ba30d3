// Counters and flags in global memory: release by adding or storing, acquire by spinning.
// Built without -fsanitize, like emu.cpp.
#include <algorithm>

#include "emu_internal.h"

namespace emu {

// To TSan, each single value of a counter is an address of its own: the step from v to v + 1
// releases slot v, and who waits for a target acquires the slots below it. So an early arrival at
// the next barrier (a value past the target) orders nothing, as if it had not come yet.
#if defined(EMU_TSAN)
constexpr unsigned kSlots = 1 << 16, kWindow = 1 << 11;
static char g_slots[kSlots];
static void* slot(const unsigned* counter, unsigned value) {
  const auto spread = unsigned(uintptr_t(counter) / sizeof *counter * 0x9e3779b97f4a7c15u >> 40);
  return &g_slots[(spread + value) % kSlots];
}
static void release_values(unsigned* counter, unsigned from, unsigned to) {
  for (unsigned n = std::min(to - from, kWindow); n; --n) hb_release(slot(counter, to - n));
}
static void acquire_below(const unsigned* counter, unsigned value) {
  for (unsigned n = std::min(value, kWindow); n; --n) hb_acquire(slot(counter, value - n));
}
#else
static void release_values(unsigned*, unsigned, unsigned) {}
static void acquire_below(const unsigned*, unsigned) {}
#endif

static SpinLock g_lock;  // the release must come before the value is seen, but depends on it

void global_arrive(unsigned* counter, unsigned n) {
  g_lock.lock();
  const unsigned before = __atomic_load_n(counter, __ATOMIC_RELAXED);
  release_values(counter, before, before + n);
  __atomic_fetch_add(counter, n, __ATOMIC_RELEASE);
  g_lock.unlock();
  ++cur->b->grid->events;
  maybe_delay();  // what the thread writes now is not covered by this arrival
}

void global_store_release(unsigned* flag, unsigned value) {
  g_lock.lock();
  const unsigned before = __atomic_load_n(flag, __ATOMIC_RELAXED);
  if (int(value - before) > 0) release_values(flag, before, value);
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  g_lock.unlock();
  ++cur->b->grid->events;
  maybe_delay();
}

unsigned global_load_acquire(const unsigned* counter) {
  const unsigned value = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
  acquire_below(counter, value);
  return value;
}

void global_poll() {
  const Grid* g = cur->b->grid;
  if (g->resident < g->blocks)
    fail("waits for another block, but of %u blocks only %u run at a time", g->blocks, g->resident);
  spin();
}

void global_wait(const unsigned* counter, unsigned target) {
  while (int(__atomic_load_n(counter, __ATOMIC_ACQUIRE) - target) < 0) global_poll();
  acquire_below(counter, target);
}

void global_store_word(unsigned* word, unsigned value) {
  maybe_delay();  // threads' words come in any order
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
  ++cur->b->grid->events;
}

// Of a vector each word for itself, in any order.
static int first_of(int count) {
  Block* const b = cur->b;
  return b->grid->seed > 1 ? int(b->rng() % unsigned(count)) : b->grid->seed == 1 ? count - 1 : 0;
}
void global_store_words(unsigned* to, const unsigned* from, int count) {
  const int first = first_of(count);
  for (int i = 0; i < count; ++i) {
    const int word = (first + i) % count;
    global_store_word(to + word, from[word]);
  }
}
void global_load_words(const unsigned* from, unsigned* to, int count) {
  const int first = first_of(count);
  for (int i = 0; i < count; ++i) {
    const int word = (first + i) % count;
    if (i == count / 2) maybe_delay();
    to[word] = __atomic_load_n(from + word, __ATOMIC_RELAXED);
  }
}

}  // namespace emu
