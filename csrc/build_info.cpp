#include "build_info.h"

#include "build_config.h"  // written by CMake into the build folder

#if defined(__x86_64__) || defined(__i386__)
#define LSTM_EXT_X86 1
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lstm_ext {

BuildInfo build_info() {
  BuildInfo info{};
  info.version = LSTM_EXT_VERSION;
  info.compiler = LSTM_EXT_COMPILER;
  info.flags = LSTM_EXT_FLAGS;
  info.architecture = LSTM_EXT_ARCHITECTURE;
#ifdef _OPENMP
  info.openmp = true;
#endif
#ifdef LSTM_EXT_WITH_CUDA
  info.cuda = true;
#endif
  info.cuda_version = LSTM_EXT_CUDA_VERSION;
  info.cuda_archs = LSTM_EXT_CUDA_ARCHS;
  info.cuda_reason = LSTM_EXT_CUDA_REASON;
  return info;
}

CpuFeatures cpu_features() {
  CpuFeatures cpu{};
#ifdef LSTM_EXT_X86
  // __builtin_cpu_supports also asks the operating system (XGETBV).
  __builtin_cpu_init();
  cpu.avx2 = __builtin_cpu_supports("avx2");
  cpu.fma = __builtin_cpu_supports("fma");
  cpu.avx512f = __builtin_cpu_supports("avx512f");
  cpu.avx512bw = __builtin_cpu_supports("avx512bw");
  cpu.avx512dq = __builtin_cpu_supports("avx512dq");
  cpu.avx512vl = __builtin_cpu_supports("avx512vl");
  cpu.avx512cd = __builtin_cpu_supports("avx512cd");
  // The builtin knows "f16c" only from GCC 11 on, so its CPUID bit is read here. The
  // instructions use the AVX registers, whose support by the system AVX2 implies.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  cpu.f16c = cpu.avx2 && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  // Older compilers refuse these two names; a binary they build reports "no" for both.
#if defined(__clang__) ? __clang_major__ >= 19 : __GNUC__ >= 11
  cpu.avx512_vnni = __builtin_cpu_supports("avx512vnni");
  cpu.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
  cpu.amx_tile = __builtin_cpu_supports("amx-tile");
#endif
#elif defined(__aarch64__) && defined(__linux__)
  // Bits of Linux's interface, arch/arm64/include/uapi/asm/hwcap.h; older headers lack the names.
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  cpu.neon_dot = first >> 20 & 1;    // HWCAP_ASIMDDP
  cpu.sve = first >> 22 & 1;         // HWCAP_SVE
  cpu.neon_bf16 = second >> 14 & 1;  // HWCAP2_BF16
#endif
  return cpu;
}

}  // namespace lstm_ext
