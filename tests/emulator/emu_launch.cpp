// Launches: what the driver would refuse, the OS threads and memory of blocks, faults.
// Built without -fsanitize, like emu.cpp.
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <memory>
#include <mutex>
#include <thread>

#include "emu_internal.h"

#if defined(EMU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace emu {

Device g_device;

namespace {

// ---- memory

char* reserve(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("no memory for %zu bytes of stacks or shared memory", bytes);
  return static_cast<char*>(p);
}

// Each guard splits a mapping, and Linux allows 65,530 of them in a process. Past this many stacks
// an overflow goes unnoticed.
constexpr unsigned kMaxGuards = 24000;
unsigned g_guards = 0;

struct Stacks {
  char* base = nullptr;
  unsigned count = 0, guards = 0;

  static size_t stride() { return kGuard + stack_bytes(); }
  void clear() {
    if (base) munmap(base, stride() * count);
    g_guards -= guards;
    *this = {};
  }
  void ensure(unsigned n) {
    if (n <= count) return;
    clear();
    base = reserve(stride() * n, PROT_READ | PROT_WRITE);
    count = n;
    for (; guards < n && g_guards < kMaxGuards; ++guards, ++g_guards)
      mprotect(base + stride() * guards, kGuard, PROT_NONE);
  }
};

// A block's dynamic shared memory ends against a forbidden page, so that an overrun faults. Before
// its block runs and after it has ended, it is not accessible.
struct SharedMemory {
  char* base = nullptr;
  size_t bytes = 0;  // without the page at the end

  void clear() {
    if (base) munmap(base, bytes + kPage);
    *this = {};
  }
  void ensure(size_t n) {
    if (n <= bytes) return;
    clear();
    bytes = (n + kPage - 1) & -kPage;
    base = reserve(bytes + kPage, PROT_NONE);
  }
  bool holds(const char* p) const { return base && p >= base && p < base + bytes + kPage; }
};

// ---- OS threads: they outlive a launch, since making one and its stacks takes longer than a
// small kernel. They sleep on a futex, which TSan does not see: no order among blocks.

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation | FUTEX_PRIVATE_FLAG, value,
          nullptr, nullptr, 0);
}
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  while (word.load(std::memory_order_acquire) == value) futex(word, FUTEX_WAIT, value);
}

// TSan's view of threads. Making one takes half a millisecond, and there may be 8128.
struct Contexts {
  std::vector<void*> fibers;
#if defined(EMU_TSAN)
  void clear() {
    for (void* fiber : fibers) __tsan_destroy_fiber(fiber);
    fibers.clear();
  }
  void ensure(unsigned n) {
    while (fibers.size() < n) fibers.push_back(__tsan_create_fiber(0));
  }
#endif
};

struct Worker {
  Stacks stacks;
  Contexts contexts;
  SharedMemory shared;
  std::vector<Block*> blocks;  // to run, one after the other
  std::atomic<uint32_t> tickets{0};
};

struct Pool {
  pid_t pid = getpid();
  std::vector<std::unique_ptr<Worker>> workers;
  std::atomic<uint32_t> busy{0};
};

constexpr unsigned kKept = 256;  // workers that keep their memory between launches

std::mutex g_launch;     // one launch at a time
Pool* g_pool = nullptr;  // never destroyed: its threads may outlive static destructors
struct sigaction g_before;

void work(Pool* pool, Worker* w) {
  stack_t alternative;  // where a stack overflow is reported
  sigaltstack(nullptr, &alternative);
  if (alternative.ss_flags & SS_DISABLE) {
    constexpr size_t kBytes = 256 * 1024;
    alternative = {reserve(kBytes, PROT_READ | PROT_WRITE), 0, kBytes};
    sigaltstack(&alternative, nullptr);
  }
  for (uint32_t seen = 0;; ++seen) {
    sleep_while(w->tickets, seen);
    for (Block* b : w->blocks) run_block(*b, w->stacks.base, w->contexts.fibers);
    if (pool->busy.fetch_sub(1, std::memory_order_acq_rel) == 1) futex(pool->busy, FUTEX_WAKE, 1);
  }
}

// A fork leaves the threads behind: the child makes its own.
Pool& pool_of(unsigned workers) {
  if (!g_pool || g_pool->pid != getpid()) g_pool = new Pool;
  while (g_pool->workers.size() < workers) {
    g_pool->workers.push_back(std::make_unique<Worker>());
    std::thread(work, g_pool, g_pool->workers.back().get()).detach();
  }
  return *g_pool;
}

#if defined(EMU_TSAN)
void make_contexts(Pool& pool, unsigned workers, unsigned threads) {
  constexpr size_t kMost = 8000;
  if (size_t(workers) * threads > kMost)
    fail("%u blocks of %u threads at a time are too many for ThreadSanitizer", workers, threads);
  size_t total = 0;
  for (unsigned i = 0; i < pool.workers.size(); ++i)
    total += std::max(pool.workers[i]->contexts.fibers.size(), size_t(i < workers ? threads : 0));
  if (total > kMost)
    for (auto& w : pool.workers) w->contexts.clear();
  for (unsigned i = 0; i < workers; ++i) pool.workers[i]->contexts.ensure(threads);
}
#else
void make_contexts(Pool&, unsigned, unsigned) {}
#endif

// ---- faults

bool in_guard(const char* p, const Fiber* f) { return p >= f->stack - kGuard && p < f->stack; }

void on_fault(int signal, siginfo_t* info, void*) {
  const char* p = static_cast<const char*>(info->si_addr);
  if (cur && in_guard(p, cur)) fail("stack overflow: a thread has %zu KB", stack_bytes() / 1024);
  for (auto& w : g_pool->workers) {
    if (w->blocks.empty() || !w->shared.holds(p)) continue;
    const char* end = w->shared.base + w->shared.bytes;
    const Block* b = w->blocks.front();
    if (p >= end) fail("access past the end of block %u's dynamic shared memory", b->id.x);
    if (p < reinterpret_cast<char*>(b->smem))
      fail("access before the start of block %u's dynamic shared memory", b->id.x);
    fail(
        "access to dynamic shared memory of block %u, which does not run (a cluster barrier is "
        "missing at its start or end)",
        b->id.x);
  }
  if (cur) say("access to %p, which is no shared memory", static_cast<const void*>(p));
  sigaction(signal, &g_before, nullptr);  // fault again without us: the process ends as it would
}

class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &g_before);
  }
  ~FaultHandler() { sigaction(SIGSEGV, &g_before, nullptr); }
};

// ---- what the driver would refuse

unsigned volume(dim3 d) { return d.x * d.y * d.z; }

int check(const Shape& s) {
  const unsigned threads = volume(s.block), blocks = volume(s.grid), cluster = volume(s.cluster);
  const unsigned most = s.non_portable_cluster ? g_device.max_cluster_opt_in : g_device.max_cluster;
  if (s.smem > g_device.shared_per_block) return cudaErrorInvalidValue;
  if (!threads || threads > 1024 || s.block.z > 64 || !blocks || s.grid.y > 65535 ||
      s.grid.z > 65535 || !cluster || cluster > most || s.grid.x % s.cluster.x ||
      s.grid.y % s.cluster.y || s.grid.z % s.cluster.z)
    return cudaErrorInvalidConfiguration;
  if (s.cooperative && blocks > blocks_per_sm(threads, s.smem) * g_device.sm_count)
    return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

// Blocks that run at a time: what the device holds, but no more than this many OS threads.
unsigned resident_blocks(const Shape& s) {
  const unsigned blocks = volume(s.grid), cluster = volume(s.cluster);
  const unsigned capacity = blocks_per_sm(volume(s.block), s.smem) * g_device.sm_count;
  const unsigned most = std::max(s.cooperative ? capacity : std::min(capacity, 256u), cluster);
  return std::min(blocks, most / cluster * cluster);
}

// Cluster by cluster, by rank: a worker that takes every n-th one never waits for a later one.
std::vector<Block*> into_clusters(std::vector<Block>& blocks, std::vector<Cluster>& clusters,
                                  const Grid& grid) {
  const dim3 g = grid.grid, c = grid.cluster;
  for (unsigned i = 0; i < blocks.size(); ++i) {
    Block& b = blocks[i];
    b.id = dim3(i % g.x, i / g.x % g.y, i / g.x / g.y);
    const unsigned row = b.id.z / c.z * (g.y / c.y) + b.id.y / c.y;
    Cluster& mine = clusters[row * (g.x / c.x) + b.id.x / c.x];
    b.cluster = &mine;
    b.rank = unsigned(mine.blocks.size());  // i grows along x, y, z: so does the rank
    mine.blocks.push_back(&b);
    mine.live += volume(grid.block);
  }
  std::vector<Block*> all;
  for (auto& cluster : clusters)
    all.insert(all.end(), cluster.blocks.begin(), cluster.blocks.end());
  return all;
}

}  // namespace

static char* first_page(const Block& b) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(b.smem) & -kPage);
}
static size_t page_bytes(const Block& b) {
  return ((b.grid->smem + 127) / 128 * 128 + kPage - 1) & -kPage;
}
void open_shared_memory(Block& b) {
  if (!b.smem) return;
  mprotect(first_page(b), page_bytes(b), PROT_READ | PROT_WRITE);
  // 0xff: NaN in every float format. Not memset, which TSan would see.
  void* to = first_page(b);
  size_t bytes = page_bytes(b);
  asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(0xff) : "memory");
}
void close_shared_memory(Block& b) {
  if (b.smem) mprotect(first_page(b), page_bytes(b), PROT_NONE);
}

unsigned blocks_per_sm(unsigned threads, size_t smem) {
  const size_t by_memory = g_device.shared_per_sm / (smem + 1024);
  const unsigned by_threads = g_device.threads_per_sm / ((threads + 31) / 32 * 32);
  return std::min({by_threads, g_device.blocks_per_sm, unsigned(by_memory)});
}

int run_grid(const Shape& s, uint64_t seed, void (*entry)(void*), void* arg) {
  if (cur) fail("a kernel launches a kernel");
  if (const int error = check(s)) return error;
  std::lock_guard<std::mutex> lock(g_launch);

  const unsigned threads = volume(s.block), resident = resident_blocks(s);
  Grid grid{s.grid, s.block, s.cluster, s.smem, seed, volume(s.grid), resident, entry, arg};
  std::vector<Block> blocks(grid.blocks);
  std::vector<Cluster> clusters(grid.blocks / volume(s.cluster));
  for (auto& b : blocks) b.grid = &grid;
  const std::vector<Block*> all = into_clusters(blocks, clusters, grid);

  Pool& pool = pool_of(resident);
  make_contexts(pool, resident, threads);
  const size_t smem = (s.smem + 127) / 128 * 128;  // so it starts at 128 bytes, as on the device
  for (unsigned i = 0; i < resident; ++i) {
    Worker& w = *pool.workers[i];
    w.stacks.ensure(threads);
    w.shared.ensure(smem);
    for (unsigned k = i; k < all.size(); k += resident) {
      w.blocks.push_back(all[k]);
      if (smem)
        all[k]->smem = reinterpret_cast<unsigned char*>(w.shared.base) + w.shared.bytes - smem;
    }
  }
  pool.busy = resident;
  hb_release(&grid.hb_start);
  {
    FaultHandler handler;
    for (unsigned i = 0; i < resident; ++i) {
      Worker& w = *pool.workers[i];
      w.tickets.fetch_add(1, std::memory_order_release);
      futex(w.tickets, FUTEX_WAKE, 1);
    }
    while (const uint32_t busy = pool.busy.load(std::memory_order_acquire))
      futex(pool.busy, FUTEX_WAIT, busy);
  }
  hb_acquire(&grid.hb_end);
  for (unsigned i = 0; i < resident; ++i) {
    Worker& w = *pool.workers[i];
    w.blocks.clear();
    if (i < kKept) continue;
    w.stacks.clear();
    w.shared.clear();
  }
  return cudaSuccess;
}

}  // namespace emu
