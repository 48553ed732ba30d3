#include "cuda/cluster_kernels.cuh"

namespace lstm_ext {

const ClusterKernelSet& cluster_kernels_tf32() {
  return cluster_kernel_set<Tf32, kForwardClusterTiles32, kBackwardClusterTiles32,
                            kBackwardTaggedTiles32>();
}

}  // namespace lstm_ext
