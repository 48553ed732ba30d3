// Makes the ClusterKernelSet of an arithmetic from the tiles of tiles.h.
#pragma once

#include "cuda/cluster_backward.cuh"
#include "cuda/cluster_forward.cuh"
#include "cuda/find_tile.cuh"

namespace lstm_ext {

template <class Arithmetic, template <class> class Exchange>
struct ForwardResident {
  using Kernel = ForwardKernel;
  template <int m, int n, int held>
  static Kernel of() {
    constexpr int kMWarps = warps_of_rows(m);
    return forward_resident<Exchange<Arithmetic>, Arithmetic, m / kMWarps, kMWarps, n, held>;
  }
};
template <class Arithmetic>
struct BackwardClusters {
  using Kernel = BackwardKernel;
  template <int m, int n, int held>
  static Kernel of() {
    return backward_cluster<Arithmetic, m, n, held>;
  }
};

template <class Arithmetic, const auto& kForward, const auto& kBackward,
          const auto& kTagged = kForwardTaggedTiles>
const ClusterKernelSet& cluster_kernel_set() {
  static const ClusterKernelSet set = {
      find_tile<ForwardResident<Arithmetic, ThroughCluster>, kForward>,
      find_tile<ForwardResident<Arithmetic, ThroughL2>, kTagged>,
      find_tile<BackwardClusters<Arithmetic>, kBackward>};
  return set;
}

}  // namespace lstm_ext
