#include <omp.h>

#include <atomic>
#include <cstring>

#include "../build_info.h"
#include "kernels.h"

namespace lstm_ext {
namespace {

struct Runnable {
  const CpuKernels* list[6] = {};
  Runnable() {
    int count = 0;
    [[maybe_unused]] const CpuFeatures cpu = cpu_features();
#if defined(__x86_64__)
    const bool avx2 = cpu.avx2 && cpu.fma && cpu.f16c;
    const bool avx512 = cpu.avx512f && cpu.avx512bw && cpu.avx512dq && cpu.avx512vl && cpu.avx512cd;
#if defined(LSTM_EXT_WITH_AVX512_BF16)
    if (avx2 && avx512 && cpu.avx512_vnni && cpu.avx512_bf16) list[count++] = &kKernelsAvx512Bf16;
#endif
    if (avx2 && avx512 && cpu.avx512_vnni) list[count++] = &kKernelsAvx512Vnni;
    if (avx2 && avx512) list[count++] = &kKernelsAvx512;
    if (avx2) list[count++] = &kKernelsAvx2;
#endif
#if defined(LSTM_EXT_WITH_NEON_DOT)
    if (cpu.neon_dot && cpu.neon_bf16) list[count++] = &kKernelsNeonBf16;
    if (cpu.neon_dot) list[count++] = &kKernelsNeonDot;
#endif
    list[count++] = &kKernelsPortable;
  }
};

const Runnable& runnable() {
  static const Runnable instance;
  return instance;
}

std::atomic<const CpuKernels*> selected{nullptr};

}  // namespace

const CpuKernels* const* runnable_cpu_kernels() { return runnable().list; }

const CpuKernels& cpu_kernels() {
  const CpuKernels* chosen = selected.load(std::memory_order_relaxed);
  return chosen ? *chosen : *runnable().list[0];
}

bool select_cpu_kernels(const char* name) {
  for (const CpuKernels* const* k = runnable().list; *k; ++k) {
    if (std::strcmp((*k)->name, name) == 0) {
      selected.store(*k, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

bool openmp_grants(int threads) {
  return threads == 1 ||
         (!omp_get_dynamic() && omp_get_thread_limit() >= threads && !omp_in_parallel());
}

}  // namespace lstm_ext
