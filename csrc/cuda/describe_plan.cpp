#include <algorithm>
#include <cstdio>

#include "cuda/plan.h"

namespace lstm_ext {

std::string describe(const CudaPlan& plan, const CudaProblem& p) {
  static const char* const kDtypes[] = {"float64", "float32", "bfloat16", "float16"};
  const bool cluster = plan.family == CudaFamily::kCluster;
  const bool tagged = plan.family == CudaFamily::kTagged;
  const bool vendor = plan.family == CudaFamily::kVendor;
  const char* const how = cluster  ? "clusters"
                          : vendor ? "the vendor's product and a launch a step"
                          : tagged ? "one cooperative launch, words tagged with their step"
                          : plan.family == CudaFamily::kGrid ? "one cooperative launch"
                                                             : "a launch a step";
  const int64_t slices = cluster ? plan.cluster : plan.slices;
  const int64_t of_a_warp = ceil_div(chunks_of(p), kWarps);
  char weights[160];
  const long long streamed = std::max<int64_t>(0, of_a_warp - plan.held - plan.shared);
  char ahead[60] = "";
  if (plan.ahead)
    std::snprintf(ahead, sizeof ahead, " ahead, %d of them to stay there", plan.in_l2);
  if (cluster || tagged)
    std::snprintf(weights, sizeof weights, "%d %s in registers, %d in shared memory", plan.held,
                  p.backward ? "row tiles" : "chunks", plan.shared);
  else
    std::snprintf(weights, sizeof weights,
                  "%d chunks in registers, %d in shared memory, %lld from L2%s", plan.held,
                  plan.shared, streamed, ahead);
  char tiles[240] = "";
  if (!vendor)
    std::snprintf(tiles, sizeof tiles,
                  ", tile %dx%d, weights of a warp: %s; %lld bytes of shared memory",
                  plan.m_tiles * 16, plan.n_tiles * 8, weights, (long long)plan.shared_bytes);
  char text[480];
  std::snprintf(
      text, sizeof text,
      "%s %s%s%s B %lld H %lld P %lld, %d direction%s: %s, %lld blocks (%lld slices of %d "
      "units x %lld groups of %lld sequences)%s; expected %.1f us a step",
      p.backward ? "backward" : "forward", kDtypes[int(p.dtype)], p.tf32 ? " (TF32)" : "",
      p.normed     ? " with layer norm"
      : p.variants ? " with variants"
                   : "",
      (long long)p.B, (long long)p.H, (long long)p.P, p.directions, p.directions == 1 ? "" : "s",
      how, (long long)(slices * plan.groups * p.directions), (long long)slices,
      vendor ? kThreads : units_of(plan.m_tiles, p.backward), (long long)plan.groups,
      (long long)plan.group_rows, tiles, plan.step_us);
  return text;
}

}  // namespace lstm_ext
