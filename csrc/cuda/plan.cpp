#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cuda/costs.h"
#include "cuda/resident_plan.h"
#include "cuda/vendor_plan.h"

namespace lstm_ext {
namespace {

// With the projection's product or the sums of a layer norm, a step is more than one kernel: in one
// launch it would need more than one barrier.
bool steps_apart(const CudaProblem& p) { return p.projection || p.normed; }

// Whichever the device: the kernels of half types and TF32 have these tiles even where they fall
// back to plain arithmetic.
Tiles tiles_of(const CudaProblem& p) {
  const bool scalar = p.dtype == Dtype::kFloat64 || (p.dtype == Dtype::kFloat32 && !p.tf32);
  if (scalar || p.variants) return p.backward ? all(kBackwardFewTiles) : all(kForwardFewTiles);
  return p.backward ? all(kBackwardTensorTiles) : all(kForwardTensorTiles);
}

const Tile* find(const Tiles& tiles, const CudaPlan& plan) {
  const Tile* tile = std::find_if(tiles.begin, tiles.end, [&](const Tile& t) {
    return t.m == plan.m_tiles && t.n == plan.n_tiles;
  });
  return tile == tiles.end ? nullptr : tile;
}

int rounds_of(const CudaProblem& p, const Tile& tile) {
  return tile.n / round_tiles(units_of(tile.m, p.backward), tile.n);
}

int64_t partial_shared(const CudaProblem& p, const Tile& tile) {
  return partial_bytes(tile.m, units_of(tile.m, p.backward), tile.n, int(acc_bytes(p.dtype)));
}
// Of what a tile's cells fetch; 0: there is no kernel that does.
int64_t fetched_shared(const CudaProblem& p, const Tile& tile) {
  const int rounds = rounds_of(p, tile);
  if (!can_fetch(tile.m, rounds, int(acc_bytes(p.dtype)), p.variants, p.backward)) return 0;
  return fetched_bytes(rounds, p.backward);
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
  CudaPlan plan = begin_plan(p, tile, family);
  groups = std::max<int64_t>(groups, 1);  // there may be no sequence
  plan.group_rows = std::max<int64_t>(ceil_div(ceil_div(p.B, groups), 8) * 8, 8);
  plan.groups = std::max<int64_t>(ceil_div(p.B, plan.group_rows), 1);
  // Backward, what cells fetch comes before weights; forward a chunk of weights that is read from
  // L2 instead costs as much as they gain.
  const int64_t fetched = fetched_shared(p, tile);
  plan.fetches = p.backward && fetched;
  plan.shared_bytes = partial_shared(p, tile) + (plan.fetches ? fetched : 0);

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
  if (!plan.fetches && fetched && plan.shared_bytes + fetched <= device.shared_bytes) {
    plan.fetches = true;
    plan.shared_bytes += fetched;
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
  const int rounds = rounds_of(p, tile);
  const double cell = (p.backward ? costs.cell_backward : costs.cell) *
                      (1 + costs.more_rounds * double(rounds - 1));
  const double others = state + from_shared + math + tiles * cell;
  const double fixed = grid ? costs.barrier : costs.launch;
  const double busy = others + streamed;
  // What comes from memory waits for a part of the rest, and that for it.
  plan.step_us = fixed + std::hypot(from_memory, grid ? busy : std::ceil(waves) * busy);
  // Through barrier and cell too: they cost what L2 or memory takes to give them.
  if (ahead) plan.step_us = std::max({fixed + others, state + streamed, from_memory});
  return plan;
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
  for (const CudaPlan& plan : resident_plans(p, device)) add(plan);
  return plans;
}

CudaPlan make_cuda_plan(const CudaProblem& p, const CudaProperties& device) {
  if (p.H < 1) throw std::invalid_argument("on a GPU a layer has hidden units, got 0");
  const std::vector<CudaPlan> plans = all_cuda_plans(p, device);
  if (plans.empty())
    throw std::runtime_error("no kernel fits a device with " + std::to_string(device.shared_bytes) +
                             " bytes of shared memory a block");
  const CudaPlan* best = nullptr;
  for (const CudaPlan& plan : plans) {
    const bool timed = !plan.ahead && plan.family != CudaFamily::kTagged;
    if ((timed || device.untimed) && (!best || plan.step_us < best->step_us)) best = &plan;
  }
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
  const bool resident = keeps_all(plan.family);
  if (resident && (p.projection || p.variants || !on_tensor_cores(p.dtype, p.tf32, 9)))
    return "what keeps all weights has no projection, no variant, no product outside of tensor "
           "cores";
  if (resident && p.T < 1) return "what keeps all weights has a step at least";
  const Tile* tile = find(resident ? resident_tiles_of(p, plan.family) : tiles_of(p), plan);
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
  if (plan.cluster && plan.family != CudaFamily::kCluster)
    return "only the cluster family has clusters";
  if (plan.fetches && resident) return "what keeps all weights fetches by itself";
  if (resident) return refuse_resident_plan(plan, p, *tile);
  if (plan.held != 0 && plan.held != tile->held) return "no kernel holds so many chunks";
  const bool grid = plan.family == CudaFamily::kGrid;
  if (!grid && (plan.held || plan.shared)) return "a step kernel keeps no weights";
  if (grid && steps_apart(p)) return "a projection or a layer norm has no grid kernels";
  const int64_t stays = int64_t(plan.shared) * kWarps * tile->m * kTileBytes;
  const int64_t streams = plan.ahead ? kStreamBytes : 0;
  const int64_t fetched = fetched_shared(p, *tile);
  if (plan.fetches ? !fetched : p.backward && fetched)
    return "this tile's cells fetch ahead always, or never";
  if (plan.shared < 0 || plan.shared_bytes != partial_shared(p, *tile) + stays + streams +
                                                  (plan.fetches ? fetched : 0))
    return "shared_bytes is not what its parts add up to";
  return "";
}

}  // namespace lstm_ext
