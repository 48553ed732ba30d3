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
template <class Arithmetic, template <int, int> class Exchange>
struct BackwardResident {
  using Kernel = BackwardKernel;
  template <int m, int n, int held>
  static Kernel of() {
    return backward_resident<Exchange, Arithmetic, m, n, held>;
  }
};

template <class Arithmetic, const auto& kForward, const auto& kBackward,
          const auto& kTaggedBackward, const auto& kTaggedForward = kForwardTaggedTiles>
const ClusterKernelSet& cluster_kernel_set() {
  static const ClusterKernelSet set = {
      find_tile<ForwardResident<Arithmetic, ThroughCluster>, kForward>,
      find_tile<ForwardResident<Arithmetic, ThroughL2>, kTaggedForward>,
      find_tile<BackwardResident<Arithmetic, PartsThroughCluster>, kBackward>,
      find_tile<BackwardResident<Arithmetic, PartsThroughL2>, kTaggedBackward>};
  return set;
}

}  // namespace lstm_ext
