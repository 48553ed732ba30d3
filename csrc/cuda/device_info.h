// What the CUDA runtime says about this machine. Host code only; usable without a driver.
#pragma once

#include <cstddef>

namespace lstm_ext {

struct CudaRuntimeInfo {
  int runtime_version;     // of the linked cudart, 1000 * major + 10 * minor
  int driver_version;      // newest CUDA the driver supports, same coding; 0 without a driver
  int device_count;        // 0 on any failure
  int error;               // cudaError_t of counting the devices; 0 is success
  const char* error_text;  // cudaGetErrorString(error), static, never null
};

// Never throws and never ends the process; a missing driver is an error in the result.
CudaRuntimeInfo cuda_runtime_info();

struct CudaDeviceInfo {
  char name[256];
  int major, minor;  // compute capability
  int sm_count;
  size_t shared_memory_optin;  // bytes a block can have with the opt-in attribute
  size_t l2_bytes;
  size_t memory_bytes;
  // The code of this binary that the device would run, 10 * major + minor: native code if
  // the two are equal, else compiled by the driver from PTX. 0 when there is none.
  int binary_version, ptx_version;
  // How many clusters of 1, 2, 4, 8 and 16 blocks run at once, if each block has a multiprocessor
  // to itself; zeros before Hopper, or without code for Hopper and later.
  int clusters[5];
  int error;  // cudaError_t of the first query that failed; what follows it is zero
  const char* error_text;
};

// Opens a context on the device, and leaves the calling thread's current device as it was.
CudaDeviceInfo cuda_device_info(int device);

}  // namespace lstm_ext
