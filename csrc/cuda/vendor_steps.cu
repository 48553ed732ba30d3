#include "cuda/backward_cells.cuh"
#include "cuda/forward_cells.cuh"
#include "cuda/vendor.h"
#include "cuda/vendor_steps.h"

namespace lstm_ext {
namespace {

// ---- all of a step but its product: bound by memory
// ------------------------------------------------------------------------------------------------
//
// A thread has a unit, and one after another the sequences of a group: a warp reads and writes
// whole lines, each number once. Bytes of a unit and sequence, in half types: forward reads the
// gates' gx and sums (16 each) and c (4), and writes the gates (16), c (4 and 4), y and h for the
// next product (2 each), 64 in all; backward reads the gates (16), two c (8), dy (2), the sum and
// dc (4 each), and writes dc (4) and the gates' gradients, for later and for the next product (8
// each), 54 in all. What passes between the launches of a step can stay in L2: 26 and 20 of them.

// Twice the registers for sums of twice the size.
template <class Arithmetic>
constexpr int kBlocks = kVendorBlocks * 4 / int(sizeof(typename Arithmetic::Acc));

template <class Arithmetic, bool kVariants>
__global__ void __launch_bounds__(kThreads, kBlocks<Arithmetic>)
    forward_after_product(const __grid_constant__ ForwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  const BlockPlace place(args.shape, args.steps.B);
  const ForwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int i = args.shape.first, H = args.H, K = args.K, B = walk.B();
  const int unit = place.slice * kThreads + int(threadIdx.x);
  if (unit >= H) return;
  const T* state = as<T>(d.state) + int64_t(i % 2) * B * K;
  T* next = as<T>(d.state) + int64_t((i + 1) % 2) * B * K;
  const ForwardUnit<Arithmetic, kVariants> cell(args, d, walk, unit);
  for (int b = place.row_first; b < place.row_end; ++b) {
    const int length = walk.length(b);
    const Turn turn = walk.turn(walk.step_at(i), b, length);
    const bool reset_follows = i + 1 < walk.T() && walk.resets(walk.step_at(i + 1), b, length);
    Acc& kept = as<Acc>(d.cells)[at(b, H, unit)];
    const auto in = cell.load(turn, i == 0 ? cell.first_c(b) : kept, reset_follows);
    Acc sum[4] = {}, c;
    if (turn.active)
      for (int gate = 0; gate < 4; ++gate)
        sum[gate] = as<Acc>(d.product)[at(b, 4 * H, gate * H + unit)];
    const auto result = cell.compute(turn, sum, in, c, [&] { return state[at(b, K, unit)]; });
    cell.store(turn, result, c);
    kept = c;
    if (i + 1 < walk.T()) next[at(b, K, unit)] = result.next;
  }
}

template <class Arithmetic, bool kVariants>
__global__ void __launch_bounds__(kThreads, kBlocks<Arithmetic>)
    backward_after_product(const __grid_constant__ BackwardArgs args) {
  using T = typename Arithmetic::Element;
  using Acc = typename Arithmetic::Acc;
  const BlockPlace place(args.shape, args.steps.B);
  const BackwardArgs::Direction& d = args.direction[place.direction];
  const Walk walk(args.steps, d.reverse);
  const int j = args.shape.first, H = args.H, K = args.K;
  const int unit = place.slice * kThreads + int(threadIdx.x);
  if (unit >= H) return;
  T* out = as<T>(d.state) + int64_t(j % 2) * walk.B() * K;
  const bool carried = carries<kVariants>(d, walk);
  const BackwardUnit<Arithmetic, kVariants> cell(args, d, walk, unit);
  for (int b = place.row_first; b < place.row_end; ++b) {
    const Turn turn = turn_back(walk, j, b);
    const auto in = cell.load(turn);
    const int64_t here = at(b, H, unit);
    const Acc product = j > 0 ? as<Acc>(d.product)[here] : Acc(0);
    Acc dc = j > 0 ? as<Acc>(d.cells)[here] : cell.first_dc(b);
    Acc carry = carried && j > 0 ? as<Acc>(d.carry)[here] : Acc(0);
    const auto result = cell.compute(j, turn, product, in, dc, carry);
    cell.store(j, turn, result);
    if (carried) as<Acc>(d.carry)[here] = carry;
    if (j == walk.T()) continue;
    as<Acc>(d.cells)[here] = dc;
    for (int gate = 0; gate < 4; ++gate) out[at(b, K, gate * H + unit)] = result.next[gate];
  }
}

// ---- launches
// ------------------------------------------------------------------------------------------------

// choose(Arithmetic()) of the layer's.
template <class Choose>
auto with_arithmetic(const CudaLayer& layer, const Choose& choose) {
  switch (layer.dtype) {
    case Dtype::kFloat64:
      return choose(Scalar<double>());
    case Dtype::kFloat32:
      return layer.tf32 ? choose(Tf32()) : choose(Scalar<float>());
    case Dtype::kFloat16:
      return choose(Tensor16<__half>());
    default:
      return choose(Tensor16<__nv_bfloat16>());
  }
}

// Forward: sums [B, 4H] = h [B, K] W_hh^T. Backward: dh [B, H] = dgates [B, padded(4H)] W_hh, which
// is given transposed. What lies past the end of a row is zero in both factors.
VendorProduct step_product(const CudaLayer& layer, bool backward) {
  make_current(layer.device);
  Product p = rows_product(layer.dtype, layer.tf32, layer.device, layer.steps.B,
                           backward ? layer.H : 4 * layer.H,
                           backward ? padded(4 * layer.H, layer.dtype) : layer.K);
  if (backward && layer.normed) p.ldout = 6 * layer.H;
  return VendorProduct(p);
}

template <class Args>
void take_steps(const CudaLayer& layer, Args& args, int count, bool backward, void (*units)(Args),
                void (*norm)(Args), const LaunchShape& norm_shape, void* workspace) {
  const VendorProduct product = step_product(layer, backward);
  const CudaPlan& plan = layer.plan;
  const LaunchShape unit_shape = {dim3(unsigned(plan.slices * plan.groups * layer.directions)),
                                  kThreads, 0, false};
  const int64_t half = layer.steps.B * int64_t(args.K) * storage_bytes(layer.dtype);
  for (int i = 0; i < count; ++i) {
    // Backward, nothing comes to the first step from one before it.
    for (int k = 0; (!backward || i > 0) && k < layer.directions; ++k) {
      const auto& d = args.direction[k];
      const char* const state = static_cast<const char*>(d.state) + (i + backward) % 2 * half;
      product.run(state, d.w_hh, d.product, workspace, layer.stream);
    }
    args.shape.first = i;
    args.shape.last = i + 1;
    launch(layer.normed ? norm : units, layer.normed ? norm_shape : unit_shape, layer.stream, args,
           "launching a step");
  }
}

}  // namespace

int64_t vendor_steps_workspace(const CudaLayer& layer, bool backward) {
  return layer.steps.B ? step_product(layer, backward).workspace() : 0;
}

void vendor_forward_steps(const CudaLayer& layer, ForwardArgs& args, int count, ForwardKernel norm,
                          const LaunchShape& norm_shape, void* workspace) {
  const ForwardKernel units = with_arithmetic(layer, [&](auto arithmetic) -> ForwardKernel {
    using Arithmetic = decltype(arithmetic);
    return layer.variants ? forward_after_product<Arithmetic, true>
                          : forward_after_product<Arithmetic, false>;
  });
  take_steps(layer, args, count, false, units, norm, norm_shape, workspace);
}

void vendor_backward_steps(const CudaLayer& layer, BackwardArgs& args, int count,
                           BackwardKernel norm, const LaunchShape& norm_shape, void* workspace) {
  const BackwardKernel units = with_arithmetic(layer, [&](auto arithmetic) -> BackwardKernel {
    using Arithmetic = decltype(arithmetic);
    return layer.variants ? backward_after_product<Arithmetic, true>
                          : backward_after_product<Arithmetic, false>;
  });
  take_steps(layer, args, count, true, units, norm, norm_shape, workspace);
}

}  // namespace lstm_ext
