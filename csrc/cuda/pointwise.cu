// Memory-bound: a thread has a unit of a row at a time, neighbours have neighbouring units.
#include <algorithm>

#include "cuda/block.cuh"
#include "cuda/launch.h"
#include "cuda/pointwise.h"

namespace lstm_ext {

constexpr int kCellThreads = 256;
constexpr int64_t kCellBlocks = 4096;  // enough for any GPU; each thread goes on to further units

struct CellForwardArgs : CudaCell {
  void *new_h, *new_c;
};
struct CellBackwardArgs : CudaCell, CudaCellGradients {};

// One unit of one row, read.
template <class T>
struct CellUnit {
  using Math = Cell<ExactMath<T>>;
  int64_t row, unit;
  typename Math::Peephole weights = {};
  bool active, has_peephole;

  LSTM_EXT_DEVICE CellUnit(const CudaCell& cell, int64_t index) {
    row = index / cell.width;
    unit = index % cell.width;
    active = !cell.lengths || cell.lengths[row] > 0;
    has_peephole = cell.peephole;
    if (has_peephole) {
      const T* p = as<T>(cell.peephole) + unit;
      weights = {p[0], p[cell.width], p[2 * cell.width]};
    }
  }
  // The gates, and c after the step.
  LSTM_EXT_DEVICE T state(const CudaCell& cell, T c_prev, typename Math::Gates& s) const {
    const T* a = as<T>(cell.a) + row * 4 * cell.width + unit;
    const typename Math::Gates sums = {a[0], a[cell.width], a[2 * cell.width], a[3 * cell.width]};
    T c;
    with_peephole([&](const auto* peephole) { Math::forward_state(sums, c_prev, s, c, peephole); });
    return c;
  }
  // Calls with the weights or null: 0 times an infinite c is NaN. Not with a pointer that may be
  // either: the weights would have to lie in memory.
  template <class F>
  LSTM_EXT_DEVICE void with_peephole(F&& call) const {
    using Pointer = const typename Math::Peephole*;
    has_peephole ? call(Pointer(&weights)) : call(Pointer(nullptr));
  }
};

template <class T>
__global__ void __launch_bounds__(kCellThreads)
    pointwise_forward(const __grid_constant__ CellForwardArgs args) {
  const int64_t count = args.rows * args.width, stride = int64_t(gridDim.x) * kCellThreads;
  for (int64_t k = int64_t(blockIdx.x) * kCellThreads + threadIdx.x; k < count; k += stride) {
    const CellUnit<T> unit(args, k);
    T h = as<T>(args.h)[k], c = as<T>(args.c)[k];
    if (unit.active) {
      typename CellUnit<T>::Math::Gates s;
      c = unit.state(args, c, s);
      h = CellUnit<T>::Math::forward_output(s, c);
    }
    as<T>(args.new_h)[k] = h;
    as<T>(args.new_c)[k] = c;
  }
}

template <class T>
__global__ void __launch_bounds__(kCellThreads)
    pointwise_backward(const __grid_constant__ CellBackwardArgs args) {
  const int64_t count = args.rows * args.width, stride = int64_t(gridDim.x) * kCellThreads;
  for (int64_t k = int64_t(blockIdx.x) * kCellThreads + threadIdx.x; k < count; k += stride) {
    const CellUnit<T> unit(args, k);
    const T dh = args.dh ? as<T>(args.dh)[k] : T(0);
    T dc = args.dc ? as<T>(args.dc)[k] : T(0);
    const T c_prev = as<T>(args.c)[k];
    typename CellUnit<T>::Math::Gates da = {0, 0, 0, 0};
    T dh0 = dh, c = 0;
    if (unit.active) {
      typename CellUnit<T>::Math::Gates s;
      c = unit.state(args, c_prev, s);
      unit.with_peephole([&](const auto* peephole) {
        CellUnit<T>::Math::backward(s, c, c_prev, dh, dc, da, peephole);
      });
      dh0 = 0;
    }
    T* out = as<T>(args.da) + unit.row * 4 * args.width + unit.unit;
    out[0] = da.i;
    out[args.width] = da.f;
    out[2 * args.width] = da.g;
    out[3 * args.width] = da.o;
    as<T>(args.dh0)[k] = dh0;
    as<T>(args.dc0)[k] = dc;
    if (args.dpeephole) {
      T* dp = as<T>(args.dpeephole) + unit.row * 3 * args.width + unit.unit;
      dp[0] = da.i * c_prev;
      dp[args.width] = da.f * c_prev;
      dp[2 * args.width] = da.o * c;
    }
  }
}

template <class Args>
void launch_cell(void (*kernel)(Args), const Args& args, const char* what) {
  const int64_t count = args.rows * args.width;
  if (!count) return;
  const int64_t blocks = std::min(kCellBlocks, (count + kCellThreads - 1) / kCellThreads);
  launch(kernel, {dim3(unsigned(blocks)), kCellThreads, 0, false}, args.stream, args, what);
}

void cuda_cell_forward(const CudaCell& cell, void* h, void* c) {
  CellForwardArgs args{};
  static_cast<CudaCell&>(args) = cell;
  args.new_h = h;
  args.new_c = c;
  const auto kernel =
      cell.dtype == Dtype::kFloat64 ? pointwise_forward<double> : pointwise_forward<float>;
  launch_cell(kernel, args, "launching the cell's forward");
}

void cuda_cell_backward(const CudaCell& cell, const CudaCellGradients& gradients) {
  CellBackwardArgs args{};
  static_cast<CudaCell&>(args) = cell;
  static_cast<CudaCellGradients&>(args) = gradients;
  const auto kernel =
      cell.dtype == Dtype::kFloat64 ? pointwise_backward<double> : pointwise_backward<float>;
  launch_cell(kernel, args, "launching the cell's backward");
}

}  // namespace lstm_ext
