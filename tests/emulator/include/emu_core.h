// Fibers, blocks, clusters, launch and every kind of barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly"
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // static shared memory: a block is one OS thread

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emu {

// The device that launches are checked against: an H100.
struct Device {
  unsigned sm_count = 132;
  unsigned threads_per_sm = 2048;
  unsigned blocks_per_sm = 32;
  unsigned max_cluster = 8;              // blocks, portable
  unsigned max_cluster_opt_in = 16;      // with cudaFuncAttributeNonPortableClusterSizeAllowed
  size_t shared_default = 48 * 1024;     // a block's, without cudaFuncSetAttribute
  size_t shared_per_block = 227 * 1024;  // a block's, with it
  size_t shared_per_sm = 228 * 1024;     // each block takes 1 KB more than it asks for
};
extern Device g_device;
extern uint64_t g_seed;  // the order of everything that CUDA leaves open: see README.md

enum State : uint8_t { READY, SPIN, WARP_WAIT, BLOCK_WAIT, DONE };
struct Block;

// TSan needs to be told of each barrier: arrive releases an address, wait acquires it. Two
// addresses by turns, else an early arrival at the next barrier would hide races of this one.
struct Sync {
  char address[2];
  char* at(unsigned generation) { return &address[generation & 1]; }
};
void hb_release(void*);
void hb_acquire(void*);

// Data that the lanes of a warp show each other. TSan is not to see it (EMU_UNSEEN): shuffles,
// ldmatrix and mma bring the lanes of a warp together but order no memory; only __syncwarp does.
// Two copies by turns: a lane that runs ahead to the next collective cannot overwrite what a slow
// lane still reads, so one rendezvous() is enough.
#define EMU_UNSEEN __attribute__((noinline, no_sanitize("thread")))
struct Exchange {
  alignas(64) unsigned char lane[32][64];
  float a[256], b[128];  // the operands of an mma
};
struct Warp {
  Warp() {}  // leaves the areas as they are
  Exchange full_area[2];
  alignas(64) unsigned char part_area[32][64];  // for collectives of some lanes
  unsigned arrived = 0;
  Sync full, part;
};

// cp.async, and to which of its thread's groups it belongs.
struct AsyncLoad {
  void* to;
  const void* from;
  int bytes;  // in whole words of 4
  unsigned group;
};

struct Fiber {
  void* sp;
  State state;
  int lane;
  unsigned tid;
  dim3 t;
  Block* b;
  Warp* w;
  char* stack;                  // lowest byte; the guard lies below
  void* tsan = nullptr;         // TSan's context
  void* tsan_copier = nullptr;  // that of its bulk copies
  void* fake_stack = nullptr;   // ASan's
  unsigned turns = 0, full_syncs = 0, part_syncs = 0, block_syncs = 0;
  unsigned cluster_arrivals = 0, cluster_waits = 0;
  std::vector<AsyncLoad> loads;  // not here yet
  unsigned load_groups = 0;      // that have been closed
};

struct RemoteStore {  // st.async in flight, or 16 bytes of a bulk copy
  void* dst;
  unsigned char data[16];
  const void* source;  // of a copy: read on arrival; null: data
  unsigned bytes;
  uint64_t* mbar;
};

struct SpinLock {  // not a mutex: TSan takes a mutex for a synchronisation of the kernel
  std::atomic_flag flag;
  void lock() {
    while (flag.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() { flag.clear(std::memory_order_release); }
};

struct Cluster {
  std::vector<Block*> blocks;
  SpinLock lock;
  unsigned live = 0, arrived = 0;  // threads
  std::atomic<unsigned> phase{0};
  Sync hb;
};

struct Grid {
  dim3 grid, block, cluster;
  size_t smem;
  uint64_t seed;
  unsigned blocks, resident;  // resident: how many of them run at a time
  void (*entry)(void*);
  void* arg;
  std::atomic<uint64_t> events{0};  // whatever shows that this is no deadlock
  char hb_start = 0, hb_end = 0;    // what TSan knows the launch by
};

struct Block {
  Grid* grid;
  Cluster* cluster;
  dim3 id;
  unsigned rank = 0;  // in the cluster
  unsigned char* smem = nullptr;
  std::vector<Fiber> f;
  std::vector<Warp> w;
  unsigned live = 0;  // threads
  void* sched;        // the scheduler's stack pointer
  void* tsan_sched = nullptr;
  const void* sched_stack = nullptr;  // the scheduler's stack, for ASan
  size_t sched_stack_bytes = 0;
  Sync hb;
  char hb_start = 0, hb_end = 0;
  std::mt19937_64 rng;
  std::atomic<bool> running{false};
  SpinLock lock;
  std::vector<RemoteStore> in_flight;  // stores towards this block
  char hb_copies = 0;                  // what bulk copies see
};

extern __thread Fiber* cur;  // null outside a kernel

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void yield(State);
inline void spin() { yield(SPIN); }  // once per turn of a loop that waits for another thread
void syncthreads();
void rendezvous(unsigned mask);  // the lanes meet; no memory order
void syncwarp(unsigned mask);    // __syncwarp: also memory order
void maybe_delay();              // by the seed: this thread falls behind
bool full_warp(unsigned mask);   // does the mask name all lanes that the warp has?

// ---- counters and flags in global memory (emu_global.cpp): barriers of a grid, chains of blocks.
// A value must only grow, from what it was when the launch began. global_wait() synchronises with
// what led to its target and with nothing that came after.
void global_arrive(unsigned* counter, unsigned n = 1);       // red.release.gpu.add
void global_store_release(unsigned* flag, unsigned value);   // st.release.gpu
unsigned global_load_acquire(const unsigned* counter);       // ld.acquire.gpu; spin() between two
void global_wait(const unsigned* counter, unsigned target);  // spins until it is at least that
// Words that order nothing but themselves; the words of a load come one by one.
void global_store_word(unsigned* word, unsigned value);  // st.relaxed.gpu
void global_store_words(unsigned* to, const unsigned* from, int count);
void global_load_words(const unsigned* from, unsigned* to, int count);  // ld.relaxed.gpu
void global_poll();  // spins once; between two looks at what another block is to write

// ---- clusters (emu_cluster.cpp)
void cluster_arrive();
void cluster_wait();
void cluster_thread_exit(Block*);
void* map_to_rank(const void* shared, unsigned rank);  // of this block's dynamic shared memory
void mbarrier_init(uint64_t*, unsigned count);
void mbarrier_arrive(uint64_t*, unsigned expect_bytes);
bool mbarrier_try_wait(uint64_t*, unsigned parity);
void mbarrier_complete_tx(uint64_t*, unsigned bytes);
// True: the caller is to store now, and then to call mbarrier_complete_tx.
bool st_async(void* dst, const void* data, unsigned bytes, uint64_t* mbar);
// The same for a piece of a bulk copy, whose source must stay as it is until it has arrived.
bool copy_async(void* dst, const void* source, unsigned bytes, uint64_t* mbar);
void copies_see();

// ---- cp.async. When data come is the seed's choice, as with st.async; until then the place holds
// 0xff.
bool async_load_comes_now();
// The first message ends the process, but at its end: results are worth seeing.
void fail_at_exit(const char* message);
inline void deliver(const AsyncLoad& load) {
  for (int i = 0; i < load.bytes / 4; ++i)
    static_cast<uint32_t*>(load.to)[i] = static_cast<const uint32_t*>(load.from)[i];
}
inline void async_load(void* to, const void* from, int bytes) {
  if (uintptr_t(to) % bytes || uintptr_t(from) % bytes)
    fail("cp.async of %d bytes from %p to %p", bytes, from, to);
  for (const AsyncLoad& other : cur->loads)
    if (other.to == to) fail_at_exit("two loads on their way to one place (cp.async)");
  const AsyncLoad load = {to, from, bytes, cur->load_groups};
  if (async_load_comes_now()) return deliver(load);
  std::memset(to, 0xff, size_t(bytes));
  cur->loads.push_back(load);
}
inline void async_commit() { ++cur->load_groups; }
inline void async_wait(unsigned pending) {
  auto& loads = cur->loads;
  size_t left = 0;
  for (const AsyncLoad& load : loads)
    if (load.group + pending >= cur->load_groups)
      loads[left++] = load;
    else
      deliver(load);
  loads.resize(left);
}

// ---- warp collectives: publish, meet, read
inline Exchange& exchange_area() {  // for collectives of the full warp; ask before rendezvous()
  return cur->w->full_area[cur->turns & 1];
}
template <class T>
EMU_UNSEEN T exchange(unsigned mask, const T& v, int source) {
  static_assert(sizeof(T) <= 64);
  T result;
  if (full_warp(mask)) {
    auto& lanes = exchange_area().lane;
    std::memcpy(lanes[cur->lane], &v, sizeof v);
    rendezvous(mask);
    std::memcpy(&result, lanes[source & 31], sizeof result);
  } else {  // overlapping masks have no common turn, so the lanes meet three times
    auto& lanes = cur->w->part_area;
    rendezvous(mask);
    std::memcpy(lanes[cur->lane], &v, sizeof v);
    rendezvous(mask);
    std::memcpy(&result, lanes[source & 31], sizeof result);
    rendezvous(mask);
  }
  return result;
}

// ---- launch (emu_launch.cpp). Synchronous; one at a time in the process.
struct Shape {
  dim3 grid, block;
  size_t smem = 0;
  dim3 cluster = {};
  bool cooperative = false;
  bool non_portable_cluster = false;
};
int run_grid(const Shape&, uint64_t seed, void (*entry)(void*), void* arg);

// Returns a CUDA error code. What goes wrong in the kernel ends the process with a message.
template <class... P, class... A>
int launch(void (*kernel)(P...), const Shape& shape, A&&... a) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> parameters;
  } call{kernel, std::tuple<P...>(std::forward<A>(a)...)};
  auto entry = [](void* v) {
    auto* c = static_cast<Call*>(v);
    std::apply(c->kernel, c->parameters);  // every thread gets copies
  };
  return run_grid(shape, g_seed, entry, &call);
}

}  // namespace emu

// Set whenever a fiber goes on.
extern constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
