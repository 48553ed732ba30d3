// The part of DLPack's C interface (github.com/dmlc/dlpack, major version 1) by which a library
// lets others look at its tensors without a call of Python: torch has it since 2.10, as the capsule
// torch.Tensor.__dlpack_c_exchange_api__. The layouts are DLPack's, the names ours.
#pragma once

#include <cstdint>

namespace lstm_ext::dlpack {

constexpr uint32_t kMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

struct Type {
  uint8_t code;  // TypeCode
  uint8_t bits;
  uint16_t lanes;
  bool operator==(const Type& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};
enum TypeCode : uint8_t { kUnsigned = 1, kFloat = 2, kBfloat = 4 };
enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct View {
  void* data;
  int32_t device_type;
  int32_t device;
  int32_t dims;
  Type type;
  const int64_t* shape;    // [dims], the tensor's own, as strides
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  void (*unused[3])();
  // 0, or -1 with an error of Python set. The view is valid while the tensor is not changed. Null
  // if a library has none.
  int (*view)(void* tensor, View*);
  void (*stream)();
};

// A row after the other.
inline bool is_contiguous(const View& view) {
  int64_t expected = 1;
  for (int32_t k = view.dims; k-- > 0;) {
    if (view.shape[k] == 0) return true;
    if (view.shape[k] != 1 && view.strides[k] != expected) return false;
    expected *= view.shape[k];
  }
  return true;
}

// Likewise, of three dimensions or more with elements, if the second of them were the last.
inline bool is_channels_last(const View& view) {
  if (view.dims < 3) return false;
  int64_t expected = 1;
  const auto lies = [&](int32_t k) {
    if (view.shape[k] != 1 && view.strides[k] != expected) return false;
    expected *= view.shape[k];
    return true;
  };
  if (!lies(1)) return false;
  for (int32_t k = view.dims; k-- > 2;)
    if (!lies(k)) return false;
  return lies(0);
}

}  // namespace lstm_ext::dlpack
