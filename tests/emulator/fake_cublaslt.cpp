// Stands in for libcublasLt, on the CPU: the functions that csrc/cuda/vendor.cpp looks for, after
// the library's documentation. It multiplies what the descriptors say, column by column, and
// refuses what they do not fit.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace {

enum { kSuccess = 0, kInvalidValue = 7, kNotSupported = 15 };

struct Operation {
  int compute, scale;
  int32_t transpose_a = 0, transpose_b = 0;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reductions = 7;
  uint32_t alignment[4] = {256, 256, 256, 256};
};
struct Algorithm {
  uint64_t alignment[4], workspace, unused[3];
};
struct Found {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

std::atomic<int> g_handles{0}, g_alive{0}, g_chosen{0}, g_multiplied{0};
std::atomic<int> g_next_status{kSuccess};  // of the next choice or product
std::atomic<int> g_state{kSuccess}, g_count{1};
std::atomic<uint32_t> g_reductions{0};

template <class T>
int set(T& where, const void* value, size_t bytes) {
  if (bytes != sizeof(T)) return kInvalidValue;
  std::memcpy(&where, value, bytes);
  return kSuccess;
}

double load(const void* p, int type, int64_t at) {
  switch (type) {
    case 0:
      return static_cast<const float*>(p)[at];
    case 1:
      return static_cast<const double*>(p)[at];
    case 2:
      return float(static_cast<const __half*>(p)[at]);
    default:
      return float(static_cast<const __nv_bfloat16*>(p)[at]);
  }
}
void store(void* p, int type, int64_t at, double value) {
  switch (type) {
    case 0:
      static_cast<float*>(p)[at] = float(value);
      break;
    case 1:
      static_cast<double*>(p)[at] = value;
      break;
    case 2:
      static_cast<__half*>(p)[at] = __half(float(value));
      break;
    default:
      static_cast<__nv_bfloat16*>(p)[at] = __nv_bfloat16(float(value));
  }
}

// To 10 bits of mantissa, ties away from zero.
double to_tf32(double value) {
  float rounded = float(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  bits = (bits + 0x1000) & ~0x1fffu;
  std::memcpy(&rounded, &bits, 4);
  return rounded;
}

// An operand as it is multiplied: its size, and where its elements lie.
struct Operand {
  const Layout& layout;
  bool transposed;
  uint64_t rows() const { return transposed ? layout.columns : layout.rows; }
  uint64_t columns() const { return transposed ? layout.rows : layout.columns; }
  int64_t at(uint64_t row, uint64_t column) const {
    return transposed ? int64_t(column) + int64_t(row) * layout.stride
                      : int64_t(row) + int64_t(column) * layout.stride;
  }
};

bool fits(const Operation& o, const Layout& a, const Layout& b, const Layout& d) {
  const Operand left{a, o.transpose_a == 1}, right{b, o.transpose_b == 1};
  return left.columns() == right.rows() && left.rows() == d.rows && right.columns() == d.columns;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fake_handles() { return g_handles; }
EXPORT int fake_alive() { return g_alive; }  // descriptors
EXPORT int fake_chosen() { return g_chosen; }
EXPORT int fake_multiplied() { return g_multiplied; }
EXPORT uint32_t fake_reductions() { return g_reductions; }
EXPORT void fake_fail_next(int status) { g_next_status = status; }
EXPORT void fake_find(int count, int state) {
  g_count = count;
  g_state = state;
}

EXPORT int cublasLtCreate(void** handle) {
  *handle = reinterpret_cast<void*>(intptr_t(++g_handles));
  return kSuccess;
}
EXPORT int cublasLtMatmulDescCreate(Operation** made, int compute, int scale) {
  *made = new Operation{compute, scale};
  ++g_alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulDescDestroy(Operation* operation) {
  delete operation;
  --g_alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulDescSetAttribute(Operation* o, int which, const void* value, size_t n) {
  if (which != 3 && which != 4) return kInvalidValue;
  return set(which == 3 ? o->transpose_a : o->transpose_b, value, n);
}
EXPORT int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns,
                                      int64_t stride) {
  if (stride < int64_t(rows) || !rows || !columns) return kInvalidValue;
  *made = new Layout{type, rows, columns, stride};
  ++g_alive;
  return kSuccess;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  --g_alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulPreferenceCreate(Preference** made) {
  *made = new Preference;
  ++g_alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulPreferenceDestroy(Preference* preference) {
  delete preference;
  --g_alive;
  return kSuccess;
}
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* p, int which, const void* value,
                                                size_t n) {
  if (which == 1) return set(p->workspace, value, n);
  if (which == 3) return set(p->reductions, value, n);
  return which < 5 || which > 8 ? kInvalidValue : set(p->alignment[which - 5], value, n);
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, const Operation* o, const Layout* a,
                                          const Layout* b, const Layout* c, const Layout* d,
                                          const Preference* p, int asked_for, Found* found,
                                          int* count) {
  ++g_chosen;
  if (const int status = g_next_status.exchange(kSuccess)) return status;
  if (!handle || asked_for < 1 || !fits(*o, *a, *b, *d) || c != d) return kInvalidValue;
  if (a->type != b->type || (d->type != a->type && d->type != 0)) return kNotSupported;
  g_reductions = p->reductions;
  *found = Found{};
  for (int k = 0; k < 4; ++k) found->algorithm.alignment[k] = p->alignment[k];
  // Sums over parts of a long K need room.
  found->workspace = found->algorithm.workspace =
      o->transpose_b == 1 ? 0 : d->rows * d->columns * 4;
  if (found->workspace > p->workspace) return kNotSupported;
  found->state = g_state;
  *count = g_count;
  return kSuccess;
}
EXPORT int cublasLtMatmul(void* handle, const Operation* o, const void* alpha, const void* a,
                          const Layout* a_layout, const void* b, const Layout* b_layout,
                          const void* beta, const void* c, const Layout* c_layout, void* d,
                          const Layout* d_layout, const Algorithm* algorithm, void* workspace,
                          size_t workspace_bytes, void* stream) {
  ++g_multiplied;
  if (const int status = g_next_status.exchange(kSuccess)) return status;
  const Operand left{*a_layout, o->transpose_a == 1}, right{*b_layout, o->transpose_b == 1};
  if (!handle || stream != reinterpret_cast<void*>(0x57) || c != d || c_layout != d_layout ||
      !fits(*o, *a_layout, *b_layout, *d_layout))
    return kInvalidValue;
  const void* const addresses[] = {a, b, c, d};
  for (int k = 0; k < 4; ++k) {
    if (reinterpret_cast<uintptr_t>(addresses[k]) % algorithm->alignment[k]) return kInvalidValue;
  }
  if (workspace_bytes < algorithm->workspace || (algorithm->workspace && !workspace))
    return kInvalidValue;
  if (algorithm->workspace) std::memset(workspace, 0xff, algorithm->workspace);
  const bool tf32 = o->compute == 77;
  const auto operand = [&](const void* p, const Layout& layout, int64_t at) {
    const double value = load(p, layout.type, at);
    return tf32 ? to_tf32(value) : value;
  };
  const double scale = load(alpha, o->scale, 0), kept = load(beta, o->scale, 0);
  for (uint64_t column = 0; column < d_layout->columns; ++column) {
    for (uint64_t row = 0; row < d_layout->rows; ++row) {
      double sum = 0;
      for (uint64_t k = 0; k < left.columns(); ++k) {
        sum += operand(a, *a_layout, left.at(row, k)) * operand(b, *b_layout, right.at(k, column));
      }
      const int64_t at = int64_t(row) + int64_t(column) * d_layout->stride;
      const double before = kept ? kept * load(c, c_layout->type, at) : 0;
      store(d, d_layout->type, at, scale * sum + before);
    }
  }
  return kSuccess;
}
EXPORT const char* cublasLtGetStatusString(int status) {
  return status == kNotSupported ? "not supported" : "an error";
}
EXPORT size_t cublasLtGetVersion() { return 130100; }
