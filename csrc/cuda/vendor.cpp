#include "cuda/vendor.h"

#include <dlfcn.h>

#include <array>
#include <cstddef>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace lstm_ext {
namespace {

// ---- what is used of the library's interface, the same from its version 11 on
// ------------------------------------------------------------------------------------------------

using Status = int;
using Handle = struct HandleOf*;
using Operation = struct OperationOf*;
using Layout = struct LayoutOf*;
using Preference = struct PreferenceOf*;

constexpr Status kSuccess = 0;

enum DataType : int { kReal32 = 0, kReal64 = 1, kReal16 = 2, kRealBrain16 = 14 };
enum ComputeType : int { kCompute32 = 68, kCompute64 = 70, kComputeTf32 = 77 };
enum Transpose : int32_t { kAsStored = 0, kTransposed = 1 };
enum OperationAttribute : int { kTransposeA = 3, kTransposeB = 4 };
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,   // uint64_t
  kReductionSchemes = 3,    // uint32_t, a mask
  kMinAlignmentBytesA = 5,  // uint32_t; 6, 7 and 8: of B, C and D
};
// Parts of a sum are kept in the type it is computed in, and added by another kernel.
constexpr uint32_t kReductionInComputeType = 2;

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96 && offsetof(HeuristicResult, state) == 72,
              "as the library writes it");

struct Library {
  Status (*create)(Handle*);
  Status (*create_operation)(Operation*, ComputeType, DataType scale);
  Status (*destroy_operation)(Operation);
  Status (*set_operation)(Operation, OperationAttribute, const void*, size_t);
  Status (*create_layout)(Layout*, DataType, uint64_t rows, uint64_t columns, int64_t stride);
  Status (*destroy_layout)(Layout);
  Status (*create_preference)(Preference*);
  Status (*destroy_preference)(Preference);
  Status (*set_preference)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*choose)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference,
                   int asked_for, HeuristicResult*, int* found);
  Status (*multiply)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b,
                     Layout, const void* beta, const void* c, Layout, void* d, Layout,
                     const Algorithm*, void* workspace, size_t workspace_bytes, void* stream);
  const char* (*status_text)(Status);
  size_t (*version)();
};

// The first symbol that is missing, or null.
const char* find_symbols(void* file, Library& library) {
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    void* const address = dlsym(file, name);
    if (!address && !missing) missing = name;
    function = reinterpret_cast<std::decay_t<decltype(function)>>(address);
  };
  find(library.create, "cublasLtCreate");
  find(library.create_operation, "cublasLtMatmulDescCreate");
  find(library.destroy_operation, "cublasLtMatmulDescDestroy");
  find(library.set_operation, "cublasLtMatmulDescSetAttribute");
  find(library.create_layout, "cublasLtMatrixLayoutCreate");
  find(library.destroy_layout, "cublasLtMatrixLayoutDestroy");
  find(library.create_preference, "cublasLtMatmulPreferenceCreate");
  find(library.destroy_preference, "cublasLtMatmulPreferenceDestroy");
  find(library.set_preference, "cublasLtMatmulPreferenceSetAttribute");
  find(library.choose, "cublasLtMatmulAlgoGetHeuristic");
  find(library.multiply, "cublasLtMatmul");
  find(library.status_text, "cublasLtGetStatusString");
  find(library.version, "cublasLtGetVersion");
  return missing;
}

// ---- what is kept of it
// ------------------------------------------------------------------------------------------------

constexpr uint64_t kMostWorkspaceBytes = uint64_t(32) << 20;
constexpr size_t kMostKept = 4096;  // products; then all are forgotten

auto key(const Product& p) {
  return std::make_tuple(p.M, p.N, p.K, p.lda, p.ldb, p.ldout, p.dtype, p.tf32, p.wide,
                         p.accumulate, p.a_transposed, p.b_transposed, p.device, p.alignment);
}
struct Before {
  bool operator()(const Product& p, const Product& q) const { return key(p) < key(q); }
};

// Never destroyed: the library may be unloaded before what is static here.
struct Vendor {
  std::mutex mutex;  // of all below
  Library library{};
  bool open = false;
  std::map<int, Handle> handles;  // by device
  std::map<Product, std::shared_ptr<const ChosenProduct>, Before> kept;
};
Vendor& vendor() {
  static Vendor* const instance = new Vendor;
  return *instance;
}

// Such as "float32 [8, 16] x [16, 4] on device 0": a and b as they are stored.
std::string describe(const Product& p) {
  static constexpr std::array<const char*, 4> names = {"float64", "float32", "bfloat16", "float16"};
  const auto size = [](int64_t rows, int64_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
  };
  std::string text = names[size_t(p.dtype)];
  if (p.dtype == Dtype::kFloat32 && p.tf32) text += " (TF32)";
  text += " " + (p.a_transposed ? size(p.K, p.M) + "^T" : size(p.M, p.K));
  text += " x " + (p.b_transposed ? size(p.N, p.K) + "^T" : size(p.K, p.N));
  return text + " on device " + std::to_string(p.device);
}

void check(const Library& library, Status status, const char* what, const Product& product) {
  if (status == kSuccess) return;
  throw std::runtime_error(std::string("cuBLASLt error while ") + what + " " + describe(product) +
                           ": " + library.status_text(status) + " (status " +
                           std::to_string(status) + ")");
}

DataType data_type(Dtype dtype, bool wide) {
  switch (dtype) {
    case Dtype::kFloat64:
      return kReal64;
    case Dtype::kFloat32:
      return kReal32;
    case Dtype::kBFloat16:
      return wide ? kReal32 : kRealBrain16;
    default:
      return wide ? kReal32 : kReal16;
  }
}

}  // namespace

// The library's matrices are column by column: what is stored row by row is, to it, transposed. So
// it multiplies b^T, its first operand, with a^T, and makes out^T.
struct ChosenProduct {
  const Product product;
  const Library& library;
  Handle handle = nullptr;
  Operation operation = nullptr;
  Layout first = nullptr, second = nullptr, result = nullptr;
  Algorithm algorithm{};
  size_t workspace_bytes = 0;

  ChosenProduct(const Product& product, const Library& library)
      : product(product), library(library) {}
  ChosenProduct(const ChosenProduct&) = delete;
  ~ChosenProduct() {
    if (operation) library.destroy_operation(operation);
    for (const Layout layout : {first, second, result})
      if (layout) library.destroy_layout(layout);
  }

  void choose(std::map<int, Handle>& handles) {
    const Product& p = product;
    const char* const what = "choosing how to multiply";
    const auto checked = [&](Status status) { check(library, status, what, p); };
    Handle& of_device = handles[p.device];
    if (!of_device) checked(library.create(&of_device));
    handle = of_device;
    const bool fp64 = p.dtype == Dtype::kFloat64;
    const bool tf32 = p.dtype == Dtype::kFloat32 && p.tf32;
    checked(library.create_operation(&operation,
                                     fp64   ? kCompute64
                                     : tf32 ? kComputeTf32
                                            : kCompute32,
                                     fp64 ? kReal64 : kReal32));
    const auto transpose = [&](OperationAttribute which, bool transposed) {
      const Transpose value = transposed ? kTransposed : kAsStored;
      checked(library.set_operation(operation, which, &value, sizeof value));
    };
    transpose(kTransposeA, p.b_transposed);
    transpose(kTransposeB, p.a_transposed);
    const auto stored = [&](Layout& layout, bool wide, int64_t rows, int64_t row, int64_t stride) {
      checked(library.create_layout(&layout, data_type(p.dtype, wide), uint64_t(row),
                                    uint64_t(rows), stride));
    };
    stored(first, false, p.b_transposed ? p.N : p.K, p.b_transposed ? p.K : p.N, p.ldb);
    stored(second, false, p.a_transposed ? p.K : p.M, p.a_transposed ? p.M : p.K, p.lda);
    stored(result, p.wide, p.M, p.N, p.ldout);

    Preference preference = nullptr;
    checked(library.create_preference(&preference));
    const auto destroy = [&](PreferenceOf* it) { library.destroy_preference(it); };
    const std::unique_ptr<PreferenceOf, decltype(destroy)> owner(preference, destroy);
    const auto prefer = [&](int which, const auto& value) {
      checked(library.set_preference(preference, PreferenceAttribute(which), &value, sizeof value));
    };
    prefer(kMaxWorkspaceBytes, kMostWorkspaceBytes);
    prefer(kReductionSchemes, kReductionInComputeType);
    for (int k = 0; k < 4; ++k) prefer(kMinAlignmentBytesA + k, uint32_t(p.alignment));
    HeuristicResult found{};
    int count = 0;
    checked(library.choose(handle, operation, first, second, result, result, preference, 1, &found,
                           &count));
    if (count < 1) throw std::runtime_error("cuBLASLt has no way to multiply " + describe(p));
    checked(found.state);
    algorithm = found.algorithm;
    workspace_bytes = found.workspace_bytes;
  }
};

std::string open_vendor(const std::string& name) {
  Vendor& v = vendor();
  const std::lock_guard<std::mutex> lock(v.mutex);
  if (v.open) return "";
  // First without loading: by its bare name a library is found that is loaded from anywhere.
  void* file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (!file) file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!file) {
    const char* const error = dlerror();
    return error ? error : name + " cannot be opened";
  }
  if (const char* const missing = find_symbols(file, v.library)) {
    dlclose(file);
    return name + " has no " + missing;
  }
  v.open = true;
  return "";
}

int64_t vendor_version() {
  Vendor& v = vendor();
  const std::lock_guard<std::mutex> lock(v.mutex);
  return v.open ? int64_t(v.library.version()) : 0;
}

VendorProduct::VendorProduct(const Product& product) {
  Vendor& v = vendor();
  const std::lock_guard<std::mutex> lock(v.mutex);
  if (!v.open)
    throw std::runtime_error("cuBLASLt is not open: cannot multiply " + describe(product));
  const auto found = v.kept.find(product);
  if (found != v.kept.end()) {
    chosen_ = found->second;
    return;
  }
  const auto chosen = std::make_shared<ChosenProduct>(product, v.library);
  chosen->choose(v.handles);
  if (v.kept.size() >= kMostKept) v.kept.clear();  // whoever runs one has a share in it
  chosen_ = v.kept[product] = chosen;
}

int64_t VendorProduct::workspace() const { return int64_t(chosen_->workspace_bytes); }

void VendorProduct::run(const void* a, const void* b, void* out, void* workspace,
                        void* stream) const {
  const ChosenProduct& c = *chosen_;
  const bool fp64 = c.product.dtype == Dtype::kFloat64;
  const float one = 1, beta = c.product.accumulate ? 1 : 0;
  const double one64 = 1, beta64 = c.product.accumulate ? 1 : 0;
  const void* const alphas = fp64 ? static_cast<const void*>(&one64) : &one;
  const void* const betas = fp64 ? static_cast<const void*>(&beta64) : &beta;
  check(c.library,
        c.library.multiply(c.handle, c.operation, alphas, b, c.first, a, c.second, betas, out,
                           c.result, out, c.result, &c.algorithm, workspace, c.workspace_bytes,
                           stream),
        "multiplying", c.product);
}

}  // namespace lstm_ext
