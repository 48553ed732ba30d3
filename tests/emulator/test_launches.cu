// What the emulator makes of launches: which ones it refuses, many blocks, several OS threads.
// Exit code 1 if a test fails. For the emulator only.
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <thread>

#include "cuda/primitives.cuh"

namespace {

bool report(const char* name, bool ok) {
  printf("%-32s %s\n", name, ok ? "ok" : "FAIL");
  return ok;
}

__global__ void nothing() {}

struct Shape {
  unsigned blocks, threads;
  size_t smem;
  unsigned cluster = 1;
  bool cooperative = false;
};

int launch_nothing(const Shape& shape) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {shape.cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = shape.cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.smem;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, nothing);
}

bool test_refused() {
  bool ok = true;
  auto expect = [&](const char* what, const Shape& shape, int error) {
    const bool right = launch_nothing(shape) == error && cudaPeekAtLastError() == error &&
                       cudaGetLastError() == error && cudaGetLastError() == cudaSuccess;
    ok &= report(what, right);
  };
  const auto shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const auto large_clusters = cudaFuncAttributeNonPortableClusterSizeAllowed;
  const int most = 227 * 1024;
  expect("48 KB", {1, 1, 48 * 1024}, cudaSuccess);
  expect("48 KB + 1 without asking", {1, 1, 48 * 1024 + 1}, cudaErrorInvalidValue);
  ok &= report("more than 227 KB asked for",
               cudaFuncSetAttribute(nothing, shared, most + 1) == cudaErrorInvalidValue);
  cudaGetLastError();
  ok &= report("227 KB asked for", cudaFuncSetAttribute(nothing, shared, most) == cudaSuccess);
  expect("227 KB", {1, 1, size_t(most)}, cudaSuccess);
  expect("1025 threads", {1, 1025, 0}, cudaErrorInvalidConfiguration);
  expect("no blocks", {0, 1, 0}, cudaErrorInvalidConfiguration);
  expect("half a cluster", {12, 1, 0, 8}, cudaErrorInvalidConfiguration);
  expect("a cluster of 16", {16, 1, 0, 16}, cudaErrorInvalidConfiguration);
  cudaFuncSetAttribute(nothing, large_clusters, 1);
  expect("a cluster of 16, asked for", {16, 1, 0, 16}, cudaSuccess);
  const int too_large = cudaErrorCooperativeLaunchTooLarge;
  expect("cooperative, by memory", {133, 32, size_t(most), 1, true}, too_large);
  const emu::Device h100 = emu::g_device;
  emu::g_device.sm_count = 2;
  expect("cooperative, a small device", {4, 1024, 0, 1, true}, cudaSuccess);
  expect("cooperative, by threads", {5, 1024, 0, 1, true}, too_large);
  emu::g_device = h100;
  return ok;
}

// Block i of 600 adds i: more blocks than run at a time.
__global__ void add_blocks(unsigned* sum) {
  if (threadIdx.x == 1) atomicAdd(sum, blockIdx.x);
}
bool test_many_blocks() {
  unsigned sum = 0;
  const int rc = emu::launch(add_blocks, {dim3(600), dim3(2)}, &sum);
  return report("600 blocks", rc == 0 && sum == 600 * 599 / 2);
}

// The two blocks write to each other and wait for each other.
__global__ void swap(unsigned* counter, unsigned* values) {
  for (unsigned i = 1; i <= 10; ++i) {
    if (threadIdx.x == 0) values[(i + blockIdx.x) % 2]++;
    __syncthreads();
    if (threadIdx.x == 0) {
      lstm_ext::arrive_at(counter);
      lstm_ext::wait_until(counter, 2 * i);
    }
    __syncthreads();
  }
}
bool swap_often() {
  bool ok = true;
  for (int i = 0; i < 20; ++i) {
    unsigned counter = 0, values[2] = {};
    ok &= !emu::launch(swap, {dim3(2), dim3(7)}, &counter, values);
    ok &= values[0] == 10 && values[1] == 10;
  }
  return ok;
}
// Block i adds to what block i - 1 left, round after round. Flags skip values.
__global__ void chain(unsigned* flags, unsigned* value) {
  const unsigned n = gridDim.x, before = (blockIdx.x + n - 1) % n;
  for (unsigned i = 1; i <= 5; ++i) {
    const unsigned round = blockIdx.x ? i : i - 1;
    if (i % 2) {
      emu::global_wait(&flags[before], 3 * round);
    } else {
      while (emu::global_load_acquire(&flags[before]) < 3 * round) emu::spin();
    }
    *value = *value * 3 + blockIdx.x;
    emu::global_store_release(&flags[blockIdx.x], 3 * i);
  }
}
bool test_chain() {
  unsigned flags[4] = {}, value = 0, want = 0;
  for (unsigned i = 0; i < 20; ++i) want = want * 3 + i % 4;
  const int rc = emu::launch(chain, {dim3(4), dim3(1)}, flags, &value);
  return report("a chain of blocks", rc == 0 && value == want);
}

bool test_threads() {
  bool first = false, second = false;
  std::thread other([&] { first = swap_often(); });
  second = swap_often();
  other.join();
  return report("launches from two OS threads", first && second);
}

bool test_signals() {
  struct sigaction mine{}, after{};
  mine.sa_handler = [](int) { _exit(3); };
  struct sigaction before;
  sigaction(SIGSEGV, &mine, &before);
  emu::launch(nothing, {dim3(1), dim3(1)});
  sigaction(SIGSEGV, &before, &after);
  return report("signal handler is restored", after.sa_handler == mine.sa_handler);
}

bool test_fork() {
  const pid_t child = fork();
  if (!child) _exit(swap_often() ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  return report("a forked process", status == 0);
}

}  // namespace

int main() {
  bool ok = test_refused();
  ok &= test_many_blocks();
  ok &= test_chain();
  ok &= test_threads();
  ok &= test_signals();
#if !defined(EMU_TSAN)  // TSan starts no threads after a fork
  ok &= test_fork();
#endif
  return !ok;
}
