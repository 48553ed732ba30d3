#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cuda/vendor_plan.h"

namespace lstm_ext {
namespace {

// With the projection's product or the sums of a layer norm, a step is more than one kernel: in one
// launch it would need more than one barrier.
bool steps_apart(const CudaProblem& p) { return p.projection || p.normed; }

struct Tiles {
  const Tile* begin;
  const Tile* end;
};
template <size_t N>
Tiles all(const Tile (&tiles)[N]) {
  return {tiles, tiles + N};
}
// Whichever the device: the kernels of half types and TF32 have these tiles even where they fall
// back to plain arithmetic.
Tiles tiles_of(const CudaProblem& p) {
  const bool scalar = p.dtype == Dtype::kFloat64 || (p.dtype == Dtype::kFloat32 && !p.tf32);
  if (scalar || p.variants) return p.backward ? all(kBackwardFewTiles) : all(kForwardFewTiles);
  return p.backward ? all(kBackwardTensorTiles) : all(kForwardTensorTiles);
}

Tiles cluster_tiles_of(const CudaProblem& p) {
  if (p.dtype == Dtype::kFloat32)
    return p.backward ? all(kBackwardClusterTiles32) : all(kForwardClusterTiles32);
  return p.backward ? all(kBackwardClusterTiles16) : all(kForwardClusterTiles16);
}
const Tile* find(const Tiles& tiles, const CudaPlan& plan) {
  const Tile* tile = std::find_if(tiles.begin, tiles.end, [&](const Tile& t) {
    return t.m == plan.m_tiles && t.n == plan.n_tiles;
  });
  return tile == tiles.end ? nullptr : tile;
}

int64_t base_shared(const CudaProblem& p, const Tile& tile) {
  return partial_bytes(tile.m, units_of(tile.m, p.backward), tile.n, int(acc_bytes(p.dtype)));
}

// Rates in bytes or multiply-adds a microsecond, overheads in microseconds. Fitted to what 1810
// plans took on an H100 SXM, bf16 and TF32, near the fastest of each of 96 shapes, forward and
// backward (bench/results/nvidia-h100-80gb-hbm3/NOTES.md), but for what is marked as a lead; scaled
// by multiprocessors where that is what matters. The plan they choose takes 1.02 times the fastest
// one's time on average.
struct Costs {
  double launch = 1.75;                      // one kernel after another in a stream
  double barrier = 1.11;                     // through global memory
  double cell = 0.93, cell_backward = 1.32;  // loads, the sum over the warps, the cell's functions
  double state_per_sm = 58e3, weights_per_sm = 42e3;  // from L2, all of them reading at once
  double memory_per_sm = 16.8e3;                      // HBM, the same
  // In a grid that streams weights from there, groups and tiles fetch them apart.
  double grid_memory = 1.37;
  double in_l2 = 0.7;            // of L2, for weights that are to stay there; a lead
  double shared_per_sm = 540e3;  // weights that a grid's blocks keep there
  double tensor16 = 0.906e6, tensor32 = 0.494e6;  // per SM
  double fma32 = 0.12e6, fma64 = 0.05e6;          // per SM; leads
  // A cell, and an exchange through distributed shared memory; for each sequence of a group.
  double cluster = 0.67, cluster_backward = 1.31, cluster_sequence = 0.028;
  double cluster_shared_per_sm = 138e3;
  double vendor = 2.2;  // a large product of the vendor's library against those; a lead
  double part = 8;      // of a wavefront: two kernels begin and end, and an event between streams
  double calls = 30;    // what the calling thread takes for it, from Python
};

double macs_per_us(const CudaProblem& p, const CudaProperties& device, const Costs& costs) {
  if (p.dtype == Dtype::kFloat64) return costs.fma64;
  if (!on_tensor_cores(p.dtype, p.tf32, device.major)) return costs.fma32;
  return p.dtype == Dtype::kFloat32 ? costs.tensor32 : costs.tensor16;
}

// Chunks of a warp that has the fewest, that neither registers nor `shared` keep.
int64_t streamed_chunks(const CudaProblem& p, int held, int shared) {
  return chunks_of(p) / kWarps - held - shared;
}

// On tensor cores, with cp.async; the variants' kernels do not.
bool can_stream_ahead(const CudaProblem& p, const CudaProperties& device, const Tile& tile,
                      int held) {
  return device.major >= 8 && on_tensor_cores(p.dtype, p.tf32, device.major) && !p.variants &&
         held == tile.held;
}

// What a step takes in the cost model, and what of the plan follows from tile, family and groups.
// ahead: weights that do not stay are asked for ahead, which takes memory from those that do.
CudaPlan try_plan(const CudaProblem& p, const CudaProperties& device, const Tile& tile,
                  CudaFamily family, int64_t groups, bool ahead = false) {
  const Costs costs;
  CudaPlan plan{};
  plan.family = family;
  plan.m_tiles = tile.m;
  plan.n_tiles = tile.n;
  plan.slices = ceil_div(p.H, units_of(tile.m, p.backward));
  groups = std::max<int64_t>(groups, 1);  // there may be no sequence
  plan.group_rows = std::max<int64_t>(ceil_div(ceil_div(p.B, groups), 8) * 8, 8);
  plan.groups = std::max<int64_t>(ceil_div(p.B, plan.group_rows), 1);
  plan.shared_bytes = base_shared(p, tile);

  const int64_t chunks = chunks_of(p), of_a_warp = ceil_div(chunks, kWarps);
  if (family == CudaFamily::kGrid) {
    if (on_tensor_cores(p.dtype, p.tf32, device.major) && tile.held <= of_a_warp)
      plan.held = tile.held;
    plan.ahead = ahead;
    if (ahead) plan.shared_bytes += kStreamBytes;
    const int64_t room =
        (device.shared_bytes - plan.shared_bytes) / (int64_t(kWarps) * tile.m * kTileBytes);
    plan.shared = int(std::clamp<int64_t>(of_a_warp - plan.held, 0, std::max<int64_t>(room, 0)));
    plan.shared_bytes += int64_t(plan.shared) * kWarps * tile.m * kTileBytes;
  }

  const double row_bytes = double(product_length(p)) * double(storage_bytes(p.dtype));
  const double weights = double(tile.m) * 16 * row_bytes;  // of a block
  const double resident = std::min(
      1.0, double(plan.held + plan.shared) * kWarps / double(std::max<int64_t>(chunks, 1)));
  const double tiles = double(ceil_div(plan.group_rows, 8 * tile.n));
  const double rows = std::min<double>(double(plan.group_rows), tiles * 8 * tile.n);
  const double blocks = double(plan.slices * plan.groups * p.directions);
  const double waves = std::max(1.0, blocks / device.sm_count);
  const double state = rows * row_bytes / costs.state_per_sm;
  const double streamed = tiles * weights * (1 - resident) / costs.weights_per_sm;
  const bool grid = family == CudaFamily::kGrid;
  // Weights that do not fit L2 come from memory once a step, whoever needs them.
  const double all_streamed = double(plan.slices) * weights * p.directions * (1 - resident);
  const int64_t behind = std::max<int64_t>(of_a_warp - plan.held - plan.shared, 0);
  double not_in_l2 = all_streamed > 0.8 * double(device.l2_bytes) ? all_streamed : 0;
  if (ahead) {
    const double stays = std::min(1.0, costs.in_l2 * double(device.l2_bytes) / all_streamed);
    plan.in_l2 = int(double(behind) * stays);
    not_in_l2 = all_streamed * (1 - stays);
  }
  double from_memory = not_in_l2 / (costs.memory_per_sm * device.sm_count);
  if (grid) from_memory *= costs.grid_memory * std::sqrt(double(plan.groups) * tiles);
  // What is streamed ahead is written there and read.
  const double in_shared = double(plan.shared) + (ahead ? 2 * double(behind) : 0);
  const double from_shared = tiles * weights * in_shared * kWarps /
                             double(std::max<int64_t>(chunks, 1)) / costs.shared_per_sm;
  const double math =
      tiles * 8 * tile.n * tile.m * 16 * double(product_length(p)) / macs_per_us(p, device, costs);
  const double cell = p.backward ? costs.cell_backward : costs.cell;
  const double others = state + std::max(from_shared, math) + tiles * cell;
  const double fixed = grid ? costs.barrier : costs.launch;
  const double busy = others + streamed;
  plan.step_us = fixed + std::max(from_memory, grid ? busy : std::ceil(waves) * busy);
  // Through barrier and cell too: they cost what L2 or memory takes to give them.
  if (ahead) plan.step_us = std::max({fixed + others, state + streamed, from_memory});
  return plan;
}

// What a warp of a cluster keeps of the weights, and the bytes of one of it: chunks of k, or in
// backward m-tiles.
struct ClusterWeights {
  int64_t count, bytes;
};
ClusterWeights cluster_weights(const CudaProblem& p, const Tile& tile) {
  if (p.backward)
    return {ceil_div(ceil_div(p.H, 16), kWarps), tile.m * storage_bytes(p.dtype) * kTileBytes};
  const int of_rows = warps_of_rows(tile.m);
  return {ceil_div(chunks_of(p), kWarps / of_rows), tile.m / of_rows * kTileBytes};
}
int64_t base_cluster_shared(const CudaProblem& p, const Tile& tile, int64_t slices,
                            int64_t group_rows) {
  const int element = int(storage_bytes(p.dtype));
  return p.backward ? backward_cluster_bytes(tile, slices, group_rows, element)
                    : forward_cluster_bytes(tile, slices, group_rows, product_length(p) * element,
                                            element);
}

// The same for the cluster family, for groups of so many sequences.
CudaPlan try_cluster_plan(const CudaProblem& p, const CudaProperties& device, const Tile& tile,
                          int64_t group_rows) {
  const Costs costs;
  CudaPlan plan{};
  plan.family = CudaFamily::kCluster;
  plan.m_tiles = tile.m;
  plan.n_tiles = tile.n;
  plan.slices = ceil_div(p.H, units_of(tile.m, p.backward));
  int size = 1;  // st.async is undefined in a cluster of one block
  while (plan.slices > 1 << size) ++size;
  plan.cluster = 1 << size;
  plan.group_rows = group_rows;
  plan.groups = std::max<int64_t>(ceil_div(p.B, group_rows), 1);
  plan.held = tile.held;
  const ClusterWeights weights = cluster_weights(p, tile);
  plan.shared = int(std::max<int64_t>(weights.count - plan.held, 0));
  const int64_t base = base_cluster_shared(p, tile, plan.slices, group_rows);
  const int64_t kept = plan.shared * kWarps * weights.bytes;
  plan.shared_bytes = base + kept;
  if (plan.cluster > kMostBlocksOfCluster || !device.clusters[size]) return plan;  // it cannot run

  const double element = double(storage_bytes(p.dtype)), rows = 8.0 * tile.n;
  const double units = units_of(tile.m, p.backward);
  const double sent = double(plan.slices) *
                      double(p.backward ? backward_part_bytes(tile, group_rows)
                                        : forward_slice_bytes(tile, group_rows, int(element)));
  // Read and written in shared memory: the state by every warp that needs it, the weights, and what
  // is sent or added up.
  const double touched =
      double(kept) + (p.backward
                          ? kWarps * rows * 4 * units * element + 2 * sent
                          : warps_of_rows(tile.m) * rows * double(p.H) * element +
                                2.0 * kWarps / warps_of_rows(tile.m) * tile.n * tile.m * 512);
  const double macs = rows * 4 * units * double(p.H);
  const double waves =
      std::ceil(double(plan.groups * p.directions) / double(device.clusters[size]));
  plan.step_us = waves * ((p.backward ? costs.cluster_backward : costs.cluster) +
                          costs.cluster_sequence * double(group_rows) +
                          std::max(touched / costs.cluster_shared_per_sm,
                                   macs / macs_per_us(p, device, costs)));
  return plan;
}

std::string refuse_cluster(const CudaPlan& plan, const CudaProblem& p, const Tile& tile) {
  // A block without units, or a group without sequences, would receive nothing, and so run ahead of
  // its peers.
  if (plan.cluster < plan.slices || plan.cluster < 2 || plan.cluster > kMostBlocksOfCluster ||
      (plan.cluster & (plan.cluster - 1)) ||
      plan.slices != ceil_div(p.H, units_of(plan.m_tiles, p.backward)))
    return "a cluster has a block for each slice, and is a power of two from 2 to 16";
  if (plan.groups > 1 && (plan.groups - 1) * plan.group_rows >= p.B)
    return "a cluster has no empty group";
  if (plan.group_rows > cluster_rows(tile, p.backward))
    return "a cluster has one tile of sequences";
  if (plan.held != tile.held) return "no kernel holds so many chunks";
  const ClusterWeights weights = cluster_weights(p, tile);
  if (plan.held + plan.shared < weights.count) return "a cluster keeps all of the weights";
  const int64_t base = base_cluster_shared(p, tile, plan.slices, plan.group_rows);
  if (plan.shared < 0 || plan.shared_bytes < base + plan.shared * kWarps * weights.bytes)
    return "shared_bytes is not enough for its parts";
  return "";
}

}  // namespace

bool on_tensor_cores(Dtype dtype, bool tf32, int major) {
  if (dtype == Dtype::kFloat64) return false;
  if (dtype == Dtype::kFloat16) return true;
  if (dtype == Dtype::kFloat32 && !tf32) return false;
  return major >= 8;
}

int64_t padded(int64_t k, Dtype dtype) {
  const int64_t chunk = kChunkBytes / storage_bytes(dtype);
  return ceil_div(k, chunk) * chunk;
}

int64_t product_length(const CudaProblem& p) {
  if (!p.backward) return padded(p.P, p.dtype);
  return p.projection ? padded(p.P, p.dtype) : padded(4 * p.H, p.dtype);
}
int64_t chunks_of(const CudaProblem& p) {
  return product_length(p) * storage_bytes(p.dtype) / kChunkBytes;
}

int units_of(int m_tiles, bool backward) { return backward ? 16 * m_tiles : 4 * m_tiles; }

std::vector<CudaPlan> all_cuda_plans(const CudaProblem& p, const CudaProperties& device) {
  std::vector<CudaPlan> plans;
  const auto add = [&](const CudaPlan& plan) {
    if (plan.shared_bytes <= device.shared_bytes) plans.push_back(plan);
  };
  const Tiles tiles = tiles_of(p);
  for (const Tile* tile = tiles.begin; tile != tiles.end; ++tile) {
    add(try_plan(p, device, *tile, CudaFamily::kStep, ceil_div(p.B, 8 * tile->n)));
    if (steps_apart(p) || p.T < 2) continue;
    const int64_t slices = ceil_div(p.H, units_of(tile->m, p.backward));
    // One block a multiprocessor: all of a cooperative launch must run at once.
    const int64_t most = device.sm_count / (slices * p.directions);
    for (int64_t groups = 1; groups <= std::min(most, ceil_div(p.B, 8)); ++groups) {
      const CudaPlan plan = try_plan(p, device, *tile, CudaFamily::kGrid, groups);
      add(plan);
      // If more of the weights is streamed than would be on its way.
      if (can_stream_ahead(p, device, *tile, plan.held) &&
          streamed_chunks(p, plan.held, plan.shared) > chunks_ahead(tile->m))
        add(try_plan(p, device, *tile, CudaFamily::kGrid, groups, true));
    }
  }
  if (has_vendor_plan(p, device)) add(make_vendor_plan(p, device));
  if (steps_apart(p) || p.variants || p.T < 2 || !on_tensor_cores(p.dtype, p.tf32, device.major))
    return plans;
  const Tiles clusters = cluster_tiles_of(p);
  for (const Tile* tile = clusters.begin; tile != clusters.end; ++tile)
    for (int64_t rows = cluster_rows(*tile, p.backward); rows > 8 * (tile->n / 2);
         rows -= tile->n > 1 ? 8 : 2) {
      const CudaPlan plan = try_cluster_plan(p, device, *tile, rows);
      if (plan.step_us > 0 && rows < std::max<int64_t>(2 * p.B, 3)) add(plan);
    }
  return plans;
}

CudaPlan make_cuda_plan(const CudaProblem& p, const CudaProperties& device) {
  const std::vector<CudaPlan> plans = all_cuda_plans(p, device);
  if (plans.empty())
    throw std::runtime_error("no kernel fits a device with " + std::to_string(device.shared_bytes) +
                             " bytes of shared memory a block");
  const CudaPlan* best = nullptr;
  for (const CudaPlan& plan : plans)
    if (!plan.ahead && (!best || plan.step_us < best->step_us)) best = &plan;
  if (best->family != CudaFamily::kGrid) return *best;
  for (const CudaPlan& plan : plans)
    if (plan.ahead && plan.m_tiles == best->m_tiles && plan.n_tiles == best->n_tiles &&
        plan.groups == best->groups && plan.step_us < best->step_us)
      return plan;
  return *best;
}

CudaWavefront make_cuda_wavefront(const CudaProblem& p, const CudaProperties& device,
                                  int64_t layers, int64_t steps) {
  const Costs costs;
  const CudaPlan best = make_cuda_plan(p, device);
  // The product of a layer's input with its weights over all steps, or backward that of its
  // gradients; the input is as wide as the state, as it is in all layers but the first. It runs on
  // so many multiprocessors, and moves the gates through memory.
  const double macs = 4.0 * double(p.H) * double(p.P) * double(p.B) * double(steps);
  const double bytes = 4.0 * double(p.H) * double(p.B) * double(steps) *
                       double(p.backward ? storage_bytes(p.dtype) : acc_bytes(p.dtype));
  const auto product = [&](double multiprocessors) {
    return std::max(macs / (costs.vendor * macs_per_us(p, device, costs) * multiprocessors),
                    bytes / (costs.memory_per_sm * device.sm_count));
  };
  const double in_turn = double(layers) * (product(device.sm_count) + double(steps) * best.step_us);
  CudaWavefront wavefront = {1, best, in_turn, in_turn};
  if (layers < 2) return wavefront;
  double least = 0.9 * in_turn;  // less is not worth the parts
  for (const CudaPlan& plan : all_cuda_plans(p, device)) {
    if (plan.family != CudaFamily::kCluster) continue;
    int size = 0;
    while (plan.cluster > 1 << size) ++size;
    const int64_t at_once = std::min(layers, device.clusters[size] / (plan.groups * p.directions));
    if (at_once < 2) continue;
    // While a layer's product runs, the others' clusters keep their multiprocessors.
    const int64_t busy = (at_once - 1) * plan.groups * p.directions * plan.cluster;
    const double whole =
        product(double(std::max<int64_t>(device.sm_count - busy, device.sm_count / 8))) +
        double(steps) * plan.step_us;
    for (int parts = 2; parts <= 64 && parts <= steps; parts *= 2) {
      // Diagonal by diagonal: the cells of one are independent.
      double turns = 0;
      for (int64_t diagonal = 0; diagonal < layers + parts - 1; ++diagonal) {
        const int64_t cells =
            std::min({diagonal + 1, layers, int64_t(parts), layers + parts - 1 - diagonal});
        turns += double(ceil_div(cells, at_once));
      }
      const double us =
          std::max(turns * (whole / parts + costs.part), double(layers * parts) * costs.calls);
      if (us >= least) continue;
      least = us;
      wavefront = {parts, plan, us, in_turn};
    }
  }
  return wavefront;
}

std::string refuse(const CudaPlan& plan, const CudaProblem& p) {
  if (plan.family == CudaFamily::kVendor) return refuse_vendor_plan(plan, p);
  const bool cluster = plan.family == CudaFamily::kCluster;
  if (cluster && (p.projection || p.variants || !on_tensor_cores(p.dtype, p.tf32, 9)))
    return "clusters have no projection, no variant, no product outside of tensor cores";
  if (cluster && p.T < 1) return "clusters have a step at least";
  const Tile* tile = find(cluster ? cluster_tiles_of(p) : tiles_of(p), plan);
  if (!tile) return "no kernel has these tiles";
  if (plan.slices < 1 || plan.slices * units_of(plan.m_tiles, p.backward) < p.H)
    return "the slices do not cover the hidden units";
  if (plan.groups < 1 || plan.group_rows < 1 || plan.groups * plan.group_rows < p.B)
    return "the groups do not cover the batch";
  const bool scalar = p.dtype == Dtype::kFloat64 || (p.dtype == Dtype::kFloat32 && !p.tf32);
  if (plan.ahead &&
      (plan.family != CudaFamily::kGrid || scalar || p.variants || plan.held != tile->held ||
       streamed_chunks(p, plan.held, plan.shared) < chunks_ahead(tile->m)))
    return "no kernel streams these weights ahead";
  const int64_t behind = ceil_div(chunks_of(p), kWarps) - plan.held - plan.shared;
  if (plan.in_l2 < 0 || plan.in_l2 > (plan.ahead ? behind : 0))
    return "L2 is to keep a part of what is streamed ahead";
  if (cluster) return refuse_cluster(plan, p, *tile);
  if (plan.cluster) return "only the cluster family has clusters";
  if (plan.held != 0 && plan.held != tile->held) return "no kernel holds so many chunks";
  const bool grid = plan.family == CudaFamily::kGrid;
  if (!grid && (plan.held || plan.shared)) return "a step kernel keeps no weights";
  if (grid && steps_apart(p)) return "a projection or a layer norm has no grid kernels";
  const int64_t stays = int64_t(plan.shared) * kWarps * tile->m * kTileBytes;
  const int64_t streams = plan.ahead ? kStreamBytes : 0;
  if (plan.shared < 0 || plan.shared_bytes != base_shared(p, *tile) + stays + streams)
    return "shared_bytes is not what its parts add up to";
  return "";
}

}  // namespace lstm_ext
