#include <algorithm>

#include "cuda/arithmetic.cuh"
#include "cuda/arrange.h"
#include "cuda/launch.h"
#include "cuda/primitives.cuh"

namespace lstm_ext {
namespace {

constexpr int kTile = 32;  // rows and columns of a square that a block turns at a time
constexpr int kSquareThreads = 256;
constexpr int kSumLanes = 16;  // threads that share a column's rows
constexpr int kSumAhead = 8;   // of a thread's rows, on their way at once
constexpr int kRoundThreads = 256;
constexpr int64_t kMostBlocks = 8192;  // each goes on to further squares or elements

struct ArrangeArgs : CudaArrangement {
  const void* m;
  void* out;
};
struct SumArgs {
  const void* m;
  int64_t rows, columns;
  void *first, *second;
};

// A thread has a column of out's square, and reads m along its rows, whichever way it is turned.
template <class T>
__global__ void __launch_bounds__(kSquareThreads)
    arrange_rows(const __grid_constant__ ArrangeArgs args) {
  DYNAMIC_SHARED(memory);
  T* const square = reinterpret_cast<T*>(memory);  // [kTile][kTile + 1]
  const T* const m = static_cast<const T*>(args.m);
  T* const out = static_cast<T*>(args.out);
  const T zero = T();
  const int64_t out_rows = args.transposed ? args.columns : args.rows;
  const int64_t across = (args.width + kTile - 1) / kTile;
  const int64_t squares = across * ((out_rows + kTile - 1) / kTile);
  const int x = int(threadIdx.x) % kTile, y0 = int(threadIdx.x) / kTile;
  for (int64_t k = blockIdx.x; k < squares; k += gridDim.x) {
    const int64_t row = k / across * kTile, column = k % across * kTile;  // of out
    for (int y = y0; y < kTile; y += kSquareThreads / kTile) {
      const int64_t i = args.transposed ? column + y : row + y;  // of m
      const int64_t j = args.transposed ? row + x : column + x;
      const bool inside = i < args.rows && j < args.columns;
      square[y * (kTile + 1) + x] = inside ? m[i * args.columns + j] : zero;
    }
    __syncthreads();
    for (int y = y0; y < kTile; y += kSquareThreads / kTile) {
      if (row + y < out_rows && column + x < args.width) {
        const int at = args.transposed ? x * (kTile + 1) + y : y * (kTile + 1) + x;
        out[(row + y) * args.width + column + x] = square[at];
      }
    }
    __syncthreads();
  }
}

// A block has kTile columns; each of kSumLanes threads of a column adds up every kSumLanes-th row.
template <class T>
__global__ void __launch_bounds__(kTile* kSumLanes) sum_rows(const __grid_constant__ SumArgs args) {
  using Acc = decltype(to_acc(T()));
  DYNAMIC_SHARED(memory);
  Acc* const parts = reinterpret_cast<Acc*>(memory);  // [kSumLanes][kTile]
  const int x = int(threadIdx.x) % kTile, lane = int(threadIdx.x) / kTile;
  const int64_t column = int64_t(blockIdx.x) * kTile + x;
  const T* const m = static_cast<const T*>(args.m) + column;
  Acc sums[kSumAhead] = {};
  if (column < args.columns) {
    for (int64_t row = lane; row < args.rows; row += kSumLanes * kSumAhead) {
#pragma unroll
      for (int k = 0; k < kSumAhead; ++k) {
        const int64_t at = row + k * kSumLanes;
        if (at < args.rows) sums[k] += to_acc(m[at * args.columns]);
      }
    }
  }
  Acc sum = 0;
  for (const Acc part : sums) sum += part;
  parts[lane * kTile + x] = sum;
  __syncthreads();
  if (lane || column >= args.columns) return;
  for (int k = 1; k < kSumLanes; ++k) sum += parts[k * kTile + x];
  if (args.first) static_cast<T*>(args.first)[column] = from_acc<T>(sum);
  if (args.second) static_cast<T*>(args.second)[column] = from_acc<T>(sum);
}

struct RoundArgs {
  const void* m;
  void* out;
  int64_t count;
};

// A thread has every so many elements, as many as there are threads.
template <class T>
__global__ void __launch_bounds__(kRoundThreads) round_all(const __grid_constant__ RoundArgs args) {
  using Acc = decltype(to_acc(T()));
  const int64_t threads = int64_t(gridDim.x) * kRoundThreads;
  for (int64_t k = int64_t(blockIdx.x) * kRoundThreads + threadIdx.x; k < args.count; k += threads)
    static_cast<T*>(args.out)[k] = from_acc<T>(static_cast<const Acc*>(args.m)[k]);
}

struct PaddingArgs {
  Steps steps;
  const void* m;
  int64_t columns;
  void* out;
};

// body(row, column, active): whether the row is no padding. A warp per row.
template <class Body>
LSTM_EXT_DEVICE void for_rows(const Steps& steps, int64_t columns, const Body& body) {
  const bool batch_first = steps.stride_t == 1;
  const int64_t across = batch_first ? steps.T : steps.B;
  const int64_t warps = int64_t(gridDim.x) * (kRoundThreads / 32);
  for (int64_t row = (int64_t(blockIdx.x) * kRoundThreads + threadIdx.x) / 32; row < steps.rows;
       row += warps) {
    const int64_t outer = row / across, inner = row % across;
    const bool active =
        steps.offsets || (batch_first ? steps.active(inner, outer) : steps.active(outer, inner));
    for (int64_t k = threadIdx.x % 32; k < columns; k += 32) body(row, k, active);
  }
}

template <class T>
__global__ void __launch_bounds__(kRoundThreads)
    clear_padding(const __grid_constant__ PaddingArgs args) {
  const T zero = T();
  for_rows(args.steps, args.columns, [&](int64_t row, int64_t column, bool active) {
    const int64_t at = row * args.columns + column;
    static_cast<T*>(args.out)[at] = active ? static_cast<const T*>(args.m)[at] : zero;
  });
}

struct CellOutputArgs {
  Steps steps;
  const void *gates, *c_seq;
  int64_t H;
  void* out;
};

template <class T>
__global__ void __launch_bounds__(kRoundThreads)
    cell_outputs(const __grid_constant__ CellOutputArgs args) {
  using Acc = decltype(to_acc(T()));
  const int64_t H = args.H;
  for_rows(args.steps, H, [&](int64_t row, int64_t unit, bool active) {
    const Acc o = static_cast<const Acc*>(args.gates)[row * 4 * H + 3 * H + unit];
    const Acc c = static_cast<const Acc*>(args.c_seq)[row * H + unit];
    const Acc out = active ? o * ExactMath<Acc>::tanh(c) : Acc(0);
    static_cast<T*>(args.out)[row * H + unit] = from_acc<T>(out);
  });
}

// run(T()) of the element's type.
template <class Run>
void with_element(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat64:
      return run(double());
    case Dtype::kFloat32:
      return run(float());
    case Dtype::kFloat16:
      return run(__half());
    default:
      return run(__nv_bfloat16());
  }
}

unsigned squares_of(int64_t rows, int64_t columns) {
  const auto tiles = [](int64_t n) { return (n + kTile - 1) / kTile; };
  return unsigned(std::min(kMostBlocks, tiles(rows) * tiles(columns)));
}

// Of a warp per row, the blocks.
unsigned warps_of(const Steps& steps) {
  constexpr int64_t rows = kRoundThreads / 32;
  return unsigned(std::min(kMostBlocks, (steps.rows + rows - 1) / rows));
}

}  // namespace

void cuda_make_current(int device) { make_current(device); }

void cuda_arrange(const CudaArrangement& a, const void* m, void* out, void* stream) {
  ArrangeArgs args{};
  static_cast<CudaArrangement&>(args) = a;
  args.m = m;
  args.out = out;
  const unsigned blocks = squares_of(a.transposed ? a.columns : a.rows, a.width);
  if (!blocks) return;
  with_element(a.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = kTile * (kTile + 1) * int64_t(sizeof(T));
    launch(arrange_rows<T>, {dim3(blocks), kSquareThreads, bytes, false}, stream, args,
           "arranging weights");
  });
}

void cuda_sum_rows(Dtype dtype, const void* m, int64_t rows, int64_t columns, void* first,
                   void* second, void* stream) {
  const unsigned blocks = unsigned((columns + kTile - 1) / kTile);
  if (!blocks) return;
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = kTile * kSumLanes * int64_t(sizeof(decltype(to_acc(T()))));
    launch(sum_rows<T>, {dim3(blocks), kTile * kSumLanes, bytes, false}, stream,
           SumArgs{m, rows, columns, first, second}, "adding up rows");
  });
}

void cuda_round(Dtype dtype, const void* m, void* out, int64_t count, void* stream) {
  const unsigned blocks =
      unsigned(std::min(kMostBlocks, (count + kRoundThreads - 1) / kRoundThreads));
  if (!blocks) return;
  with_element(dtype, [&](auto element) {
    launch(round_all<decltype(element)>, {dim3(blocks), kRoundThreads, 0, false}, stream,
           RoundArgs{m, out, count}, "rounding");
  });
}

void cuda_clear_padding(Dtype dtype, const Steps& steps, const void* m, int64_t columns, void* out,
                        void* stream) {
  const unsigned blocks = warps_of(steps);
  if (!blocks) return;
  with_element(dtype, [&](auto element) {
    launch(clear_padding<decltype(element)>, {dim3(blocks), kRoundThreads, 0, false}, stream,
           PaddingArgs{steps, m, columns, out}, "clearing padding");
  });
}

void cuda_cell_outputs(Dtype dtype, const Steps& steps, const void* gates, const void* c_seq,
                       int64_t H, void* out, void* stream) {
  const unsigned blocks = warps_of(steps);
  if (!blocks) return;
  with_element(dtype, [&](auto element) {
    launch(cell_outputs<decltype(element)>, {dim3(blocks), kRoundThreads, 0, false}, stream,
           CellOutputArgs{steps, gates, c_seq, H, out}, "making a cell's outputs anew");
  });
}

void cuda_zero(void* memory, int64_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(memory, 0, size_t(bytes), static_cast<cudaStream_t>(stream)),
             "clearing memory");
}

}  // namespace lstm_ext
