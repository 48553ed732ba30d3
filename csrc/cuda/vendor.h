// Matrix products by the GPU vendor's library, cuBLASLt: the one that torch has loaded, or that the
// system finds, opened by its name. Neither its header nor its file is needed to build.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "params.h"

namespace lstm_ext {

// Row-major: out [M, N] = a [M, K] b [K, N]. No size is 0.
struct Product {
  Dtype dtype;        // of a and b
  bool tf32;          // fp32: operands rounded to TF32; not read for the other types
  bool wide;          // out of half types is fp32, the sums as they are; else out is of dtype
  bool accumulate;    // added to what out holds, before the rounding
  bool a_transposed;  // a is stored [K, M]
  bool b_transposed;  // b is stored [N, K]
  int device;         // index; the caller has made it current
  int alignment;      // of a, b and out: see alignment_of
  int64_t M, N, K;
  int64_t lda, ldb, ldout;  // elements from one row to the next, as they are stored
};

// Bytes to whose multiples all of the addresses lie: a power of two, 256 at most.
inline int alignment_of(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 256;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return int(bits & (~bits + 1));
}

// out [M, N] = a [M, K] b^T, b [N, K], in type acc; each begins on 16 bytes, and its rows lie
// densely.
inline Product rows_product(Dtype dtype, bool tf32, int device, int64_t M, int64_t N, int64_t K) {
  Product p{};
  p.dtype = dtype;
  p.tf32 = tf32;
  p.wide = true;
  p.b_transposed = true;
  p.device = device;
  p.alignment = 16;
  p.M = M;
  p.N = p.ldout = N;
  p.K = p.lda = p.ldb = K;
  return p;
}

// Opens the library unless one is open. name: of the file, such as libcublasLt.so.13, or a path.
// Returns why it cannot be used, empty if it can. From any thread.
std::string open_vendor(const std::string& name);

// Its version, as the library tells it, such as 130100; 0: none is open.
int64_t vendor_version();

// A product as the library does it; to be kept or made anew, for a second one of the same Product
// is looked up. What it makes repeats bit for bit: sums over parts of K are of type acc, in a fixed
// order. From any thread.
class VendorProduct {
 public:
  // Throws std::runtime_error with the library's status and the product's shape.
  explicit VendorProduct(const Product&);

  // Bytes of scratch that run() needs, 32 MB at most; of no particular contents, 256-byte aligned.
  int64_t workspace() const;

  // Launches and returns. The addresses are on the device, aligned as the Product says; out
  // overlaps no other. workspace: null if workspace() is 0. Throws as the constructor.
  void run(const void* a, const void* b, void* out, void* workspace, void* stream) const;

 private:
  std::shared_ptr<const struct ChosenProduct> chosen_;
};

}  // namespace lstm_ext
