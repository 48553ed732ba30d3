// The threads of one call: how they share the work, and the barrier they meet at every step.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

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
// then yields, so that more threads than cores still make progress.
class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
        spin_pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 4096;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
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
