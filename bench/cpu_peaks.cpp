// What the processor can do at most, each part alone: multiply-adds in registers, products of
// bfloat16 pairs, reading what lies in a cache, and a line from core to core and back.
// bench/cpu_limits.py compiles it with -march=native and calls it through ctypes.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
using Vector = float __attribute__((vector_size(vector_bytes)));

constexpr int lanes = vector_bytes / int(sizeof(float));
constexpr int chains = 12;  // enough to hide the latency of two units; they fit 16 registers

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// A vector register, where there is a name for one: from memory, the loops would load and store.
#if defined(__x86_64__)
#define REGISTER "+x"
#elif defined(__aarch64__)
#define REGISTER "+w"
#else
#define REGISTER "+m"
#endif

// The compiler must believe that the value is used and may have changed.
template <class T>
void keep(T& value) {
  asm volatile("" : REGISTER(value));
}

// Floating-point operations done: `rounds` times one multiply-add in each chain.
double multiply_add(int64_t rounds) {
  Vector sums[chains] = {};
  for (auto& sum : sums) keep(sum);  // else they are all the same one
  Vector a = Vector{} + 0.5f, b = Vector{} + 1.0f;
  keep(a);
  keep(b);
  for (int64_t round = 0; round < rounds; ++round)
    for (auto& sum : sums) sum = sum * a + b;  // stays below 2: no overflow, no denormals
  for (auto& sum : sums) keep(sum);
  return 2.0 * lanes * chains * double(rounds);
}

#if defined(__AVX512BF16__)
double bfloat16_dot(int64_t rounds) {
  Vector sums[chains] = {};
  for (auto& sum : sums) keep(sum);
  auto one = _mm512_set1_epi16(0x3f80), zero = _mm512_setzero_si512();
  asm volatile("" : "+x"(one), "+x"(zero));
  for (int64_t round = 0; round < rounds; ++round)
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)one, (__m512bh)zero);
  for (auto& sum : sums) keep(sum);
  return 4.0 * 16 * chains * double(rounds);  // 16 sums, two products and two additions each
}
#endif

// Bytes read: the whole buffer, whose size is a multiple of one round of loads.
double read(const float* buffer, size_t bytes) {
  Vector sums[8] = {};
  const auto* at = reinterpret_cast<const Vector*>(buffer);
  const size_t count = bytes / sizeof(Vector);
  for (size_t i = 0; i + 8 <= count; i += 8)
    for (size_t k = 0; k < 8; ++k) sums[k] += at[i + k];
  for (auto& sum : sums) keep(sum);
  return double(count / 8 * 8 * sizeof(Vector));
}

// Work of all threads over time. Each thread prepares, waits for the others, and repeats its piece
// until the time is over.
template <class Prepare>
double rate(int threads, double seconds, Prepare prepare) {
  std::atomic<int> waiting{threads};
  std::vector<double> rates(threads);
  auto body = [&](int index) {
    auto piece = prepare();
    piece();
    --waiting;
    while (waiting.load() > 0) {
    }
    const double begin = now();
    double work = 0, end = begin;
    while ((end = now()) < begin + seconds) work += piece();
    rates[index] = work / (end - begin);
  };
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(body, i);
  body(0);
  for (auto& thread : team) thread.join();
  double sum = 0;
  for (double one : rates) sum += one;
  return sum;
}

// A number that two threads count up in turn.
struct alignas(64) Count {
  std::atomic<int64_t> turns{0};

  // Every second turn, from the first on if `first`, until there were so many.
  void take_turns(bool first, int64_t until) {
    for (int64_t turn = first ? 0 : 1; turn < until; turn += 2) {
      while (turns.load(std::memory_order_acquire) != turn) {
      }
      turns.store(turn + 1, std::memory_order_release);
    }
  }
};

}  // namespace

// Seconds for a cache line from one thread to another, and back.
extern "C" double round_trip(int64_t times) {
  Count warm, timed;
  std::thread other([&] {
    warm.take_turns(false, 2000);
    timed.take_turns(false, 2 * times);
  });
  warm.take_turns(true, 2000);
  const double begin = now();
  timed.take_turns(true, 2 * times);
  const double seconds = now() - begin;
  other.join();
  return seconds / double(times);
}

// Each returns operations or bytes a second of all threads together.

extern "C" double peak_float32(int threads, double seconds) {
  return rate(threads, seconds, [] { return [] { return multiply_add(20000); }; });
}

// 0 where the instruction set has no product of bfloat16.
extern "C" double peak_bfloat16(int threads, double seconds) {
#if defined(__AVX512BF16__)
  return rate(threads, seconds, [] { return [] { return bfloat16_dot(20000); }; });
#else
  (void)threads, (void)seconds;
  return 0;
#endif
}

// bytes: of each thread's own buffer.
extern "C" double read_bandwidth(int threads, double seconds, size_t bytes) {
  return rate(threads, seconds, [=] {
    const size_t round = 8 * sizeof(Vector);
    const size_t size = std::max(round, bytes / round * round);
    // Aligned to a cache line, and written by the thread that reads it.
    auto store = std::vector<float>((size + 64) / sizeof(float), 1.0f);
    return [store = std::move(store), size] {
      const auto address = (reinterpret_cast<uintptr_t>(store.data()) + 63) / 64 * 64;
      double work = 0;
      do work += read(reinterpret_cast<const float*>(address), size);
      while (work < 1e6);
      return work;
    };
  });
}

extern "C" int bits_of_a_vector() { return 8 * vector_bytes; }
