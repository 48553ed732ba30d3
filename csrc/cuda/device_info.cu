#include <cuda_runtime.h>

#include <cstring>

#include "cuda/device_info.h"

namespace lstm_ext {
namespace {

// Never launched: asking the runtime for its attributes tells whether this binary holds
// code for a device.
__global__ void probe_kernel() {}

void set_error(CudaDeviceInfo& info, cudaError_t error) {
  info.error = static_cast<int>(error);
  info.error_text = cudaGetErrorString(error);
  if (error != cudaSuccess) (void)cudaGetLastError();  // do not leave it to a later check
}

// A size that the device refuses counts as none.
void count_clusters(const cudaDeviceProp& prop, CudaDeviceInfo& info) {
  (void)cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  (void)cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(prop.sharedMemPerBlockOptin));
  for (int i = 0; i < 5; ++i) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 1u << i;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(16);
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = prop.sharedMemPerBlockOptin;  // so that no two share one
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&info.clusters[i], probe_kernel, &config) != cudaSuccess)
      info.clusters[i] = 0;
  }
  (void)cudaGetLastError();
}

cudaError_t query(int device, CudaDeviceInfo& info) {
  cudaDeviceProp prop{};
  if (cudaError_t error = cudaGetDeviceProperties(&prop, device)) return error;
  static_assert(sizeof(info.name) == sizeof(prop.name), "name is copied whole");
  std::memcpy(info.name, prop.name, sizeof(info.name));
  info.major = prop.major;
  info.minor = prop.minor;
  info.sm_count = prop.multiProcessorCount;
  info.shared_memory_optin = prop.sharedMemPerBlockOptin;
  info.l2_bytes = static_cast<size_t>(prop.l2CacheSize);
  info.memory_bytes = prop.totalGlobalMem;

  int previous = 0;
  if (cudaError_t error = cudaGetDevice(&previous)) return error;
  if (cudaError_t error = cudaSetDevice(device)) return error;
  cudaFuncAttributes code{};
  const cudaError_t error = cudaFuncGetAttributes(&code, probe_kernel);
  // Code compiled from PTX of an older architecture has no clusters, whatever the device.
  if (error == cudaSuccess && prop.major >= 9 && code.ptxVersion >= 90) count_clusters(prop, info);
  const cudaError_t restored = cudaSetDevice(previous);
  if (error != cudaSuccess) return error;
  info.binary_version = code.binaryVersion;
  info.ptx_version = code.ptxVersion;
  return restored;
}

}  // namespace

CudaRuntimeInfo cuda_runtime_info() {
  CudaRuntimeInfo info{};
  (void)cudaRuntimeGetVersion(&info.runtime_version);
  (void)cudaDriverGetVersion(&info.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&info.device_count);
  if (error != cudaSuccess) {
    info.device_count = 0;
    (void)cudaGetLastError();
  }
  info.error = static_cast<int>(error);
  info.error_text = cudaGetErrorString(error);
  return info;
}

CudaDeviceInfo cuda_device_info(int device) {
  CudaDeviceInfo info{};
  set_error(info, query(device, info));
  return info;
}

}  // namespace lstm_ext
