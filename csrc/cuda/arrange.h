// Small passes over matrices, before and after the recurrence. No CUDA header.
#pragma once

#include <cstdint>

#include "params.h"

namespace lstm_ext {

// All launch on the stream and return; the device must be current, every address is on it. Throw
// std::runtime_error with CUDA's own text.

// Makes the device current for what this thread asks of CUDA.
void cuda_make_current(int device);

// out [columns, width] = m [rows, columns] transposed, or out [rows, width] = m; zero past the end
// of m's part of a row. out overlaps no m.
struct CudaArrangement {
  Dtype dtype;
  bool transposed;
  int64_t rows, columns;
  int64_t width;
};
void cuda_arrange(const CudaArrangement&, const void* m, void* out, void* stream);

// The sums of m [rows, columns] over its rows, made in type acc in a fixed order, once or twice.
// first, second: storage [columns], or null.
void cuda_sum_rows(Dtype, const void* m, int64_t rows, int64_t columns, void* first, void* second,
                   void* stream);

// m [count] of type acc, rounded to storage. out overlaps no m.
void cuda_round(Dtype, const void* m, void* out, int64_t count, void* stream);

// out [steps.rows, columns] = m, and zero in the rows past the end of a sequence, where m may hold
// anything. Of padded steps with lengths.
void cuda_clear_padding(Dtype, const Steps&, const void* m, int64_t columns, void* out,
                        void* stream);

// out [steps.rows, H] = o * tanh(c), and zero in the padding. gates: acc [rows, 4H], c_seq: acc
// [rows, H], as forward saved them; out: storage.
void cuda_cell_outputs(Dtype, const Steps&, const void* gates, const void* c_seq, int64_t H,
                       void* out, void* stream);

void cuda_zero(void* memory, int64_t bytes, void* stream);

}  // namespace lstm_ext
