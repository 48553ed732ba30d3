// From a layer's parameters to launches.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/engine.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/scratch.h"
#include "cuda/vendor_steps.h"

namespace lstm_ext {
namespace {

const KernelSet& kernels_of(const CudaLayer& layer) {
  switch (layer.dtype) {
    case Dtype::kFloat64:
      return kernels_float64();
    case Dtype::kFloat32:
      return layer.tf32 ? kernels_tf32() : kernels_float32();
    case Dtype::kFloat16:
      return kernels_float16();
    default:
      return kernels_bfloat16();
  }
}

const ClusterKernelSet& cluster_kernels_of(const CudaLayer& layer) {
  switch (layer.dtype) {
    case Dtype::kFloat32:
      return cluster_kernels_tf32();
    case Dtype::kFloat16:
      return cluster_kernels_float16();
    default:
      return cluster_kernels_bfloat16();  // refuse() has none of float64
  }
}

// What the blocks of one launch meet by: counters, or words of what they exchange
// (forward_exchange.cuh, backward_exchange.cuh).
int64_t counter_words(const CudaLayer& layer, bool backward) {
  const CudaPlan& plan = layer.plan;
  if (plan.family == CudaFamily::kGrid) return plan.groups * kCounterStride;
  if (plan.family != CudaFamily::kTagged) return 0;
  const Tile tile = {plan.m_tiles, plan.n_tiles, plan.held};
  if (backward)
    return plan.groups * 2 * plan.slices * plan.slices *
           (backward_part_bytes(tile, plan.group_rows) / 4);
  const int element = int(storage_bytes(layer.dtype));
  const int64_t box =
      forward_box_bytes(tile, plan.slices, plan.group_rows, layer.K * element, element);
  return plan.groups * 2 * (box / element);
}

bool by_vendor(const CudaLayer& layer) { return layer.plan.family == CudaFamily::kVendor; }

void cut(Cutter& cutter, const CudaLayer& l, bool projection, ForwardArgs::Direction& d) {
  const int64_t storage = storage_bytes(l.dtype), B = l.steps.B;
  d.state = cutter.take(2 * B * l.K * storage);
  d.cells = cutter.take(B * l.H * acc_bytes(l.dtype));
  const bool product = l.normed || by_vendor(l);
  d.product = product ? cutter.take(4 * B * l.H * acc_bytes(l.dtype)) : nullptr;
  d.hidden = projection ? cutter.take(B * padded(l.H, l.dtype) * storage) : nullptr;
  d.counters = static_cast<unsigned*>(cutter.take(counter_words(l, false) * 4));
}
void cut(Cutter& cutter, const CudaLayer& l, bool projection, BackwardArgs::Direction& d) {
  const int64_t storage = storage_bytes(l.dtype), B = l.steps.B;
  d.state = cutter.take(2 * B * padded(4 * l.H, l.dtype) * storage);
  d.cells = cutter.take(B * l.H * acc_bytes(l.dtype));
  const int64_t width = l.normed ? 6 * l.H : by_vendor(l) ? l.H : 0;
  d.product = width ? cutter.take(B * width * acc_bytes(l.dtype)) : nullptr;
  d.carry = cutter.take(B * l.P * acc_bytes(l.dtype));
  d.hidden = projection ? cutter.take(B * l.K * storage) : nullptr;
  d.counters = static_cast<unsigned*>(cutter.take(counter_words(l, true) * 4));
}

// Of all directions; what the vendor's products need lies behind it.
template <class Args>
int64_t pieces_bytes(const CudaLayer& layer, bool projection) {
  Cutter cutter(nullptr);
  for (int i = 0; i < layer.directions; ++i) {
    typename Args::Direction unused{};
    cut(cutter, layer, projection, unused);
  }
  return cutter.used();
}

template <class Args, class Direction>
Args make_args(const CudaLayer& layer, const Direction* directions, bool projection,
               void* workspace) {
  Args args{};
  args.steps = layer.steps;
  args.H = int(layer.H);
  args.P = int(layer.P);
  args.counter_words = counter_words(layer, std::is_same_v<Args, BackwardArgs>);
  args.shape = {int(layer.plan.slices),
                int(layer.plan.groups),
                int(layer.plan.group_rows),
                layer.plan.shared,
                layer.plan.ahead,
                layer.plan.in_l2,
                layer.plan.fetches,
                0,
                0};
  Cutter cutter(workspace);
  for (int i = 0; i < layer.directions; ++i) {
    static_cast<Direction&>(args.direction[i]) = directions[i];
    cut(cutter, layer, projection, args.direction[i]);
  }
  return args;
}

void require_plan(const CudaLayer& layer, bool backward, bool projection) {
  if (layer.directions < 1 || layer.directions > kMaxDirections)
    throw std::invalid_argument("a layer has 1 or 2 directions, got " +
                                std::to_string(layer.directions));
  require_sizes(layer.steps, layer.H, layer.P);
  // 16-byte pieces of a matrix are counted in 32 bits without sign.
  const int64_t row = padded(4 * layer.H, layer.dtype) * storage_bytes(layer.dtype) / 16;
  if (row * std::max(layer.steps.B, layer.P) >= int64_t(1) << 32)
    throw std::invalid_argument("the gates of a step are at most 64 GB");
  const CudaProblem problem = {layer.dtype,    layer.tf32,   backward,         projection,
                               layer.variants, layer.normed, layer.directions, layer.steps.T,
                               layer.steps.B,  layer.H,      layer.P};
  const std::string wrong = refuse(layer.plan, problem);
  if (!wrong.empty())
    throw std::invalid_argument("the plan does not fit the layer: " + wrong + " (" +
                                describe(layer.plan, problem) + ")");
}

void require_range(const CudaLayer& layer, const StepRange& range) {
  const bool all = range.first == 0 && range.last == layer.steps.T;
  const bool part = layer.plan.family == CudaFamily::kCluster && 0 <= range.first &&
                    range.first < range.last && range.last <= layer.steps.T;
  if (!all && !part)
    throw std::invalid_argument("only clusters do a part of the steps, and not an empty one: got " +
                                std::to_string(range.first) + " to " + std::to_string(range.last) +
                                " of " + std::to_string(layer.steps.T));
}

// Enough blocks to fill any device; work: threads that have something to do besides counters.
template <class Args>
void prepare(void (*kernel)(Args), const CudaLayer& layer, const Args& args, int64_t work) {
  work = std::max(work, args.counter_words);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(work, kThreads), 1, 1024);
  launch(kernel, {dim3(unsigned(blocks), unsigned(layer.directions)), kThreads, 0, false},
         layer.stream, args, "starting the recurrence");
}

LaunchShape cell_shape(const CudaLayer& layer) {
  const CudaPlan& plan = layer.plan;
  const auto directions = unsigned(layer.directions);
  const bool tagged = plan.family == CudaFamily::kTagged;
  const dim3 grid = plan.cluster ? dim3(unsigned(plan.cluster * plan.groups), directions)
                    : tagged     ? dim3(unsigned(plan.slices * plan.groups), directions)
                                 : dim3(unsigned(plan.slices * plan.groups) * directions);
  return {grid, kThreads, plan.shared_bytes, tagged || plan.family == CudaFamily::kGrid,
          unsigned(plan.cluster)};
}

// The projection's kernel works on all sequences of a step with tiles of its own.
struct Projection {
  int n_tiles;
  LaunchShape shape;
  BlockShape blocks;
};
Projection plan_projection(const CudaLayer& layer) {
  const Tile tile = kProjectionTiles[layer.steps.B > 8 * kProjectionTiles[0].n];
  const int units = 16 * tile.m;
  const int slices = int(ceil_div(layer.P, units));
  const int groups = int(ceil_div(layer.steps.B, 8 * tile.n));
  return {tile.n,
          {dim3(unsigned(slices) * groups * layer.directions), kThreads,
           partial_bytes(tile.m, units, tile.n, int(acc_bytes(layer.dtype))), false},
          {slices, groups, 8 * tile.n, 0, false, 0, false, 0, 0}};
}

LaunchShape norm_shape(const CudaLayer& layer) {
  return {dim3(unsigned(layer.steps.B), unsigned(layer.directions)), kThreads,
          block_sums_bytes(acc_bytes(layer.dtype)), false};
}

// The kernels of a step. null: not needed.
template <class Kernel>
struct StepKernels {
  Kernel cell;
  Kernel norm;                // after the cell's
  Kernel (*projection)(int);  // the last of a step forward, the first of one backward
};

// A launch a step and kernel, in the pass's order.
template <class Args, class Kernel>
void step_by_step(const CudaLayer& layer, Args& args, int count, const StepKernels<Kernel>& kernels,
                  bool backward) {
  const BlockShape blocks = args.shape;
  const Projection projected = plan_projection(layer);
  for (int i = 0; i < count; ++i) {
    const auto run = [&](Kernel kernel, const LaunchShape& shape, const BlockShape& of) {
      args.shape = of;
      args.shape.first = i;
      args.shape.last = i + 1;
      launch(kernel, shape, layer.stream, args, "launching a step");
    };
    const auto project = [&] {
      if (kernels.projection)
        run(kernels.projection(projected.n_tiles), projected.shape, projected.blocks);
    };
    if (backward) project();
    run(kernels.cell, cell_shape(layer), blocks);
    if (kernels.norm) run(kernels.norm, norm_shape(layer), blocks);
    if (!backward) project();
  }
}

// The kernel of the cell, of the plan's family.
template <class Kernel>
Kernel find_cell(const CudaLayer& layer, Kernel (*plain)(int, int, int),
                 Kernel (*variants)(int, int, int), Kernel (*cluster)(int, int, int),
                 Kernel (*tagged)(int, int, int)) {
  const CudaPlan& plan = layer.plan;
  const auto find = plan.family == CudaFamily::kCluster  ? cluster
                    : plan.family == CudaFamily::kTagged ? tagged
                    : layer.variants                     ? variants
                                                         : plain;
  return find(plan.m_tiles, plan.n_tiles, plan.held);
}

}  // namespace

void require_sizes(const Steps& steps, int64_t H, int64_t P) {
  // Rows and blocks are counted in 32 bits.
  const int64_t limit = int64_t(1) << 30;
  for (const int64_t size : {steps.T, steps.B, H, P})
    if (size < 0 || size > limit)
      throw std::invalid_argument("a size of a layer is at most 2^30, got " + std::to_string(size));
  if (steps.rows >= int64_t(1) << 32)
    throw std::invalid_argument("the steps of all sequences are less than 2^32, got " +
                                std::to_string(steps.rows));
}

int64_t cuda_forward_workspace(const CudaLayer& layer, bool projection) {
  return pieces_bytes<ForwardArgs>(layer, projection) +
         (by_vendor(layer) ? vendor_steps_workspace(layer, false) : 0);
}
int64_t cuda_backward_workspace(const CudaLayer& layer, bool projection) {
  return pieces_bytes<BackwardArgs>(layer, projection) +
         (by_vendor(layer) ? vendor_steps_workspace(layer, true) : 0);
}

void cuda_forward(const CudaLayer& layer, const CudaForwardDirection* directions, void* workspace,
                  StepRange range) {
  const bool projection = directions[0].w_hr;
  require_plan(layer, false, projection);
  require_range(layer, range);
  auto args = make_args<ForwardArgs>(layer, directions, projection, workspace);
  args.K = int(layer.K);
  args.hidden_K = int(padded(layer.H, layer.dtype));
  if (!layer.steps.B) return;
  make_current(layer.device);
  const KernelSet& kernels = kernels_of(layer);
  const CudaPlan& plan = layer.plan;
  const bool clusters = plan.family == CudaFamily::kCluster;
  const int T = int(layer.steps.T);
  // A cluster begins by itself.
  if (!clusters || !T) prepare(kernels.forward_prepare, layer, args, 32 * layer.steps.B);
  if (!T) return;
  if (by_vendor(layer)) {
    void* const scratch = static_cast<char*>(workspace) + pieces_bytes<ForwardArgs>(layer, false);
    return vendor_forward_steps(layer, args, T, kernels.forward_norm, norm_shape(layer), scratch);
  }
  const ClusterKernelSet& resident = cluster_kernels_of(layer);
  const ForwardKernel cell = find_cell(layer, kernels.forward, kernels.forward_variants,
                                       resident.forward, resident.forward_tagged);
  if (plan.family != CudaFamily::kStep) {
    args.shape.first = int(range.first);
    args.shape.last = int(range.last);
    launch(cell, cell_shape(layer), layer.stream, args, "launching the recurrence");
  } else {
    step_by_step<ForwardArgs, ForwardKernel>(layer, args, T,
                                             {cell, layer.normed ? kernels.forward_norm : nullptr,
                                              projection ? kernels.forward_projection : nullptr},
                                             false);
  }
}

void cuda_backward(const CudaLayer& layer, const CudaBackwardDirection* directions, void* workspace,
                   StepRange range) {
  const bool projection = directions[0].w_hr;
  require_plan(layer, true, projection);
  require_range(layer, range);
  auto args = make_args<BackwardArgs>(layer, directions, projection, workspace);
  args.K = int(padded(4 * layer.H, layer.dtype));
  args.hidden_K = int(layer.K);
  if (!layer.steps.B) return;
  make_current(layer.device);
  const KernelSet& kernels = kernels_of(layer);
  const CudaPlan& plan = layer.plan;
  const bool clusters = plan.family == CudaFamily::kCluster;
  const int T = int(layer.steps.T);
  // The product that makes dh0 is a step of its own.
  bool final = T == 0, h_prev = false;
  for (int i = 0; i < layer.directions; ++i) {
    final = final || directions[i].dh0;
    h_prev = h_prev || directions[i].h_prev;
  }
  const int count = T + final;
  // A cluster begins by itself.
  if (!clusters || (h_prev && range.first == 0))
    prepare(kernels.backward_prepare, layer, args, 32 * std::max<int64_t>(T, 1) * layer.steps.B);
  if (by_vendor(layer)) {
    void* const scratch = static_cast<char*>(workspace) + pieces_bytes<BackwardArgs>(layer, false);
    return vendor_backward_steps(layer, args, count, kernels.backward_norm, norm_shape(layer),
                                 scratch);
  }
  const ClusterKernelSet& resident = cluster_kernels_of(layer);
  const BackwardKernel cell = find_cell(layer, kernels.backward, kernels.backward_variants,
                                        resident.backward, resident.backward_tagged);
  if (plan.family != CudaFamily::kStep) {
    args.shape.first = int(range.first);
    args.shape.last = range.last == T ? count : int(range.last);
    launch(cell, cell_shape(layer), layer.stream, args, "launching the recurrence");
  } else {
    step_by_step<BackwardArgs, BackwardKernel>(
        layer, args, count,
        {cell, layer.normed ? kernels.backward_norm : nullptr,
         projection ? kernels.backward_projection : nullptr},
        true);
  }
}

}  // namespace lstm_ext
