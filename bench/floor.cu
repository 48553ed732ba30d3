// What a time step costs at least on the GPU at hand: ways of exchanging h between blocks, alone.
//
// Prints a JSON line per measurement: microseconds a step, the difference of a long and a short run
// divided by their steps, so that launch and first touch cancel. Every exchange checks what it got.
// `floor.cu` needs csrc/ on the include path; `python -m bench.floor` builds and runs it. Compiled
// with LSTM_EXT_EMULATED it runs on the emulator (small), where only the check means anything.
#ifndef LSTM_EXT_EMULATED
#include <cooperative_groups.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/cluster.cuh"
#include "cuda/launch.h"
#include "cuda/primitives.cuh"
#include "cuda/words.cuh"

namespace {

using namespace lstm_ext;

constexpr int kBlock = kThreads;
constexpr int kStride = 32;  // words between two counters: a cache line
#ifdef LSTM_EXT_EMULATED
constexpr int kShort = 2, kLong = 5, kRepeats = 1, kMostBlocks = 8;
#else
constexpr int kShort = 200, kLong = 2200, kRepeats = 5, kMostBlocks = 1 << 20;
#endif

void check(cudaError_t error, const char* what) { check_cuda(error, what); }

template <class T>
T* allocate(size_t count) {
  T* p = nullptr;
  check(cudaMalloc(&p, count * sizeof(T)), "allocating");
  check(cudaMemsetAsync(p, 0, count * sizeof(T), nullptr), "clearing");
  return p;
}

struct Args {
  unsigned* counters;
  uint4* state;   // [2][vectors] of a group
  unsigned* out;  // [blocks]: the sum of all that a thread 0 has read
  int per_group;  // blocks that exchange
  int vectors;    // 16 bytes each, of a group's whole state
  int steps;
};

__global__ void __launch_bounds__(kBlock) empty(const __grid_constant__ Args args) {
  if (args.steps < 0) args.out[0] = 1;
}

// A step: write this block's part of the state, meet the group, read all of it. vectors 0: only
// meet.
__global__ void __launch_bounds__(kBlock) through_l2(const __grid_constant__ Args args) {
  const int group = blockIdx.x / args.per_group, rank = blockIdx.x % args.per_group;
  unsigned* counter = args.counters + group * kStride;
  uint4* state = args.state + size_t(group) * 2 * args.vectors;
  const int part = args.vectors / args.per_group;
  unsigned sum = 0;
  for (int step = 1; step <= args.steps; ++step) {
    uint4* now = state + step % 2 * args.vectors;
    for (int i = threadIdx.x; i < part; i += kBlock)
      now[rank * part + i] = make_uint4(step, rank, i, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
      arrive_at(counter);
      wait_until(counter, unsigned(step) * args.per_group);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < args.vectors; i += kBlock) {
      const uint4 v = load_shared_by_blocks(now + i);
      sum += v.x + v.w;
    }
  }
  // Each thread's own sum would do; one a block keeps the result small.
  if (args.vectors == 0) sum = args.steps;
  if (threadIdx.x == 0) args.out[blockIdx.x] = sum;
}

// Without a barrier, by words that carry their step's number: as the family tagged does it.
__global__ void __launch_bounds__(kBlock) by_words(const __grid_constant__ Args args) {
  const int group = blockIdx.x / args.per_group, rank = blockIdx.x % args.per_group;
  uint4* state = args.state + size_t(group) * 2 * args.vectors;
  const int part = args.vectors / args.per_group * 4;  // words
  const int mine = (args.vectors - int(threadIdx.x) + kBlock - 1) / kBlock;
  unsigned sum = 0;
  for (int step = 1; step <= args.steps; ++step) {
    uint4* now = state + step % 2 * args.vectors;
    for (int i = threadIdx.x; i < part; i += kBlock)
      store_word(reinterpret_cast<unsigned*>(now) + rank * part + i, unsigned(step) << 8 | i % 4);
    take_words<1>(
        now + threadIdx.x, kBlock, 1, mine,
        [&](const uint4(&v)[1]) {
          return v[0].x >> 8 == unsigned(step) && v[0].y >> 8 == unsigned(step) &&
                 v[0].z >> 8 == unsigned(step) && v[0].w >> 8 == unsigned(step);
        },
        [&](int, const uint4(&v)[1]) { sum += (v[0].x >> 8) + (v[0].w & 255) - 2; });
    // All of the block has read before any of it writes the next step, which frees the buffer.
    __syncthreads();
  }
  if (threadIdx.x == 0) args.out[blockIdx.x] = sum;
}

#ifndef LSTM_EXT_EMULATED
__global__ void __launch_bounds__(kBlock) grid_sync(const __grid_constant__ Args args) {
  for (int step = 0; step < args.steps; ++step) cooperative_groups::this_grid().sync();
  if (threadIdx.x == 0) args.out[blockIdx.x] = args.steps;
}
#endif

// The same through distributed shared memory: every block sends its part to every peer, two
// buffers, one mbarrier each; by st.async of a vector each, or with kCopies by a bulk copy for each
// peer, two lanes of each warp. Cluster of kRanks blocks. vectors 0: only the cluster's barrier.
template <int kRanks, bool kCopies>
__global__ void __launch_bounds__(kBlock) through_cluster(const __grid_constant__ Args args) {
#if defined(LSTM_EXT_EMULATED) || __CUDA_ARCH__ >= 900
  DYNAMIC_SHARED(memory);
  uint64_t* full = reinterpret_cast<uint64_t*>(memory);  // [2]
  uint4* buffers = reinterpret_cast<uint4*>(memory + 128);
  uint4* letters = buffers + 2 * args.vectors;  // [2][part]
  const int rank = int(cluster_rank()), part = args.vectors / kRanks;
  if (threadIdx.x == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    fence_mbarrier_init();
  }
  cluster_arrive();
  cluster_wait();  // the peers' mbarriers are ready
  unsigned sum = 0;
  for (int step = 1; step <= args.steps; ++step) {
    if (args.vectors == 0) {
      cluster_arrive();
      cluster_wait();
      continue;
    }
    uint64_t* bar = &full[step % 2];
    uint4* now = buffers + step % 2 * args.vectors;
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(bar, args.vectors * 16);
    if (kCopies) {
      uint4* letter = letters + step % 2 * part;
      for (int i = threadIdx.x; i < part; i += kBlock) letter[i] = make_uint4(step, rank, i, 1);
      copies_see();
      __syncthreads();
      const int lane = threadIdx.x % 32, peer = threadIdx.x / 32 + lane * (kBlock / 32);
      if (lane < 2 && peer < kRanks)
        copy_async(map_to_rank(shared_address(now + rank * part), peer), letter, part * 16,
                   map_to_rank(shared_address(bar), peer));
    }
    for (int i = threadIdx.x; !kCopies && i < part * kRanks; i += kBlock) {
      const int peer = i / part, mine = rank * part + i % part;
      st_async(map_to_rank(shared_address(now + mine), peer), make_uint4(step, rank, i, 1),
               map_to_rank(shared_address(bar), peer));
    }
    // Both parities of a barrier's phases take turns: it is used every second step.
    mbarrier_wait(bar, (step / 2 + (step % 2 == 0)) % 2);
    for (int i = threadIdx.x; i < args.vectors; i += kBlock) sum += now[i].x + now[i].w;
  }
  if (args.vectors == 0) sum = args.steps;
  if (threadIdx.x == 0) args.out[blockIdx.x] = sum;
  cluster_arrive();
  cluster_wait();  // nobody leaves while a peer may still write to it
#endif
}

// ---- measuring
// --------------------------------------------------------------------------------------

template <class Work>
double microseconds(Work work) {
#ifdef LSTM_EXT_EMULATED
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
#else
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "timing");
  check(cudaEventCreate(&end), "timing");
  check(cudaEventRecord(start, nullptr), "timing");
  work();
  check(cudaEventRecord(end, nullptr), "timing");
  check(cudaEventSynchronize(end), "running");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, start, end), "timing");
  check(cudaEventDestroy(start), "timing");
  check(cudaEventDestroy(end), "timing");
  return 1000.0 * ms;
#endif
}

// run(steps): microseconds of a whole run.
template <class Run>
double per_step(Run run) {
  run(kShort);  // warm-up
  std::vector<double> each;
  for (int i = 0; i < kRepeats; ++i) each.push_back((run(kLong) - run(kShort)) / (kLong - kShort));
  std::nth_element(each.begin(), each.begin() + kRepeats / 2, each.end());
  return each[kRepeats / 2];
}

void report(const char* what, int blocks, int per_group, int bytes, double us) {
  std::printf(
      "{\"what\": \"%s\", \"blocks\": %d, \"per_group\": %d, \"bytes\": %d, \"us\": %.3f}\n", what,
      blocks, per_group, bytes, us);
  std::fflush(stdout);
}

// Thread 0 reads the vectors 0, kBlock, ...: x is the step, w is 1.
void verify(const unsigned* out, int blocks, int vectors, int steps) {
  std::vector<unsigned> got(blocks);
  check(cudaMemcpy(got.data(), out, blocks * sizeof(unsigned), cudaMemcpyDeviceToHost), "running");
  const unsigned read = (vectors + kBlock - 1) / kBlock;
  unsigned expected = vectors ? 0 : steps;
  for (int step = 1; step <= steps; ++step) expected += read * (step + 1);
  for (int block = 0; block < blocks; ++block)
    if (got[block] != expected) {
      std::fprintf(stderr, "block %d read %u, expected %u\n", block, got[block], expected);
      std::exit(1);
    }
}

void measure_l2(void (*kernel)(Args), const char* what, int blocks, int per_group, int bytes) {
  const int vectors = bytes / 16, groups = blocks / per_group;
  Args args = {allocate<unsigned>(groups * kStride),
               allocate<uint4>(std::max<size_t>(1, size_t(groups) * 2 * vectors)),
               allocate<unsigned>(blocks),
               per_group,
               vectors,
               0};
  const double us = per_step([&](int steps) {
    check(cudaMemsetAsync(args.counters, 0, groups * kStride * 4, nullptr), "clearing");
    check(cudaMemsetAsync(args.state, 0, size_t(groups) * 2 * bytes, nullptr), "clearing");
    args.steps = steps;
    const double took = microseconds(
        [&] { launch(kernel, {dim3(blocks), kBlock, 0, true}, nullptr, args, "the exchange"); });
    verify(args.out, blocks, vectors, steps);
    return took;
  });
  report(what, blocks, per_group, bytes, us);
  for (void* p : {(void*)args.counters, (void*)args.state, (void*)args.out})
    check(cudaFree(p), "freeing");
}

template <int kRanks, bool kCopies>
void measure_cluster(int blocks, int bytes) {
  Args args = {nullptr, nullptr, allocate<unsigned>(blocks), kRanks, bytes / 16, 0};
  const int shared = 128 + 2 * bytes + 2 * bytes / kRanks;
  const auto kernel = through_cluster<kRanks, kCopies>;
  if (kRanks > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "asking for clusters of 16");
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared, "the exchange");
  const double us = per_step([&](int steps) {
    args.steps = steps;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kRanks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kBlock);
    config.dynamicSmemBytes = size_t(shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const double took = microseconds(
        [&] { check(cudaLaunchKernelEx(&config, kernel, args), "launching clusters"); });
    verify(args.out, blocks, args.vectors, steps);
    return took;
  });
  report(!bytes    ? "barrier of a cluster"
         : kCopies ? "exchange through a cluster, copies"
                   : "exchange through a cluster",
         blocks, kRanks, bytes, us);
  check(cudaFree(args.out), "freeing");
}

void measure_launches(int blocks) {
  Args args = {nullptr, nullptr, allocate<unsigned>(1), 1, 0, 0};
  const LaunchShape shape = {dim3(blocks), kBlock, 0, false};
  const auto all = [&](int steps, void* stream) {
    for (int i = 0; i < steps; ++i) launch(empty, shape, stream, args, "an empty kernel");
  };
  report("launch", blocks, 1, 0,
         per_step([&](int steps) { return microseconds([&] { all(steps, nullptr); }); }));
#ifndef LSTM_EXT_EMULATED
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "a stream");
  const double us = per_step([&](int steps) {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing");
    all(steps, stream);
    check(cudaStreamEndCapture(stream, &graph), "capturing");
    check(cudaGraphInstantiate(&ready, graph, 0), "a graph");
    check(cudaGraphLaunch(ready, nullptr), "a graph");  // uploads it
    const double took = microseconds([&] { check(cudaGraphLaunch(ready, nullptr), "a graph"); });
    check(cudaGraphExecDestroy(ready), "a graph");
    check(cudaGraphDestroy(graph), "a graph");
    return took;
  });
  report("launch in a graph", blocks, 1, 0, us);
  check(cudaStreamDestroy(stream), "a stream");
#endif
  check(cudaFree(args.out), "freeing");
}

}  // namespace

int main() {
  int device = 0, sm_count = 0, major = 0;
  check(cudaGetDevice(&device), "choosing the device");
  check(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device), "asking");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking");
  const int all = std::min(sm_count / 16 * 16, kMostBlocks);
  measure_launches(all);
#ifndef LSTM_EXT_EMULATED
  measure_l2(grid_sync, "grid.sync", all, all, 0);
#endif
  for (const int per_group : {4, 8, 16, 32, 64, 128}) {
    if (per_group > all) continue;
    const int blocks = all / per_group * per_group;
    measure_l2(through_l2, "barrier through L2", blocks, per_group, 0);
    for (const int bytes : {2 << 10, 4 << 10, 32 << 10, 128 << 10, 256 << 10}) {
      measure_l2(through_l2, "exchange through L2", blocks, per_group, bytes);
      measure_l2(by_words, "exchange, words with their step", blocks, per_group, bytes);
    }
  }
  if (major >= 9)
    for (const int bytes : {0, 1 << 10, 2 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10}) {
      measure_cluster<8, false>(all / 8 * 8, bytes);
      if (all >= 16) measure_cluster<16, false>(all / 16 * 16, bytes);
      if (!bytes) continue;
      measure_cluster<8, true>(all / 8 * 8, bytes);
      if (all >= 16) measure_cluster<16, true>(all / 16 * 16, bytes);
    }
  return 0;
}
