#define LSTM_EXT_ISA avx512
#define LSTM_EXT_VECTOR_BYTES 64
#include "kernels_inl.h"

LSTM_EXT_DEFINE_KERNELS(kKernelsAvx512Vnni, "avx512_vnni", false, true)
LSTM_EXT_DEFINE_KERNELS(kKernelsAvx512, "avx512", false, false)
