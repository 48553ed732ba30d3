// One launch, on the device or in the emulator; a failure is an exception with CUDA's own text.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace lstm_ext {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // do not leave it to a later check of someone else
  throw std::runtime_error(std::string("CUDA error while ") + what + ": " +
                           cudaGetErrorString(error));
}

// The caller's runtime has made the device current already; ours is a copy of its own, which may
// not know yet, and a new thread may have no context.
inline void make_current(int device) {
  thread_local int bound = -1;
  int current = -1;
  if (bound == device) check_cuda(cudaGetDevice(&current), "asking for the device");
  if (current == device) return;
  check_cuda(cudaSetDevice(device), "choosing the device");
  bound = device;
}

// Runs `tell` once for a kernel and the current device; from several threads, too.
template <class Tell>
void once_for(const void* kernel, std::set<std::pair<const void*, int>>& told, const char* what,
              Tell tell) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), what);
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (told.count({kernel, device})) return;
  tell(device);
  told.insert({kernel, device});
}

// A kernel may have more than 48 KB of dynamic shared memory only after the runtime has been told.
// Always the same figure, all that a block can have: two threads may launch with different sizes.
inline void allow_shared_memory(const void* kernel, int64_t bytes, const char* what) {
  if (bytes <= 48 * 1024) return;
  static std::set<std::pair<const void*, int>> told;
  once_for(kernel, told, what, [&](int device) {
    int most = 0;
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               what);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               what);
  });
}

// The same for clusters of more than the 8 blocks that every GPU with clusters has.
inline void allow_large_clusters(const void* kernel, unsigned blocks, const char* what) {
  if (blocks <= 8) return;
  static std::set<std::pair<const void*, int>> told;
  once_for(kernel, told, what, [&](int) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               what);
  });
}

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  int64_t shared_bytes;
  bool cooperative;
  unsigned cluster = 0;  // blocks; 0: none
};

template <class Args>
void launch(void (*kernel)(Args), const LaunchShape& shape, void* stream, const Args& args,
            const char* what) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes, what);
  cudaLaunchAttribute attribute{};
  if (shape.cluster) {
    allow_large_clusters(reinterpret_cast<const void*>(kernel), shape.cluster, what);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = shape.cooperative;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster || shape.cooperative ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), what);
}

}  // namespace lstm_ext
