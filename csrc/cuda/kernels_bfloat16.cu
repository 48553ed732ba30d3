#include "cuda/kernels.cuh"

namespace lstm_ext {

const KernelSet& kernels_bfloat16() {
  return kernel_set<Tensor16<__nv_bfloat16>, kForwardTensorTiles, kBackwardTensorTiles>();
}

}  // namespace lstm_ext
