// Makes the ClusterKernelSet of an arithmetic from the tiles of tiles.h.
#pragma once

#include "cuda/cluster_backward.cuh"
#include "cuda/cluster_forward.cuh"
#include "cuda/find_tile.cuh"

namespace lstm_ext {

template <class Arithmetic>
struct ForwardClusters {
  using Kernel = ForwardKernel;
  template <int m, int n, int held>
  static Kernel of() {
    constexpr int kMWarps = warps_of_rows(m);
    return forward_cluster<Arithmetic, m / kMWarps, kMWarps, n, held>;
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

template <class Arithmetic, const auto& kForward, const auto& kBackward>
const ClusterKernelSet& cluster_kernel_set() {
  static const ClusterKernelSet set = {find_tile<ForwardClusters<Arithmetic>, kForward>,
                                       find_tile<BackwardClusters<Arithmetic>, kBackward>};
  return set;
}

}  // namespace lstm_ext
