// What this binary was built with and what the processor it runs on can do.
#pragma once

namespace lstm_ext {

// All strings are static, never null; empty where a field does not apply.
struct BuildInfo {
  const char* version;       // of the package the binary was built from
  const char* compiler;      // "GNU 12.2.0"
  const char* flags;         // common C++ flags, without the per-file instruction sets
  const char* architecture;  // target processor, "x86_64"
  bool openmp;
  bool cuda;
  const char* cuda_version;  // toolkit, "13.0.88"
  const char* cuda_archs;    // what the kernels were compiled for, "80-real;90a-real;120"
  const char* cuda_reason;   // why the CUDA sources were not built; empty if they were
};

BuildInfo build_info();

// Usable means: the processor has the instructions and the operating system saves
// their registers. All false on a processor of another architecture.
struct CpuFeatures {
  bool avx2, fma, f16c;
  bool avx512f, avx512bw, avx512dq, avx512vl, avx512cd;
  bool avx512_vnni;
  bool avx512_bf16;
  bool amx_tile;
  bool neon_dot;   // FEAT_DotProd: SDOT
  bool neon_bf16;  // FEAT_BF16: BFDOT
  bool sve;
};

CpuFeatures cpu_features();

}  // namespace lstm_ext
