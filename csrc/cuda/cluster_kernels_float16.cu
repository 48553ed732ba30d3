#include "cuda/cluster_kernels.cuh"

namespace lstm_ext {

const ClusterKernelSet& cluster_kernels_float16() {
  return cluster_kernel_set<Tensor16<__half>, kForwardClusterTiles16, kBackwardClusterTiles16,
                            kBackwardTaggedTiles16>();
}

}  // namespace lstm_ext
