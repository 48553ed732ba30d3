"""The engine of CPU tensors: what calls the native core's CPU kernels (csrc/cpu)."""
