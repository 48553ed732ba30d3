// Stands in for csrc/cuda/vendor.cpp: the products as loops, on the CPU.
#include "cuda/vendor.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/primitives.cuh"

namespace lstm_ext {

// What run() needs of scratch, and overwrites: an amount that no other part has by chance.
constexpr int64_t kWorkspaceBytes = 3 * 256;

struct ChosenProduct {
  Product product;
};

std::string open_vendor(const std::string&) { return ""; }
int64_t vendor_version() { return 1; }

VendorProduct::VendorProduct(const Product& p)
    : chosen_(std::make_shared<const ChosenProduct>(ChosenProduct{p})) {
  if (p.M < 1 || p.N < 1 || p.K < 1) throw std::invalid_argument("a product of nothing");
}

int64_t VendorProduct::workspace() const { return kWorkspaceBytes; }

namespace {

float rounded(float x, bool tf32) {
  if (!tf32) return x;
  const uint32_t bits = to_tf32(x);
  std::memcpy(&x, &bits, 4);
  return x;
}
double rounded(double x, bool) { return x; }

// [rows, columns] of an operand as it is multiplied.
template <class T, class Acc>
std::vector<Acc> read(const void* from, int64_t rows, int64_t columns, bool transposed,
                      int64_t stride, bool tf32) {
  const T* const m = static_cast<const T*>(from);
  std::vector<Acc> out(size_t(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = transposed ? j * stride + i : i * stride + j;
      out[size_t(i * columns + j)] = rounded(to_acc(m[at]), tf32);
    }
  }
  return out;
}

template <class T, class Out>
void multiply(const Product& p, const void* a, const void* b, void* out) {
  using Acc = decltype(to_acc(T()));
  const auto left = read<T, Acc>(a, p.M, p.K, p.a_transposed, p.lda, p.tf32);
  const auto right = read<T, Acc>(b, p.K, p.N, p.b_transposed, p.ldb, p.tf32);
  std::vector<Acc> row(size_t(p.N));
  for (int64_t i = 0; i < p.M; ++i) {
    Out* const to = static_cast<Out*>(out) + i * p.ldout;
    for (int64_t j = 0; j < p.N; ++j) row[size_t(j)] = p.accumulate ? to_acc(to[j]) : Acc(0);
    for (int64_t k = 0; k < p.K; ++k) {
      const Acc factor = left[size_t(i * p.K + k)];
      for (int64_t j = 0; j < p.N; ++j) row[size_t(j)] += factor * right[size_t(k * p.N + j)];
    }
    for (int64_t j = 0; j < p.N; ++j) to[j] = from_acc<Out>(row[size_t(j)]);
  }
}

}  // namespace

void VendorProduct::run(const void* a, const void* b, void* out, void* workspace, void*) const {
  const Product& p = chosen_->product;
  for (const void* address : {a, b, static_cast<const void*>(out)}) {
    if (reinterpret_cast<uintptr_t>(address) % uintptr_t(p.alignment))
      throw std::invalid_argument("an address is not aligned as the product says");
  }
  if (!workspace) throw std::invalid_argument("a product without its workspace");
  std::memset(workspace, 0xff, kWorkspaceBytes);
  switch (p.dtype) {
    case Dtype::kFloat64:
      return multiply<double, double>(p, a, b, out);
    case Dtype::kFloat32:
      return multiply<float, float>(p, a, b, out);
    case Dtype::kBFloat16:
      return p.wide ? multiply<__nv_bfloat16, float>(p, a, b, out)
                    : multiply<__nv_bfloat16, __nv_bfloat16>(p, a, b, out);
    default:
      return p.wide ? multiply<__half, float>(p, a, b, out)
                    : multiply<__half, __half>(p, a, b, out);
  }
}

}  // namespace lstm_ext
