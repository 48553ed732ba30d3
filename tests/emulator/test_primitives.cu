// Each primitive against plain arithmetic. The same file builds for the emulator and (nvcc) for a
// GPU, so that the CPU twins can be compared with the hardware.
//
// test_primitives: all tests, in the emulator with the seed $SEED; exit code 1 if one fails.
// test_primitives NAME: one misuse case, each of which the emulator must notice.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/cluster.cuh"
#include "cuda/primitives.cuh"

using namespace lstm_ext;

namespace {

struct Shape {
  dim3 grid, block;
  size_t smem = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

template <class... P, class... A>
int launch(void (*kernel)(P...), const Shape& shape, A... a) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.smem;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.cooperative) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (int error = cudaLaunchKernelEx(&config, kernel, P(a)...)) return error;
  return cudaDeviceSynchronize();
}

template <class T>
struct Array {
  T* data = nullptr;
  explicit Array(size_t n) {
    if (cudaMallocManaged(&data, n * sizeof(T))) abort();
    memset(static_cast<void*>(data), 0, n * sizeof(T));
  }
  ~Array() { cudaFree(data); }
  T& operator[](size_t i) { return data[i]; }
};

bool report(const char* name, bool ok, double error = 0) {
  printf("%-32s error %.1e  %s\n", name, error, ok ? "ok" : "FAIL");
  return ok;
}

float random_value() { return float(rand()) / float(RAND_MAX) - 0.5f; }

// ---- tensor cores: D [16][8] = 1 + A [16][K] B [K][8]

enum Load { kByHand, kLdmatrix, kLdmatrixTrans };

template <class T>
__global__ void product_16(const T* A, const T* B, float* D, int load) {
  DYNAMIC_SHARED(smem);
  T* a_row = reinterpret_cast<T*>(smem);  // [m][k]
  T* a_col = a_row + 256;                 // [k][m]
  T* b_row = a_col + 256;                 // [k][n]
  T* b_col = b_row + 128;                 // [n][k]
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) a_row[i] = a_col[i % 16 * 16 + i / 16] = A[i];
  for (int i = lane; i < 128; i += 32) b_row[i] = b_col[i % 8 * 16 + i / 8] = B[i];
  __syncwarp();
  uint32_t a[4], b4[4];
  if (load == kByHand) {
    for (int i = 0; i < 4; ++i) {
      const T* p = A + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      a[i] = pack2<T>(float(p[0]), float(p[1]));
    }
    for (int i = 0; i < 2; ++i) {
      const T* p = B + (2 * t + i * 8) * 8 + g;
      b4[i] = pack2<T>(float(p[0]), float(p[8]));
    }
  } else {
    const int m = lane / 8, r = lane % 8;  // this lane names row r of matrix m
    if (load == kLdmatrix) {
      ldmatrix_x4(a, a_row + (r + m % 2 * 8) * 16 + m / 2 * 8);
      ldmatrix_x4(b4, b_col + r * 16 + m % 2 * 8);
    } else {
      ldmatrix_x4_trans(a, a_col + (r + m / 2 * 8) * 16 + m % 2 * 8);
      ldmatrix_x4_trans(b4, b_row + (r + m % 2 * 8) * 8);
    }
  }
  const uint32_t b[2] = {b4[0], b4[1]};
  float d[4] = {1, 1, 1, 1};  // it accumulates
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) D[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

__global__ void product_8(const float* A, const float* B, float* D) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = tf32_operand(A[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b[i] = to_tf32(B[(t + i * 4) * 8 + g]);
  float d[4] = {1, 1, 1, 1};
  mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) D[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

double tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x1000) & 0xffffe000u;
  memcpy(&x, &bits, 4);
  return x;
}

template <class A, class B>
double worst(const float* D, int K, A a, B b) {
  double error = 0;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      double sum = 1;
      for (int k = 0; k < K; ++k) sum += a(r * K + k) * b(k * 8 + c);
      error = fmax(error, fabs(sum - D[r * 8 + c]));
    }
  return error;
}

template <class T>
bool test_product_16(const char* type) {
  bool ok = true;
  Array<T> A(256), B(128);
  Array<float> D(128);
  const char* loads[] = {"by hand", "ldmatrix", "ldmatrix.trans"};
  for (int load = 0; load < 3; ++load) {
    for (int i = 0; i < 256; ++i) A[i] = T(random_value());
    for (int i = 0; i < 128; ++i) B[i] = T(random_value());
    const int rc = launch(product_16<T>, {dim3(1), dim3(32), 1536}, A.data, B.data, D.data, load);
    const double error = worst(
        D.data, 16, [&](int i) { return double(float(A[i])); },
        [&](int i) { return double(float(B[i])); });
    char name[64];
    snprintf(name, sizeof name, "mma %s %s", type, loads[load]);
    ok &= report(name, rc == 0 && error < 1e-6, error);
  }
  return ok;
}

bool test_product_8() {
  Array<float> A(128), B(64), D(128);
  for (int i = 0; i < 128; ++i) A[i] = random_value();
  for (int i = 0; i < 64; ++i) B[i] = random_value();
  const int rc = launch(product_8, {dim3(1), dim3(32)}, A.data, B.data, D.data);
  const double error =
      worst(D.data, 8, [&](int i) { return tf32(A[i]); }, [&](int i) { return tf32(B[i]); });
  return report("mma tf32", rc == 0 && error < 1e-6, error);
}

// ---- pairs of 16-bit floats

__global__ void pairs(float* out) {
  const __half2 h = __hfma2(__floats2half2_rn(1.5f, -2.f), __floats2half2_rn(3.f, 0.25f),
                            __floats2half2_rn(0.5f, 1e-3f));
  const __nv_bfloat162 b =
      __hadd2(__hmul2(__floats2bfloat162_rn(1.5f, -2.f), __floats2bfloat162_rn(3.f, 0.25f)),
              __floats2bfloat162_rn(0.5f, 256.f));
  out[0] = __low2float(h);
  out[1] = __high2float(h);
  out[2] = __low2float(b);
  out[3] = __high2float(b);
}

bool test_pairs() {
  Array<float> out(4);
  const int rc = launch(pairs, {dim3(1), dim3(1)}, out.data);
  // 255.5 is no bf16: ties to even
  const double error =
      fabs(out[0] - 5) + fabs(out[1] + 0.499f) + fabs(out[2] - 5) + fabs(out[3] - 256);
  return report("half2, bf16x2", rc == 0 && error < 3e-4, error);
}

// ---- shuffles: of a full warp, of the last warp with 13 lanes, and of some lanes

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x % 32, n = threadIdx.x < 32 ? 32 : 13;
  const unsigned mask = n == 32 ? ~0u : (1u << n) - 1;
  const int from_left = __shfl_up_sync(mask, lane, 1), first = __shfl_sync(mask, 7 * lane, 3);
  int sum = lane;
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(mask, sum, bits & (n == 32 ? 31 : 0));
  int part = -1;
  if (lane % 2) part = __shfl_down_sync(0xaaaaaaaau & mask, lane, 2, 4);
  int* o = out + 4 * threadIdx.x;
  o[0] = from_left;
  o[1] = first;
  o[2] = n == 32 ? sum : 496;
  o[3] = part;
}

bool test_shuffles() {
  Array<int> out(4 * 45);
  int bad = launch(shuffles, {dim3(1), dim3(45)}, out.data);
  for (int i = 0; i < 45; ++i) {
    const int lane = i % 32;
    bad += out[4 * i] != (lane ? lane - 1 : 0);
    bad += out[4 * i + 1] != 21;
    bad += out[4 * i + 2] != 496;
    // Groups of four: lane 1 reads lane 3, lane 3 itself. Lane 12 of 13 is the last: no lane 15.
    if (i < 44) bad += out[4 * i + 3] != (lane % 2 ? lane | 2 : -1);
  }
  return report("shuffles", !bad, bad);
}

// ---- a barrier of the grid: in each round every block reads what all others wrote in the last

enum GridMode { kGridRight, kGridNoWait, kGridEarly, kGridForever };
constexpr int kGridRounds = 20;

// sums: [2][blocks], by turns. Block b: sum of all its block's threads' values.
__global__ void rounds(unsigned* counter, unsigned* sums, int mode) {
  const unsigned n = gridDim.x, block = blockIdx.x;
  if (threadIdx.x == 0) sums[block] = block;
  for (int i = 1; i <= kGridRounds; ++i) {
    const unsigned* last = sums + (i - 1) % 2 * n;
    __syncthreads();
    if (threadIdx.x == 0) {
      // one round too early: the sums of the last round may still be on their way
      const unsigned missing = mode == kGridEarly ? n : 0, more = mode == kGridForever ? 1 : 0;
      arrive_at(counter);
      if (mode != kGridNoWait) wait_until(counter, i * n - missing + more);
    }
    __syncthreads();
    unsigned sum = 0;
    for (unsigned b = threadIdx.x; b < n; b += 32) sum += last[b];
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    if (threadIdx.x == 0) sums[i % 2 * n + block] = sum % 1009 + block;
  }
}

bool test_rounds(int mode, const char* name) {
  constexpr unsigned kBlocks = 6;
  Array<unsigned> counter(1), sums(2 * kBlocks);
  unsigned want[kBlocks], bad = 0;
  for (unsigned b = 0; b < kBlocks; ++b) want[b] = b;
  for (int i = 0; i < kGridRounds; ++i) {
    unsigned sum = 0;
    for (unsigned w : want) sum += w;
    for (unsigned b = 0; b < kBlocks; ++b) want[b] = sum % 1009 + b;
  }
  bad += launch(rounds, {dim3(kBlocks), dim3(32), 0, 1, true}, counter.data, sums.data, mode);
  for (unsigned b = 0; b < kBlocks; ++b) bad += sums[kGridRounds % 2 * kBlocks + b] != want[b];
  return report(name, !bad, bad);
}

// ---- clusters: a ring. Each block sends to its right neighbour (st.async, or a bulk copy of a
// letter of its own), which signals back that the one buffer is free (remote arrive); at the end
// every block reads a peer's memory directly.

enum RingMode {
  kRight,
  kNoWait,
  kNoFree,
  kNoInitSync,
  kNoEndSync,
  kNoExpect,
  kSendAtEnd,
  kCopies,
  kCopiesTooEarly,  // the letter is written again while it may be on its way
  kCopiesUnseen     // without copies_see()
};
constexpr int kRounds = 6;

__global__ void ring(unsigned* out, int mode) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  DYNAMIC_SHARED(smem);
  uint4* buffer = reinterpret_cast<uint4*>(smem);            // [32]
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + 512);  // data is here
  uint64_t* free_again = full + 1;                           // the neighbour's buffer is free
  unsigned* result = reinterpret_cast<unsigned*>(smem + 528);
  uint4* letter = reinterpret_cast<uint4*>(smem + 640);  // [32]
  const unsigned n = cluster_size(), rank = cluster_rank(), lane = threadIdx.x;
  const unsigned right = (rank + 1) % n, left = (rank + n - 1) % n;
  const shared_addr to = map_to_rank(shared_address(buffer + lane), right);
  const shared_addr to_full = map_to_rank(shared_address(full), right);
  if (lane == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(free_again, 32);
    fence_mbarrier_init();
  }
  __syncwarp();
  if (mode != kNoInitSync) cluster_sync();
  unsigned sum = 0;
  for (unsigned i = 0; i < kRounds; ++i) {
    if (lane == 0 && mode != kNoExpect) mbarrier_arrive_expect_tx(full, 512);
    if (lane == 0 && mode == kNoExpect) mbarrier_arrive(full);
    const unsigned v = 1000 * blockIdx.x + 100 * i + lane;
    if (mode == kCopiesTooEarly) letter[lane] = make_uint4(v, v, v, v);
    if (i > 0 && mode != kNoFree) mbarrier_wait(free_again, (i - 1) & 1);
    if (mode >= kCopies) {
      letter[lane] = make_uint4(v, v, v, v);
      if (mode != kCopiesUnseen) copies_see();
      __syncwarp();
      if (lane == 0) copy_async(to, letter, 512, to_full);
    } else {
      st_async(to, make_uint4(v, v, v, v), to_full);
    }
    if (mode != kNoWait) mbarrier_wait(full, i & 1);
    sum += buffer[31 - lane].w * (i + 1);  // another lane's peer wrote it
    mbarrier_arrive_remote(map_to_rank(shared_address(free_again), left));
  }
  if (lane == 0) *result = sum;
  mbarrier_wait(free_again, (kRounds - 1) & 1);
  __syncwarp();
  cluster_sync();
#if defined(LSTM_EXT_EMULATED)
  // Certainly too late; relaxed, so that TSan sees no order in it.
  const auto& peers = emu::cur->b->cluster->blocks;
  while (mode == kNoEndSync && !rank && peers[3]->running.load(std::memory_order_relaxed))
    emu::spin();
#endif
  out[blockIdx.x * 32 + lane] = sum + *map_shared_rank(result, (rank + 3) % n);
  if (mode == kSendAtEnd) st_async(to, make_uint4(0, 0, 0, 0), to_full);
  if (mode != kNoEndSync) cluster_sync();  // peers read `result`
#endif
}

unsigned ring_sum(int size, int block, int lane) {
  const int from = block / size * size + (block + size - 1) % size;
  unsigned sum = 0;
  for (int i = 0; i < kRounds; ++i) sum += unsigned(1000 * from + 100 * i + 31 - lane) * (i + 1);
  return sum;
}

bool test_ring(int mode, int clusters, int size, const char* name) {
  const int n = clusters * size;
  Array<unsigned> out(n * 32);
  if (size > 8) cudaFuncSetAttribute(ring, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int bad = launch(ring, {dim3(n), dim3(32), 1152, unsigned(size)}, out.data, mode);
  for (int b = 0; b < n; ++b)
    for (int l = 0; l < 32; ++l) {
      const unsigned peer = ring_sum(size, b / size * size + (b + 3) % size, 0);
      bad += out[b * 32 + l] != ring_sum(size, b, l) + peer;
    }
  return report(name, !bad, bad);
}

// ---- misuse

#if defined(LSTM_EXT_EMULATED)

int deep(int n) {
  volatile char frame[1024];
  frame[0] = char(n);
  return n ? deep(n - 1) + frame[0] : 0;
}

enum Misuse {
  kUninitialised,
  kTooManyArrivals,
  kOverrun,
  kBadRank,
  kArriveOnly,
  kDivergent,
  kDeadlock,
  kMisalignedMatrix,
  kMisalignedStore,
  kStackOverflow,
  kNullPointer
};

__global__ void misuse(int what) {
  DYNAMIC_SHARED(smem);
  uint64_t* bar = reinterpret_cast<uint64_t*>(smem);
  volatile unsigned char* bytes = smem;
  uint32_t r[4];
  switch (what) {
    case kUninitialised:
      return mbarrier_arrive(bar);
    case kTooManyArrivals:
      mbarrier_init(bar, 2);
      mbarrier_arrive_expect_tx(bar, 16);
      mbarrier_arrive(bar);
      return mbarrier_arrive(bar);
    case kOverrun:
      bytes[4096] = 1;
      return;
    case kBadRank:
      map_to_rank(shared_address(smem), 1);
      return;
    case kArriveOnly:
      return cluster_arrive();
    case kDivergent:
      if (threadIdx.x == 0) return __syncthreads();
      return cluster_sync();
    case kDeadlock:
      mbarrier_init(bar, 1);
      return mbarrier_wait(bar, 0);
    case kMisalignedMatrix:
      return ldmatrix_x4(r, smem + 8);
    case kMisalignedStore:
      mbarrier_init(bar, 1);
      return st_async(shared_address(smem + 24), make_uint4(0, 0, 0, 0), shared_address(bar));
    case kStackOverflow:
      deep(10000);
      return;
    case kNullPointer: {
      volatile int* volatile null = nullptr;
      *null = 1;
    }
  }
}

int run_misuse(const char* name) {
  const char* rings[] = {"no-wait",     "no-free",   "no-init-sync",
                         "no-end-sync", "no-expect", "send-at-end"};
  if (!strcmp(name, "copies-too-early")) return !test_ring(kCopiesTooEarly, 1, 8, name);
  if (!strcmp(name, "copies-unseen")) return !test_ring(kCopiesUnseen, 1, 8, name);
  const char* grids[] = {"grid-no-wait", "grid-early", "grid-forever"};
  const char* others[] = {"uninitialised",  "too-many-arrivals", "overrun",
                          "bad-rank",       "arrive-only",       "divergent",
                          "deadlock",       "misaligned-matrix", "misaligned-store",
                          "stack-overflow", "null-pointer"};
  for (int i = 0; i < 6; ++i)
    if (!strcmp(name, rings[i])) return !test_ring(kNoWait + i, 1, 8, name);
  for (int i = 0; i < 3; ++i)
    if (!strcmp(name, grids[i])) return !test_rounds(kGridNoWait + i, name);
  for (int i = 0; i < 11; ++i) {
    const unsigned threads = i == kDivergent || i == kMisalignedMatrix ? 32 : 1;
    if (!strcmp(name, others[i])) return launch(misuse, {dim3(1), dim3(threads), 4096}, i);
  }
  fprintf(stderr, "unknown case %s\n", name);
  return 2;
}

#endif

}  // namespace

int main(int argc, char** argv) {
#if defined(LSTM_EXT_EMULATED)
  emu::g_seed = getenv("SEED") ? strtoull(getenv("SEED"), nullptr, 10) : 0;
  if (argc > 1) return run_misuse(argv[1]);
#else
  (void)argc, (void)argv;
#endif
  bool ok = test_pairs();
  ok &= test_product_16<__nv_bfloat16>("bf16");
  ok &= test_product_16<__half>("fp16");
  ok &= test_product_8();
  ok &= test_shuffles();
  ok &= test_rounds(kGridRight, "barrier of the grid");
  ok &= test_ring(kRight, 1, 8, "cluster ring");
  ok &= test_ring(kRight, 5, 8, "cluster ring, 5 clusters");
  ok &= test_ring(kRight, 1, 16, "cluster ring of 16");
  ok &= test_ring(kCopies, 3, 8, "cluster ring of copies");
  ok &= test_ring(kCopies, 1, 16, "cluster ring of copies, 16");
  return !ok;
}
