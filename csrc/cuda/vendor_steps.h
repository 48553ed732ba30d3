// The steps of the vendor family: each direction's product by the vendor's library, then a kernel
// for all else of the step. No kernel here.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace lstm_ext {

// Bytes that the products need of scratch; the directions share it.
int64_t vendor_steps_workspace(const CudaLayer&, bool backward);

// Steps 0 to count - 1 of the pass, launched on the layer's stream; what is before them is
// prepared. args: all but the steps of its shape, which are set here; the products' sums go to
// product of its directions. norm, norm_shape: the kernel that does all else with a layer norm;
// read only then. workspace: vendor_steps_workspace() bytes, 256-byte aligned, of no particular
// contents.
//
// The library is asked how to multiply once for all calls of a shape. That may not be while a
// stream is captured into a graph: cuBLASLt refuses it, from some version on, and may allocate. All
// else here may.
void vendor_forward_steps(const CudaLayer&, ForwardArgs&, int count, ForwardKernel norm,
                          const LaunchShape& norm_shape, void* workspace);
void vendor_backward_steps(const CudaLayer&, BackwardArgs&, int count, BackwardKernel norm,
                           const LaunchShape& norm_shape, void* workspace);

}  // namespace lstm_ext
