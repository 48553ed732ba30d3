// Stands in for csrc/cuda/cluster_kernels_*.cu as few_kernels.cu does for the others: small tiles,
// one whose units do not divide a block's threads, and those with two n-tiles at a time, of which
// forward's has two cells a thread.
#include "cuda/cluster_kernels.cuh"
#include "few_of.h"

namespace lstm_ext {

constexpr Tile kForward16[] = {{4, 1, 4}, {8, 2, 8}, {12, 1, 6}};
constexpr Tile kForwardTagged[] = {{4, 1, 8}};
constexpr Tile kBackward16[] = {{1, 2, 2}, {2, 1, 4}, {3, 1, 3}};
constexpr Tile kForward32[] = {{4, 1, 4}};
constexpr Tile kBackward32[] = {{2, 1, 2}};
constexpr Tile kBackwardTagged16[] = {{1, 1, 8}, {2, 1, 4}};
constexpr Tile kBackwardTagged32[] = {{1, 1, 4}};

template <int kArithmetic, class Arithmetic, const auto& kForward, const auto& kBackward,
          const auto& kBackwardTagged>
const ClusterKernelSet& few() {
  if constexpr (is_compiled<kArithmetic>())
    return cluster_kernel_set<Arithmetic, kForward, kBackward, kBackwardTagged, kForwardTagged>();
  else
    return not_compiled<ClusterKernelSet>();
}
const ClusterKernelSet& cluster_kernels_bfloat16() {
  return few<emu_bfloat16, Tensor16<__nv_bfloat16>, kForward16, kBackward16, kBackwardTagged16>();
}
const ClusterKernelSet& cluster_kernels_tf32() {
  return few<emu_tf32, Tf32, kForward32, kBackward32, kBackwardTagged32>();
}

const ClusterKernelSet& cluster_kernels_float16() { return not_compiled<ClusterKernelSet>(); }

}  // namespace lstm_ext
