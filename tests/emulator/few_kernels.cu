// Stands in for csrc/cuda/kernels_*.cu where all of them would take too long to compile: under the
// sanitizers, and once for every mutant. The tiles are a selection of tiles.h's, whose plans they
// have to fit: small ones, and some whose partial sums take several rounds. Clusters have
// few_cluster_kernels.cu.
#include "cuda/kernels.cuh"
#include "few_of.h"

namespace lstm_ext {

constexpr Tile kForwardTensor[] = {{2, 1, 4}, {8, 2, 0}, {4, 8, 0}};
constexpr Tile kBackwardTensor[] = {{1, 1, 8}, {2, 2, 4}, {2, 8, 0}};
// A cluster's problem needs the kernels that prepare.
constexpr Tile kForwardTf32[] = {{2, 1, 4}};
constexpr Tile kBackwardTf32[] = {{1, 1, 8}};
constexpr Tile kForwardScalar[] = {{2, 1, 0}};
constexpr Tile kBackwardScalar[] = {{1, 1, 0}, {2, 4, 0}};
constexpr Tile kForwardVariants[] = {{2, 1, 0}};
constexpr Tile kBackwardVariants[] = {{1, 1, 0}};

template <int kArithmetic, class Arithmetic, const auto& kForward, const auto& kBackward>
const KernelSet& few() {
  if constexpr (is_compiled<kArithmetic>())
    return kernel_set<Arithmetic, kForward, kBackward, kForwardVariants, kBackwardVariants>();
  else
    return not_compiled<KernelSet>();
}
const KernelSet& kernels_bfloat16() {
  return few<emu_bfloat16, Tensor16<__nv_bfloat16>, kForwardTensor, kBackwardTensor>();
}
const KernelSet& kernels_tf32() { return few<emu_tf32, Tf32, kForwardTf32, kBackwardTf32>(); }
const KernelSet& kernels_float32() {
  return few<emu_float32, Scalar<float>, kForwardScalar, kBackwardScalar>();
}

const KernelSet& kernels_float64() { return not_compiled<KernelSet>(); }
const KernelSet& kernels_float16() { return not_compiled<KernelSet>(); }

}  // namespace lstm_ext
