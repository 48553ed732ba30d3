#include "cuda/kernels.cuh"

namespace lstm_ext {

const KernelSet& kernels_float16() {
  return kernel_set<Tensor16<__half>, kForwardTensorTiles, kBackwardTensorTiles>();
}

}  // namespace lstm_ext
