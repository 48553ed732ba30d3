#define LSTM_EXT_ISA avx512_bf16
#define LSTM_EXT_VECTOR_BYTES 64
#include "kernels_inl.h"

LSTM_EXT_DEFINE_KERNELS(kKernelsAvx512Bf16, "avx512_bf16", true, true)
