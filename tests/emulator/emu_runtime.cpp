// The runtime's functions that include/emu_runtime.h declares.
#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "emu_internal.h"

namespace emu {

static thread_local int t_last_error = cudaSuccess;
static thread_local int t_device = 0;

int remember(int error) {
  if (error != cudaSuccess) t_last_error = error;
  return error;
}
int last_error(bool forget) {
  return forget ? std::exchange(t_last_error, cudaSuccess) : t_last_error;
}
int& current_device() { return t_device; }

namespace {
struct FunctionAttributes {
  size_t shared = 0;  // 0: not opted in
  bool non_portable_cluster = false;
};
std::mutex g_attributes_lock;
std::map<const void*, FunctionAttributes> g_attributes;
}  // namespace

int set_function_attribute(const void* kernel, int attribute, int value) {
  std::lock_guard<std::mutex> lock(g_attributes_lock);
  auto& attributes = g_attributes[kernel];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || size_t(value) > g_device.shared_per_block) return cudaErrorInvalidValue;
      attributes.shared = size_t(value);
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      attributes.non_portable_cluster = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return value < -1 || value > 100 ? cudaErrorInvalidValue : cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

int shape_of(const cudaLaunchConfig_t& config, const void* kernel, Shape& shape) {
  FunctionAttributes attributes;
  {
    std::lock_guard<std::mutex> lock(g_attributes_lock);
    attributes = g_attributes[kernel];
  }
  if (config.dynamicSmemBytes > std::max(attributes.shared, g_device.shared_default))
    return cudaErrorInvalidValue;
  shape.grid = config.gridDim;
  shape.block = config.blockDim;
  shape.smem = config.dynamicSmemBytes;
  shape.non_portable_cluster = attributes.non_portable_cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeCooperative:
        shape.cooperative = value.cooperative != 0;
        break;
      case cudaLaunchAttributeClusterDimension:
        shape.cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
        break;
    }
  }
  return cudaSuccess;
}

int device_attribute(int attribute) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return int(g_device.sm_count);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return int(g_device.threads_per_sm);
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return int(g_device.shared_per_sm);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return int(g_device.shared_per_block);
    case cudaDevAttrCooperativeLaunch:
      return 1;
  }
  return -1;
}

}  // namespace emu

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}
