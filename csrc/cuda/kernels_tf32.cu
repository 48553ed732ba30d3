#include "cuda/kernels.cuh"

namespace lstm_ext {

const KernelSet& kernels_tf32() {
  return kernel_set<Tf32, kForwardTensorTiles, kBackwardTensorTiles>();
}

}  // namespace lstm_ext
