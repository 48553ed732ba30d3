// The threads of one call: how they share the work, and the barrier they meet at every step.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lstm_ext {
namespace LSTM_EXT_ISA {

static inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Counts arrivals; the last one opens the next phase. Spins, because a step lasts microseconds,
// then yields, so that more threads than cores still make progress. Where a yield costs a time
// slice, because a process that never waits has the core, it would at every step: from then on
// members sleep, and the scheduler runs them as soon as they are woken.
class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      // In one order with a sleeper's two: it sees the new phase, or is seen here.
      phase_.store(phase + 1, std::memory_order_seq_cst);
      if (sleepers_.load(std::memory_order_seq_cst)) wake();
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
        spin_pause();
      } else if (crowded_.load(std::memory_order_relaxed)) {
        wait_asleep(phase);
      } else {
        const auto start = std::chrono::steady_clock::now();
        std::this_thread::yield();
        const auto lost = std::chrono::steady_clock::now() - start;
        if (lost > kTimeSlice) crowded_.store(true, std::memory_order_relaxed);
      }
    }
  }

 private:
  void wait_asleep(int phase) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (phase_.load(std::memory_order_seq_cst) == phase) sleep(phase);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

#if defined(__linux__)
  // Returns when woken, at once if the phase is another one already, or for no reason.
  void sleep(int phase) { syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr); }
  void wake() { syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max()); }
  static_assert(sizeof(std::atomic<int>) == 4 && std::atomic<int>::is_always_lock_free,
                "the kernel reads the phase");
#else
  void sleep(int) { std::this_thread::yield(); }
  void wake() {}
#endif

  static constexpr int kSpins = 4096;  // tens of microseconds
  static constexpr std::chrono::milliseconds kTimeSlice{1};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> crowded_{false};
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

static inline Range share(int64_t count, int64_t parts, int64_t part) {
  return {count * part / parts, count * (part + 1) / parts};
}

// threads = groups x slices: a group owns a range of sequences and needs no other group; within
// it each thread owns a slice of the hidden units (and of the columns of the products).
struct Plan {
  int groups;
  int slices;
  int threads() const { return groups * slices; }
};

// Calls body(thread, threads) on a team of `wanted` threads, or fewer if OpenMP grants fewer:
// body must derive everything from the second argument. One thread opens no parallel region, so
// that a forked child (a DataLoader worker) never touches OpenMP.
template <class Body>
void run_team(int wanted, const Body& body) {
#if defined(_OPENMP)
  if (wanted > 1) {
#pragma omp parallel num_threads(wanted)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)wanted;
  body(0, 1);
}

}  // namespace LSTM_EXT_ISA
}  // namespace lstm_ext
