// Scratch memory in pieces.
#pragma once

#include <cstdint>

namespace lstm_ext {

// Cuts pieces off a buffer, each 256-byte aligned as the buffer is; without a buffer it only
// counts.
class Cutter {
 public:
  explicit Cutter(void* base) : base_(static_cast<char*>(base)) {}
  void* take(int64_t bytes) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace lstm_ext
