#include "cuda/kernels.cuh"

namespace lstm_ext {

const KernelSet& kernels_float64() {
  return kernel_set<Scalar<double>, kForwardScalarTiles, kBackwardScalarTiles>();
}

}  // namespace lstm_ext
