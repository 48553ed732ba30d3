// A ConvLSTM's layer as the CPU's core is told of it (conv.h), and its scratch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../params.h"
#include "conv_window.h"
#include "transpose.h"

namespace lstm_ext {

// Its tensors are dense, of one dtype, float32 or float64. rows: places of all images.
struct ConvLayer {
  Dtype dtype;
  Dtype h_dtype;  // as the caller sees h, which goes on rounded to that: dtype, or a half type
  int threads;
  int64_t T, N, C;
  bool reverse;
  ConvWindow of_x, of_h;
  const void* x;   // [T, N, pixels, in], or, if x_first, [T, N, in, pixels]
  bool x_first;    // channels first; and likewise h0_first and c0_first
  const void* h0;  // [N, pixels, C], or channels first
  bool h0_first;
  const void* c0;
  bool c0_first;
  const void* w_ih;  // [4C, in, kernel], or, unless w_ih_first, [4C, kernel, in]; likewise w_hh
  bool w_ih_first;
  const void* w_hh;
  bool w_hh_first;
  const void* bias;  // [4C], or null; and likewise what is added to it
  const void* more_bias;
  const void* w_ch;      // [3C], or null
  const uint8_t* on;     // [T, N] nonzero: the sequence takes the step; null: all of them do
  const uint8_t* reset;  // [T, N] nonzero: its state is zero before the step; null: none is
  // As conv_passes.on_cells has them: of T + 1 states the first is before the first step in memory,
  // so that a reverse direction begins with the last. For one that is null scratch is taken; not
  // for gates.
  void* h_first;     // [rows, C]: for h0
  void* h_out;       // [T, rows, C]
  void* c_seq;       // [memories, rows, C]
  int64_t memories;  // T + 1, or 2, which the steps take in turn
  void* gates;       // [T, rows, 4C]
  void* h_n;         // [rows, C]
  void* c_n;
  // backward: from those of the results the gradients of the gates, before activation, of the
  // states and, unless it is null, of x
  const void* dy;  // [T, rows, C], or null for zero
  bool of_h0;      // whether the gradient of h_first is wanted
  void* dgates;    // [T, rows, 4C]
  void* dx;        // [T, N, pixels, in]
  void* dh;        // [rows, C]: first of h_n, at last of h0
  void* dc;        // [2, rows, C]: the first of c_n, at last of c0
  void* dw_ch;     // [3C]
  // weights: their gradients, null if they are not wanted, from dgates
  const void* h_seq;  // [T, rows, C], before each step
  int64_t at_once;    // steps whose products are one; in the other calls 1
  void* dw_ih;        // [4C, in, kernel]
  void* dw_hh;
  void* dbias;  // [2, 4C], of which the first is it
  // scratch
  void* w;           // [4C, columns]: both weights
  void* columns;     // [at_once * rows, columns of x, then of h]
  void* image;       // [N, pixels, in]
  void* dw;          // [2, 4C, columns]
  void* dpeephole;   // [rows, 3C]; null without w_ch
  void* sums;        // [4C] double
  void* on_rows;     // [rows] int64_t: of a step, as Steps has lengths; null without `on`
  void* reset_rows;  // [rows] uint8_t: likewise

  int64_t all_columns() const { return of_x.columns() + of_h.columns(); }
  int64_t rows() const { return N * of_h.places(); }
  int64_t step_at(int64_t i) const { return reverse ? T - 1 - i : i; }
  int64_t before(int64_t t) const { return t + reverse; }
  int64_t after(int64_t t) const { return t + !reverse; }
  bool skips(int64_t t, int64_t b) const { return on && !on[t * N + b]; }
  bool resets(int64_t t, int64_t b) const { return reset && reset[t * N + b]; }
};

// Pieces of a call's scratch, one after the other; of no memory, to see how many bytes they are.
class ConvScratch {
 public:
  explicit ConvScratch(void* memory = nullptr) : start_(reinterpret_cast<uintptr_t>(memory)) {}

  // For what there is none yet.
  void take(void*& piece, int64_t bytes) {
    constexpr int64_t kLine = 64;
    if (piece) return;
    piece = reinterpret_cast<void*>(std::max<uintptr_t>(start_, kLine) + uintptr_t(taken_));
    taken_ += (bytes + kLine - 1) / kLine * kLine;
  }
  int64_t taken() const { return taken_; }

 private:
  uintptr_t start_;
  int64_t taken_ = 0;
};

// N images, channels last.
template <class E>
void channels_last(const ConvWindow& window, int64_t N, const E* images, bool first, E* to) {
  const int64_t n = window.channels, pixels = window.pixels(), size = n * pixels;
  if (!first) {
    std::memcpy(to, images, size_t(N * size) * sizeof(E));
    return;
  }
  for (int64_t b = 0; b < N; ++b) exchange_sides(images + b * size, n, pixels, to + b * size);
}

enum class ConvCall { kForward, kBackward, kWeights };

}  // namespace lstm_ext
