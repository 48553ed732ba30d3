// The cell alone, on pre-activations that somebody else made (a convolution). No CUDA header.
#pragma once

#include <cstdint>

#include "params.h"

namespace lstm_ext {

// One step of `rows` cells of `width` units; every address is on the device, every element a float
// or a double.
struct CudaCell {
  Dtype dtype;  // kFloat32 or kFloat64
  int64_t rows;
  int64_t width;
  const void* a;           // [rows, 4 width]: pre-activations, gates i, f, g, o
  const void* h;           // [rows, width], c likewise: before the step
  const void* c;           //
  const void* peephole;    // [3 width], rows i, f, o; null: none
  const int64_t* lengths;  // [rows]: a row of 0 takes no step; null: all take it
  void* stream;
};
struct CudaCellGradients {
  const void* dh;   // [rows, width]: of h after the step; null: zero
  const void* dc;   // as dh, of c
  void* da;         // [rows, 4 width]
  void* dh0;        // [rows, width]: of h before the step, which only a row reads that takes none
  void* dc0;        // [rows, width]
  void* dpeephole;  // [rows, 3 width]: to be summed over the rows; null: none
};

// Launch on the stream and return; the device must be current. Throw std::runtime_error with CUDA's
// own text.
void cuda_cell_forward(const CudaCell&, void* h, void* c);
// Makes the gates again: they are not kept.
void cuda_cell_backward(const CudaCell&, const CudaCellGradients&);

}  // namespace lstm_ext
