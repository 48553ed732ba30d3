// The threads of one call: how they share the work, and the barrier they meet at every step.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>
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

// Where the members of a team meet at every step. Each has a flag in a line of its own, which it
// alone writes and the others read: a meeting takes as long as one line from core to core, where a
// count of arrivals and a flag for all would take three, one after the other. A member spins,
// because a step lasts microseconds, then yields, so that more threads than cores still make
// progress. Where a yield costs a time slice, because a process that never waits has the core, it
// would at every step: from then on members sleep, and the scheduler runs them as soon as they are
// woken.
class Barrier {
 public:
  // One object a member, side by side.
  void wait(int member, int members) {
    if (members == 1) return;
    Barrier& own = this[member];
    const uint32_t meeting = own.meetings_.load(std::memory_order_relaxed) + 1;
    own.meetings_.store(meeting, std::memory_order_release);
    if (crowded_.load(std::memory_order_relaxed)) own.wake();
    for (int other = 0; other < members; ++other) {
      if (other != member) this[other].await(meeting, crowded_);
    }
  }

 private:
  // A member that has been at this meeting may be at the next already.
  bool arrived(uint32_t meeting) const {
    return int32_t(meetings_.load(std::memory_order_acquire) - meeting) >= 0;
  }

  void await(uint32_t meeting, std::atomic<bool>& crowded) {
    for (int spins = 0; !arrived(meeting); ++spins) {
      if (spins < kSpins) {
        spin_pause();
      } else if (crowded.load(std::memory_order_relaxed)) {
        sleep(meeting - 1);
      } else {
        const auto start = std::chrono::steady_clock::now();
        std::this_thread::yield();
        const auto lost = std::chrono::steady_clock::now() - start;
        if (lost > kTimeSlice) crowded.store(true, std::memory_order_relaxed);
      }
    }
  }

#if defined(__linux__)
  // Returns when woken, at once if the member has come, or for no reason. Or after a while: a
  // member that had not heard yet that others sleep has woken nobody.
  void sleep(uint32_t meetings) {
    const timespec most{0, 1000000};  // 1 ms
    syscall(SYS_futex, &meetings_, FUTEX_WAIT_PRIVATE, meetings, &most);
  }
  void wake() {
    syscall(SYS_futex, &meetings_, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max());
  }
  static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free,
                "the kernel reads it");
#else
  void sleep(uint32_t) { std::this_thread::yield(); }
  void wake() {}
#endif

  static constexpr int kSpins = 4096;  // tens of microseconds
  static constexpr std::chrono::milliseconds kTimeSlice{1};
  alignas(64) std::atomic<uint32_t> meetings_{0};
  alignas(64) std::atomic<bool> crowded_{false};  // the first member's is for all
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

static inline Range share(int64_t count, int64_t parts, int64_t part) {
  return {count * part / parts, count * (part + 1) / parts};
}

// threads = groups x slices: a group owns a range of sequences and needs no other (groups.h);
// within it each thread owns a slice of the hidden units (and of the columns of the products).
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
