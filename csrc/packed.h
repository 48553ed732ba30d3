// The rows of a packed sequence, from the number of sequences that take each of its steps.
#pragma once

#include <cstdint>

namespace lstm_ext {

// sizes [T]. Whether none is larger than the one before it, none negative, and their sum is `rows`.
inline bool is_packed(const int64_t* sizes, int64_t T, int64_t rows) {
  for (int64_t t = 0; t < T; ++t) {
    if (sizes[t] < 0 || sizes[t] > rows || (t && sizes[t] > sizes[t - 1])) return false;
    rows -= sizes[t];
  }
  return rows == 0;
}

// Of what is_packed: offsets [T], the first row of each step; lengths [sizes[0]], the steps of each
// sequence.
inline void packed_rows(const int64_t* sizes, int64_t T, int64_t* offsets, int64_t* lengths) {
  int64_t row = 0;
  for (int64_t t = 0; t < T; ++t) {
    offsets[t] = row;
    row += sizes[t];
    const int64_t next = t + 1 < T ? sizes[t + 1] : 0;
    for (int64_t b = next; b < sizes[t]; ++b) lengths[b] = t + 1;
  }
}

}  // namespace lstm_ext
