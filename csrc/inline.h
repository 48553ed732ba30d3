// Functions that every engine compiles for itself.
//
// Always inlined, since the same header is compiled for several instruction sets: an out-of-line
// copy made for AVX-512 must never be the one that the linker keeps for all of them.
#pragma once

#if defined(__CUDACC__)
#define LSTM_EXT_INLINE __host__ __device__ __forceinline__
#else
#define LSTM_EXT_INLINE inline __attribute__((always_inline))
#endif
