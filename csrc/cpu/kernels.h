// The CPU kernels of one instruction set, and the choice among those that run here.
#pragma once

#include "../params.h"

namespace lstm_ext {

template <class P>
struct LayerKernels {
  int64_t (*workspace)(const P&);  // bytes; of pointers, whether null counts
  void (*run)(const P&);
  bool (*side_by_side)(const P&);  // whether run_of_two() takes less time than run() of each
  int64_t (*workspace_of_two)(const OfTwo<P>&);
  void (*run_of_two)(const OfTwo<P>&);
};

// Numbers of one dtype as another: of float32 and the half types.
struct Conversion {
  const void* from;
  Dtype own;      // of those
  Dtype rounded;  // to which they are rounded on their way
  void* to;
  Dtype made;  // of what is written
  int64_t count;
};

// Cells alone, their gates in planes: of N sequences of so many units. All is float64, or none.
struct CellPlanes {
  Dtype given;   // of a and da
  Dtype states;  // of c_0, h_1 and c_1, and of their gradients
  int threads;
  int64_t N;
  int64_t units;
  const void* a;     // given [N, 4, units]: pre-activations
  const void* c0;    // states [N, units]
  const void* w_ch;  // acc [3, units], or null
  void* gates;       // acc [N, 4, units]: activated, which may be a; null: not wanted
  void* c;           // acc [N, units]: c_1; null: not wanted
  void* h_n;         // states [N, units]
  void* c_n;
  // backward, from gates, c and c_0
  const void* dh;  // states [N, units], or null for zero
  const void* dc;
  void* da;     // given [N, 4, units]
  void* dc0;    // states [N, units]
  void* dw_ch;  // acc [N, 3, units]; null without w_ch
};

struct CpuKernels {
  const char* name;
  bool bf16_products;  // whether that flag of params.h may be set
  bool byte_products;  // likewise
  LayerKernels<LstmForward> forward;
  LayerKernels<LstmBackward> backward;
  int64_t (*matmul_workspace)(const Matmul&);
  void (*matmul)(const Matmul&);
  void (*convert)(const Conversion&);
  void (*planes_forward)(const CellPlanes&);
  void (*planes_backward)(const CellPlanes&);
};

#if defined(__x86_64__)
extern const CpuKernels kKernelsAvx512Bf16;  // if LSTM_EXT_WITH_AVX512_BF16
extern const CpuKernels kKernelsAvx512Vnni;  // the next, but for products of bytes
extern const CpuKernels kKernelsAvx512;
extern const CpuKernels kKernelsAvx2;
#endif
#if defined(LSTM_EXT_WITH_NEON_DOT)
extern const CpuKernels kKernelsNeonBf16;  // the next, but for products of bf16
extern const CpuKernels kKernelsNeonDot;   // the portable ones, but for products of bytes
#endif
extern const CpuKernels kKernelsPortable;

// Best first, null-terminated: those that this machine can run.
const CpuKernels* const* runnable_cpu_kernels();

// The set in use: the best, unless select_cpu_kernels chose another.
const CpuKernels& cpu_kernels();

// Returns false, changing nothing, if no set of that name runs here.
bool select_cpu_kernels(const char* name);

// Whether OpenMP gives a team as many threads as are asked for. It gives fewer under
// OMP_DYNAMIC or OMP_THREAD_LIMIT; these kernels then share the work anew, oneDNN goes wrong.
bool openmp_grants(int threads);

}  // namespace lstm_ext
