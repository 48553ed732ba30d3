// The scheduler: the fibers of a block take turns on one OS thread.
//
// Built without -fsanitize (EMU_TSAN, EMU_ASAN tell which sanitizer the kernels have): barriers
// reach TSan through hb_release and hb_acquire, fiber switches are announced to both.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "emu_internal.h"

#if defined(EMU_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(EMU_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

__thread Fiber* cur = nullptr;
uint64_t g_seed = 0;

size_t setting(const char* variable, size_t otherwise) {
  const char* value = getenv(variable);
  return value ? strtoull(value, nullptr, 10) : otherwise;
}

size_t stack_bytes() {
#if defined(EMU_TSAN) || defined(EMU_ASAN)
  constexpr size_t kDefaultKB = 256;
#else
  constexpr size_t kDefaultKB = 64;
#endif
  static const size_t bytes = (setting("EMU_STACK_KB", kDefaultKB) * 1024 + kPage - 1) & -kPage;
  return bytes;
}

static void print(const char* format, va_list arguments) {
  char what[512], where[64] = "";
  vsnprintf(what, sizeof what, format, arguments);
  if (cur) snprintf(where, sizeof where, "block %u thread %u: ", cur->b->id.x, cur->tid);
  fprintf(stderr, "emu: %s%s\n", where, what);
}

void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  print(format, arguments);
  va_end(arguments);
}

void fail(const char* format, ...) {
  static std::atomic_flag once;
  while (once.test_and_set()) pause();  // another block fails already: let its message through
  va_list arguments;
  va_start(arguments, format);
  print(format, arguments);
  va_end(arguments);
  abort();
}

void fail_at_exit(const char* message) {
  static std::atomic<const char*> first;
  const char* none = nullptr;
  if (first.compare_exchange_strong(none, message))
    std::atexit([] {
      std::fflush(stdout);  // abort() would not
      fail("%s", first.load());
    });
}

// ---- what the sanitizers are told

void hb_release([[maybe_unused]] void* p) {
#if defined(EMU_TSAN)
  __tsan_release(p);
#endif
}
void hb_acquire([[maybe_unused]] void* p) {
#if defined(EMU_TSAN)
  __tsan_acquire(p);
#endif
}

// To the scheduler; comes back when the scheduler resumes the fiber.
static void leave(Fiber* f) {
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(f->b->tsan_sched, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(f->state == DONE ? nullptr : &f->fake_stack, f->b->sched_stack,
                                 f->b->sched_stack_bytes);
#endif
  emu_switch(&f->sp, f->b->sched);
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(f->fake_stack, nullptr, nullptr);
#endif
}

static void resume(Fiber& f) {
  cur = &f;
  threadIdx = f.t;
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMU_ASAN)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, f.stack, stack_bytes());
#endif
  emu_switch(&f.b->sched, f.sp);
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  cur = nullptr;
}

// Where a fiber starts.
static void trampoline() {
  Block* b = cur->b;
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &b->sched_stack, &b->sched_stack_bytes);
#endif
  hb_acquire(&b->hb_start);
  b->grid->entry(b->grid->arg);
  if (!cur->loads.empty()) {
    async_wait(0);
    fail_at_exit("a thread has ended with loads (cp.async) still on their way");
  }
  hb_release(&b->hb_end);
  cluster_thread_exit(b);
  yield(DONE);
  abort();
}

// ---- barriers of a block and a warp

void yield(State state) {
  cur->state = state;
  leave(cur);
}

void syncthreads() {
  char* p = cur->b->hb.at(cur->block_syncs++);
  hb_release(p);
  yield(BLOCK_WAIT);
  hb_acquire(p);
}

static unsigned lanes_of(const Fiber* f) {
  const size_t n = f->b->f.size() - (f->tid & ~31u);
  return n >= 32 ? ~0u : (1u << n) - 1;
}

bool full_warp(unsigned mask) {
  const unsigned all = lanes_of(cur);
  return (mask & all) == all;
}

void rendezvous(unsigned mask) {
  Fiber* f = cur;
  Warp* w = f->w;
  const unsigned base = f->tid & ~31u, all = lanes_of(f), need = mask & all;
  if (!(need >> f->lane & 1)) fail("a warp collective whose mask %#x lacks the lane itself", mask);
  if (need == all) ++f->turns;
  w->arrived |= 1u << f->lane;
  if ((w->arrived & need) != need) return yield(WARP_WAIT);
  w->arrived &= ~need;
  for (unsigned l = 0; l < 32; ++l)
    if (need >> l & 1 && f->b->f[base + l].state == WARP_WAIT) f->b->f[base + l].state = READY;
}

void syncwarp(unsigned mask) {
  Fiber* f = cur;
  char* p = full_warp(mask) ? f->w->full.at(f->full_syncs++) : f->w->part.at(f->part_syncs++);
  hb_release(p);
  rendezvous(mask);
  hb_acquire(p);
}

void maybe_delay() {
  Block* b = cur->b;
  if (b->grid->seed > 1 && b->rng() % 4 == 0) spin();
}

// Here, where TSan does not look: the block's threads share a generator.
bool async_load_comes_now() {
  Block* b = cur->b;
  return b->grid->seed == 1 || (b->grid->seed > 1 && b->rng() % 2);
}

// ---- a block

static void create_fibers(Block& b, char* stacks,
                          [[maybe_unused]] const std::vector<void*>& contexts) {
  const dim3 block = b.grid->block;
  const unsigned n = block.x * block.y * block.z;
  b.f.resize(n);
  b.w = std::vector<Warp>((n + 31) / 32);
  b.live = n;
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = b.f[i];
    f.state = READY;
    f.tid = i;
    f.lane = i % 32;
    f.t = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    f.b = &b;
    f.w = &b.w[i / 32];
    f.stack = stacks + (kGuard + stack_bytes()) * i + kGuard;
    void** sp = reinterpret_cast<void**>(f.stack + stack_bytes());
    *--sp = nullptr;  // where trampoline would return to
    *--sp = reinterpret_cast<void*>(trampoline);
    for (int k = 0; k < 6; ++k) *--sp = nullptr;  // the registers that emu_switch pops
    f.sp = sp;
#if defined(EMU_TSAN)
    f.tsan = contexts[i];
#endif
  }
}

namespace {

// Notices when nothing happens any more while some threads wait in a loop.
class Watchdog {
 public:
  explicit Watchdog(Block& b) : b_(b) {}
  // After a round in which threads span; `idle`: none did anything else.
  void look(bool idle, const unsigned* count) {
    idle_ = idle ? idle_ + 1 : 0;
    if (idle_ > 200) usleep(50);  // leave the core to those who work
    if (const uint64_t events = b_.grid->events; events != seen_) {
      seen_ = events;
      rounds_ = 0;
      since_ = Clock::now();
      return;
    }
    static const double limit = double(setting("EMU_TIMEOUT_S", 10));
    if (++rounds_ % 16) return;
    if (std::chrono::duration<double>(Clock::now() - since_).count() < limit) return;
    fail(
        "deadlock in block %u: of %u live threads %u spin (mbarrier, cluster barrier, global "
        "counter), %u in a warp collective, %u at __syncthreads",
        b_.id.x, b_.live, count[SPIN], count[WARP_WAIT], count[BLOCK_WAIT]);
  }

 private:
  using Clock = std::chrono::steady_clock;
  Block& b_;
  Clock::time_point since_ = Clock::now();
  uint64_t seen_ = 0;
  unsigned idle_ = 0, rounds_ = 0;
};

}  // namespace

// Takes turns until every fiber is done. Seed 0: in order; 1: reversed; 2 and more: shuffled.
static void schedule(Block& b) {
  Grid* g = b.grid;
  const bool random = g->seed > 1, peers = g->blocks > 1;
  std::vector<unsigned> order(b.w.size()), lanes(32);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (unsigned i = 0; i < 32; ++i) lanes[i] = i;
  if (g->seed == 1) {
    std::reverse(order.begin(), order.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  blockIdx = b.id;
  blockDim = g->block;
  gridDim = g->grid;
  Watchdog watchdog(b);
  while (b.live) {
    if (random) {
      std::shuffle(order.begin(), order.end(), b.rng);
      std::shuffle(lanes.begin(), lanes.end(), b.rng);
      if (peers && b.rng() % 16 == 0) usleep(b.rng() % 200);  // now and then it falls behind
    }
    bool progress = false, idle = true, event = false;
    for (unsigned warp : order)
      for (bool any = true; any;) {
        any = false;
        for (unsigned lane : lanes) {
          const unsigned i = warp * 32 + lane;
          if (i >= b.f.size() || b.f[i].state != READY) continue;
          any = progress = true;
          resume(b.f[i]);
          const State state = b.f[i].state;
          idle &= state == SPIN;
          event |= state == BLOCK_WAIT || state == DONE;  // a warp may spin through collectives
          b.live -= state == DONE;
        }
      }
    if (event) ++g->events;
    if (!b.live) break;
    unsigned count[DONE + 1] = {};
    for (auto& f : b.f) ++count[f.state];
    auto wake = [&](State s) {
      for (auto& f : b.f)
        if (f.state == s) f.state = READY;
    };
    if (count[BLOCK_WAIT] == b.live) {
      wake(BLOCK_WAIT);
    } else if (count[SPIN]) {
      wake(SPIN);
      if (idle) sched_yield();
      watchdog.look(idle, count);
    } else if (!progress) {
      fail(
          "barrier divergence in block %u: %u live threads, %u at __syncthreads, %u in a warp "
          "collective",
          b.id.x, b.live, count[BLOCK_WAIT], count[WARP_WAIT]);
    }
  }
}

void run_block(Block& b, char* stacks, const std::vector<void*>& contexts) {
  Grid* g = b.grid;
  hb_acquire(&g->hb_start);
#if defined(EMU_TSAN)
  b.tsan_sched = __tsan_get_current_fiber();
#endif
  b.rng.seed(g->seed * 1000003 + b.id.x + g->grid.x * (b.id.y + uint64_t(g->grid.y) * b.id.z));
  create_fibers(b, stacks, contexts);
  // Blocks of a cluster do not start together.
  if (g->seed > 1 && g->blocks > 1 && b.rng() % 4 == 0) usleep(b.rng() % 500);
  open_shared_memory(b);
  b.running = true;
  hb_release(&b.hb_start);
  schedule(b);
  hb_acquire(&b.hb_end);
#if defined(EMU_TSAN)
  // Its shared memory is another's now: a peer's access, or a copy's, has come before.
  if (b.smem) __tsan_write_range(b.smem, long(g->smem));
  for (Fiber& f : b.f)
    if (f.tsan_copier) __tsan_destroy_fiber(f.tsan_copier);
#endif
  b.lock.lock();
  close_shared_memory(b);
  b.running = false;  // from here on a peer's access faults
  if (!b.in_flight.empty())
    fail("block %u has ended with %zu remote stores (st.async) still on their way to it", b.id.x,
         b.in_flight.size());
  b.lock.unlock();
  b.f = {};
  b.w = {};
  hb_release(&g->hb_end);
}

}  // namespace emu
