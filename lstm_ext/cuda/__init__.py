"""The engine of CUDA tensors: what calls the native core's CUDA kernels (csrc/cuda)."""
