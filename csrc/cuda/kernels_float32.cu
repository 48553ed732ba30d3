#include "cuda/kernels.cuh"

namespace lstm_ext {

const KernelSet& kernels_float32() {
  return kernel_set<Scalar<float>, kForwardFewTiles, kBackwardFewTiles>();
}

}  // namespace lstm_ext
