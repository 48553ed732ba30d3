// Stands in for csrc/cuda/cluster_kernels_*.cu as few_kernels.cu does for the others: small tiles,
// one whose units do not divide a block's threads, and those with two n-tiles at a time, of which
// forward's has two cells a thread.
#include <stdexcept>

#include "cuda/cluster_kernels.cuh"

namespace lstm_ext {

constexpr Tile kForward16[] = {{4, 1, 4}, {8, 2, 8}, {12, 1, 6}};
constexpr Tile kBackward16[] = {{1, 2, 2}, {2, 1, 4}, {3, 1, 3}};
constexpr Tile kForward32[] = {{4, 1, 4}};
constexpr Tile kBackward32[] = {{2, 1, 2}};

const ClusterKernelSet& cluster_kernels_bfloat16() {
  return cluster_kernel_set<Tensor16<__nv_bfloat16>, kForward16, kBackward16>();
}
const ClusterKernelSet& cluster_kernels_tf32() {
  return cluster_kernel_set<Tf32, kForward32, kBackward32>();
}

const ClusterKernelSet& cluster_kernels_float16() {
  throw std::invalid_argument("float16 is not compiled");
}

}  // namespace lstm_ext
