// One launch, on the device or in the emulator; a failure is an exception with CUDA's own text.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace lstm_ext {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // do not leave it to a later check of someone else
  throw std::runtime_error(std::string("CUDA error while ") + what + ": " +
                           cudaGetErrorString(error));
}

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  int64_t shared_bytes;
  bool cooperative;
};

template <class Args>
void launch(void (*kernel)(Args), const LaunchShape& shape, void* stream, const Args& args,
            const char* what) {
  if (shape.shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shape.shared_bytes)),
               what);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), what);
}

}  // namespace lstm_ext
