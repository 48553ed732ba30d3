// The little of the CUDA runtime that host code here needs. Everything is synchronous; device
// memory is host memory.
#pragma once

#include <cstdlib>
#include <cstring>
#include <utility>

#include "emu_core.h"

using cudaError_t = int;
using cudaStream_t = void*;

enum : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emu {
int remember(int error);  // for cudaGetLastError, if it is one; returns it
int last_error(bool forget);
int set_function_attribute(const void* kernel, int attribute, int value);
// The shape that a launch asks for, or an error: more shared memory than was opted in for.
int shape_of(const cudaLaunchConfig_t&, const void* kernel, Shape&);
unsigned blocks_per_sm(unsigned threads, size_t smem);
int device_attribute(int attribute);  // -1: not known here
int& current_device();
}  // namespace emu

const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaGetLastError() { return emu::last_error(true); }
inline cudaError_t cudaPeekAtLastError() { return emu::last_error(false); }

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0) return emu::remember(cudaErrorInvalidDevice);
  emu::current_device() = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emu::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = emu::device_attribute(attribute);
  return *value < 0 ? emu::remember(cudaErrorInvalidValue) : cudaSuccess;
}

template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  return emu::remember(emu::set_function_attribute((const void*)kernel, attribute, value));
}
// Registers are not known here, so the device's number can be lower.
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads,
                                                          size_t smem) {
  *blocks = int(emu::blocks_per_sm(unsigned(threads), smem));
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... a) {
  emu::Shape shape;
  if (int error = emu::shape_of(*config, (const void*)kernel, shape)) return emu::remember(error);
  return emu::remember(emu::launch(kernel, shape, std::forward<A>(a)...));
}

template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  if (!*p) return emu::remember(cudaErrorMemoryAllocation);
  std::memset(static_cast<void*>(*p), 0xff, bytes);  // NaN
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMallocManaged(T** p, size_t bytes) {
  return cudaMalloc(p, bytes);
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
