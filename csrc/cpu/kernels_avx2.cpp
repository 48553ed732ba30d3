#define LSTM_EXT_ISA avx2
#define LSTM_EXT_VECTOR_BYTES 32
#include "kernels_inl.h"

LSTM_EXT_DEFINE_KERNELS(kKernelsAvx2, "avx2", false, false)
