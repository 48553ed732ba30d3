// What the shim's own files share.
#pragma once

#include "cuda_runtime.h"

namespace emu {

constexpr size_t kPage = 4096;
constexpr size_t kGuard = 4 * kPage;  // no access below a fiber's stack

size_t setting(const char* variable, size_t otherwise);  // from the environment
size_t stack_bytes();                                    // a fiber's, without the guard

void say(const char* format, ...) __attribute__((format(printf, 1, 2)));  // as fail(), and goes on

// Runs all threads of a block to their end, on the calling OS thread. `stacks`: for each thread a
// guard, then its stack; `contexts`: what TSan knows it by. `open` and `close` the block's dynamic
// shared memory to its peers.
void run_block(Block&, char* stacks, const std::vector<void*>& contexts);
void open_shared_memory(Block&);
void close_shared_memory(Block&);

// For TSan: an access by whoever it takes the caller for.
#if defined(EMU_TSAN)
extern "C" void __tsan_read_range(void*, long);
extern "C" void __tsan_write_range(void*, long);
#endif

}  // namespace emu
