// The compiler's baseline for the architecture: SSE2 on x86-64, NEON on AArch64.
#define LSTM_EXT_ISA portable
#define LSTM_EXT_VECTOR_BYTES 16
#include "kernels_inl.h"

#if defined(LSTM_EXT_WITH_NEON_DOT)
LSTM_EXT_DEFINE_KERNELS(kKernelsNeonBf16, "neon_bf16", true, true)
LSTM_EXT_DEFINE_KERNELS(kKernelsNeonDot, "neon_dot", false, true)
#endif
LSTM_EXT_DEFINE_KERNELS(kKernelsPortable, "portable", false, false)
