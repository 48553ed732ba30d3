// Which products of backward over all steps are the core's, and which a library's.
#pragma once

#include "../params.h"

namespace lstm_ext {

// Whether the core makes out = a w, or a^T w of N + more_N columns, or torch does, which then is
// faster. Measured on two Zen 5 cores, 4 to 1600 rows, H 32 to 1024, one and two threads.
inline bool core_multiplies(bool bf16_products, int64_t M, int64_t N, int64_t K,
                            bool a_transposed) {
  // For one row, packing the weights costs more than the product: torch took about half the time
  // (H 32 to 256).
  if (!bf16_products) return (a_transposed ? K : M) > 1;
  // torch's take 10 to 20 us more to start. Large ones run near the processor's peak.
  if (!a_transposed) return K * N <= int64_t(1) << 18;
  // Gradients of weights, large beside the rows that they add up, torch writes in less time: half
  // of it for 4 rows and H 512.
  const int64_t written = M * N;
  const int64_t least_rows = written <= int64_t(1) << 17   ? 0
                             : written <= int64_t(1) << 19 ? 200
                                                           : 512;
  return K >= least_rows;
}

// Whether dh_0 of a single step is a product of its own, or the kernel's. W_hh has `weights`
// numbers; of a projection's few, packing them takes less time than torch does.
inline bool dh0_is_a_product(int64_t weights, bool projected) {
  return !projected || weights >= int64_t(1) << 16;
}

}  // namespace lstm_ext
