#include "cuda/kernels.cuh"

namespace lstm_ext {

const KernelSet& kernels_bfloat16() {
  return kernel_set<TensorBf16, kForwardTensorTiles, kBackwardTensorTiles>();
}

}  // namespace lstm_ext
