#include "cuda/kernels.cuh"

namespace lstm_ext {

const KernelSet& kernels_float64() {
  return kernel_set<Scalar<double>, kForwardFewTiles, kBackwardFewTiles>();
}

}  // namespace lstm_ext
