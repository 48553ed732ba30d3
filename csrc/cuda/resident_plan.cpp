#include "cuda/resident_plan.h"

#include <algorithm>
#include <cmath>

#include "cuda/costs.h"

namespace lstm_ext {
namespace {

// What a warp keeps of the weights, and the bytes of one of it: chunks of k, or in
// backward m-tiles.
struct ResidentWeights {
  int64_t count, bytes;
};
ResidentWeights resident_weights(const CudaProblem& p, const Tile& tile) {
  if (p.backward)
    return {ceil_div(ceil_div(p.H, 16), kWarps), tile.m * storage_bytes(p.dtype) * kTileBytes};
  const int of_rows = warps_of_rows(tile.m);
  return {ceil_div(chunks_of(p), kWarps / of_rows), tile.m / of_rows * kTileBytes};
}
int64_t resident_shared(const CudaProblem& p, const Tile& tile, bool tagged, int64_t slices,
                        int64_t group_rows) {
  const int element = int(storage_bytes(p.dtype));
  return p.backward ? backward_resident_bytes(tile, slices, group_rows, element, tagged)
                    : forward_resident_bytes(tile, slices, group_rows, product_length(p) * element,
                                             element);
}

// What a step takes in the cost model, for groups of so many sequences, and what of the plan
// follows from that; 0: it cannot run.
CudaPlan try_resident_plan(const CudaProblem& p, const CudaProperties& device, const Tile& tile,
                           CudaFamily family, int64_t group_rows) {
  const Costs costs;
  CudaPlan plan = begin_plan(p, tile, family);
  const bool tagged = family == CudaFamily::kTagged;
  int size = 1;  // st.async is undefined in a cluster of one block
  while (!tagged && plan.slices > 1 << size) ++size;
  if (!tagged) plan.cluster = 1 << size;
  plan.group_rows = group_rows;
  plan.groups = std::max<int64_t>(ceil_div(p.B, group_rows), 1);
  plan.held = tile.held;
  const ResidentWeights weights = resident_weights(p, tile);
  plan.shared = int(std::max<int64_t>(weights.count - plan.held, 0));
  const int64_t base = resident_shared(p, tile, tagged, plan.slices, group_rows);
  const int64_t kept = plan.shared * kWarps * weights.bytes;
  plan.shared_bytes = base + kept;
  const int64_t groups = plan.groups * p.directions;
  int64_t at_once = 0;
  if (tagged)
    at_once = device.sm_count / plan.slices;
  else if (plan.cluster <= kMostBlocksOfCluster)
    at_once = device.clusters[size];
  if (!at_once || (tagged && groups > at_once)) return plan;  // it cannot run

  const double element = double(storage_bytes(p.dtype)), rows = 8.0 * tile.n;
  const double units = units_of(tile.m, p.backward);
  const double sent = double(plan.slices) *
                      double(p.backward ? backward_part_bytes(tile, group_rows)
                                        : forward_slice_bytes(tile, group_rows, int(element)));
  // Read and written in shared memory: the state by every warp that needs it, the weights, and what
  // is sent or added up.
  const double touched =
      double(kept) + (p.backward
                          ? kWarps * rows * 4 * units * element + (tagged ? 0 : 2 * sent)
                          : warps_of_rows(tile.m) * rows * double(p.H) * element +
                                2.0 * kWarps / warps_of_rows(tile.m) * tile.n * tile.m * 512);
  const double macs = rows * 4 * units * double(p.H);
  const double waves = std::ceil(double(groups) / double(at_once));
  plan.step_us =
      waves * ((p.backward ? costs.cluster_backward : costs.cluster) +
               costs.cluster_sequence * double(group_rows) + touched / costs.cluster_shared_per_sm +
               macs / macs_per_us(p, device, costs));
  if (tagged)  // a word an element; or what backward's parts have, put and taken
    plan.step_us +=
        costs.tagged + (p.backward ? 2 * sent : 4 * double(group_rows * p.H)) / costs.state_per_sm;
  return plan;
}

}  // namespace

Tiles resident_tiles_of(const CudaProblem& p, CudaFamily family) {
  const bool tagged = family == CudaFamily::kTagged, tf32 = p.dtype == Dtype::kFloat32;
  if (!p.backward)
    return tagged ? all(kForwardTaggedTiles)
           : tf32 ? all(kForwardClusterTiles32)
                  : all(kForwardClusterTiles16);
  if (tagged) return tf32 ? all(kBackwardTaggedTiles32) : all(kBackwardTaggedTiles16);
  return tf32 ? all(kBackwardClusterTiles32) : all(kBackwardClusterTiles16);
}

std::vector<CudaPlan> resident_plans(const CudaProblem& p, const CudaProperties& device) {
  std::vector<CudaPlan> plans;
  const bool compiled = device.clusters[1];
  if (!compiled || p.projection || p.variants || p.T < 2 ||
      !on_tensor_cores(p.dtype, p.tf32, device.major))
    return plans;
  for (const CudaFamily family : {CudaFamily::kCluster, CudaFamily::kTagged}) {
    const Tiles resident = resident_tiles_of(p, family);
    for (const Tile* tile = resident.begin; tile != resident.end; ++tile)
      for (int64_t rows = cluster_rows(*tile, p.backward); rows > 8 * (tile->n / 2);
           rows -= tile->n > 1 ? 8 : 2) {
        const CudaPlan plan = try_resident_plan(p, device, *tile, family, rows);
        if (plan.step_us > 0 && rows < std::max<int64_t>(2 * p.B, 3)) plans.push_back(plan);
      }
  }
  return plans;
}

std::string refuse_resident_plan(const CudaPlan& plan, const CudaProblem& p, const Tile& tile) {
  // A block without units, or a group without sequences, would receive nothing, and so run ahead of
  // its peers.
  const bool cluster = plan.family == CudaFamily::kCluster;
  if (cluster && (plan.cluster < plan.slices || plan.cluster < 2 ||
                  plan.cluster > kMostBlocksOfCluster || (plan.cluster & (plan.cluster - 1))))
    return "a cluster has a block for each slice, and is a power of two from 2 to 16";
  if (plan.slices != ceil_div(p.H, units_of(plan.m_tiles, p.backward)))
    return "no slice is without units";
  if (plan.groups > 1 && (plan.groups - 1) * plan.group_rows >= p.B)
    return "no group is without sequences";
  if (plan.group_rows > cluster_rows(tile, p.backward)) return "a group has one tile of sequences";
  if (plan.held != tile.held) return "no kernel holds so many chunks";
  const ResidentWeights weights = resident_weights(p, tile);
  if (plan.held + plan.shared < weights.count) return "all of the weights are kept";
  const int64_t base = resident_shared(p, tile, !cluster, plan.slices, plan.group_rows);
  if (plan.shared < 0 || plan.shared_bytes < base + plan.shared * kWarps * weights.bytes)
    return "shared_bytes is not enough for its parts";
  return "";
}

}  // namespace lstm_ext
