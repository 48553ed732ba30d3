// The compiled kernels of one arithmetic. Each kernels_*.cu defines one set, so that they compile
// side by side.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.cuh"

namespace lstm_ext {

using ForwardKernel = void (*)(ForwardArgs);
using BackwardKernel = void (*)(BackwardArgs);

// A null result: no such kernel is compiled.
struct KernelSet {
  ForwardKernel (*forward)(int m_tiles, int n_tiles, int held);
  ForwardKernel (*forward_projection)(int n_tiles);
  ForwardKernel forward_prepare;
  BackwardKernel (*backward)(int m_tiles, int n_tiles, int held);
  BackwardKernel (*backward_projection)(int n_tiles);
  BackwardKernel backward_prepare;
  // With what params.h calls Variants; a layer norm's own come after each step's.
  ForwardKernel (*forward_variants)(int m_tiles, int n_tiles, int held);
  ForwardKernel forward_norm;
  BackwardKernel (*backward_variants)(int m_tiles, int n_tiles, int held);
  BackwardKernel backward_norm;
};

// Those of the families cluster and tagged: tensor cores of compute capability 9 and more.
struct ClusterKernelSet {
  ForwardKernel (*forward)(int m_tiles, int n_tiles, int held);
  ForwardKernel (*forward_tagged)(int m_tiles, int n_tiles, int held);
  BackwardKernel (*backward)(int m_tiles, int n_tiles, int held);
  BackwardKernel (*backward_tagged)(int m_tiles, int n_tiles, int held);
};

const KernelSet& kernels_float64();
const KernelSet& kernels_float32();
const KernelSet& kernels_tf32();
const KernelSet& kernels_float16();
const KernelSet& kernels_bfloat16();

const ClusterKernelSet& cluster_kernels_tf32();
const ClusterKernelSet& cluster_kernels_float16();
const ClusterKernelSet& cluster_kernels_bfloat16();

}  // namespace lstm_ext
