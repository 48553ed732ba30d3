// The compiler's baseline for the architecture: SSE2 on x86-64, NEON on AArch64.
#define LSTM_EXT_ISA portable
#define LSTM_EXT_VECTOR_BYTES 16
#include "kernels_inl.h"

LSTM_EXT_DEFINE_KERNELS(kKernelsPortable, "portable", false)
