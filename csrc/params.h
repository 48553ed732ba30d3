// What Python hands to the native core: plain structs of pointers, sizes and strides.
//
// Letters: T steps, B sequences, I inputs, H hidden units, P = size of h (H, or the projection's
// size), rows = number of (step, sequence) pairs that exist in memory. Every array is dense, last
// dimension contiguous, unless a stride is given; strides are in elements.
//
// Three element types appear: `storage` is the tensors' dtype (fp64, fp32, bf16, fp16); `acc` is
// the type the maths runs in (fp64 for fp64, fp32 for the rest); `operand` is what products
// multiply: storage with bf16_products, else acc.
#pragma once

#include <cstdint>

#include "inline.h"

namespace lstm_ext {

enum class Dtype : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Bytes of an element as it is stored, and as sums, gates and cell states are kept.
LSTM_EXT_INLINE int64_t storage_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
LSTM_EXT_INLINE int64_t acc_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

// Where step t of sequence b lies: row = (offsets ? offsets[t] : t * stride_t) + b * stride_b.
struct Steps {
  int64_t T;
  int64_t B;
  int64_t rows;
  int64_t stride_t;
  int64_t stride_b;
  const int64_t* offsets;  // [T] first row of each step (packed sequences), or null
  const int64_t* lengths;  // [B] steps of each sequence, 0..T, or null: all T
  const uint8_t* reset;    // [T, B] nonzero: the state is zero before that step; or null
  bool reverse;            // walk the steps T-1 .. 0 instead of 0 .. T-1

  // Always inlined (see inline.h).
  LSTM_EXT_INLINE bool active(int64_t t, int64_t b) const { return !lengths || t < lengths[b]; }
  // How many sequences from `begin` to `end` take step t.
  LSTM_EXT_INLINE int64_t count(int64_t t, int64_t begin, int64_t end) const {
    if (!lengths) return end - begin;
    int64_t active_ones = 0;
    for (int64_t b = begin; b < end; ++b) active_ones += active(t, b);
    return active_ones;
  }
  LSTM_EXT_INLINE int64_t row(int64_t t, int64_t b) const {
    return (offsets ? offsets[t] : t * stride_t) + b * stride_b;
  }
  // The step taken in the i-th place, and the last step (in order of taking) of a sequence.
  LSTM_EXT_INLINE int64_t step_at(int64_t i) const { return reverse ? T - 1 - i : i; }
  LSTM_EXT_INLINE int64_t first_step(int64_t b) const {
    return reverse ? (lengths ? lengths[b] : T) - 1 : 0;
  }
  LSTM_EXT_INLINE int64_t last_step(int64_t b) const {
    return reverse ? 0 : (lengths ? lengths[b] : T) - 1;
  }
};

// What one direction has beside nn.LSTM's own. All zero: nothing. Each part is there or not on its
// own, but the three gammas and betas, which are all there or all null.
struct Variants {
  const void* peephole;   // storage [3H], gates i, f, o; null: none
  const void* gamma_hh;   // storage [4H]: factors of the normalized recurrent product, gates i, f,
                          // g, o; null: no layer norm
  const void* gamma_ch;   // storage [H]: factors of the normalized c, in h = o * tanh(norm(c))
  const void* beta_ch;    // storage [H]: added to it
  double epsilon;         // of the layer norms
  const void* h_dropout;  // acc [B, P]: factors of h_{t-1} in the recurrent product; null: 1
  // Zoneout: what part of h_{t-1} and c_{t-1} stays.
  const uint8_t* keep_h;  // [rows, P] 0 or 1; null: keep_h_all everywhere
  const uint8_t* keep_c;  // [rows, H] 0 or 1; null: keep_c_all everywhere
  double keep_h_all;      // 0: no zoneout of h
  double keep_c_all;      // 0: no zoneout of c

  // Always inlined (see inline.h).
  LSTM_EXT_INLINE bool zoneout_h() const { return keep_h || keep_h_all != 0; }
  LSTM_EXT_INLINE bool zoneout_c() const { return keep_c || keep_c_all != 0; }
};

// What a tangent is taken of (forward mode), as forward made it. Then that forward's parameters are
// tangents, all but the weights: x, the biases, h0 and c0, and what is made: in gates those before
// the activations. gx, or null, is added to what is made of x, or null. Without bf16_products and
// variants, storage = acc.
struct TangentOf {
  const void* gates;     // acc [rows, 4H]; null: it is no tangent
  const void* c_seq;     // acc [rows, H]
  const void* c0;        // acc [B, H]
  const void* gx_after;  // acc [rows, 4H]: h_t times the tangent of W_hh^T, added to gx of the next
                         // step; null: nothing
  const void* gx_first;  // acc [B, 4H]: h0 likewise; null as gx_after
  const void* h_more;    // acc [rows, P]: o * tanh(c) times the tangent of W_hr^T; null: nothing
  void* cell_out;        // acc [rows, H]: the tangent of o * tanh(c); null: not wanted
};

// Forward with weights of 8 bits. w_ih, w_hh and w_hr are then as cpu/quantized.h says, b_ih, the
// sum of both, is float or null, x is float, and there is no layer norm.
struct QuantizedWeights {
  // Codes lie in blocks of so many rows of weights, so many along a row side by side.
  static constexpr int64_t kRows = 16, kDepth = 4;
  static constexpr int64_t kMostColumns = 1 << 16;  // so many products have a sum of 32 bits

  const float* ih_scale;  // [4H]; null: weights are of the storage type
  const float* hh_scale;  // [4H]
  const float* hr_scale;  // [P]; null without a projection
  int row_bits;           // of what they are multiplied with: 16 or 8
  bool byte_products;     // by an instruction for bytes, if CpuKernels::byte_products
};

// One direction of one layer. Rows of sequences past their length are left as they are.
struct LstmForward {
  Dtype dtype;
  // Of bf16 without variants, if CpuKernels::bf16_products: the operands of products are bf16, the
  // sums fp32. x, and in backward dgates, dr and cell_out, are then of the operand's type, and rows
  // of x and dr, if their length is odd, have a zero more.
  bool bf16_products;
  int threads;      // at most this many; the plan may use fewer
  bool pack_input;  // and W_hh, even for few rows: sums do not depend on how many there are
  Steps steps;
  int64_t H;
  int64_t P;
  int64_t I;
  // inputs
  void* gx;          // acc [rows, 4H]: x W_ih^T + b_ih + b_hh, gates i, f, g, o; null if x is given
  const void* x;     // operand [rows, I]; null: gx holds its product already, else it is made here
  const void* w_ih;  // storage [4H, I]; read if x is not null
  const void* b_ih;  // storage [4H], or null; read if x is not null
  const void* b_hh;  // as b_ih
  const void* w_hh;  // storage [4H, P]; null: no recurrent product (the caller added it to gx)
  const void* w_hr;  // storage [P, H]; null: no projection, then P = H
  const void* h0;    // storage [B, P]
  const void* c0;    // storage [B, H]
  Variants variants;
  // saved for backward
  void* gates;   // acc [rows, 4H] post-activation gates; null: not saved; may be gx itself
  void* c_seq;   // acc [rows, H] every c_t; null: not saved
  void* norm;    // acc [rows, 4H] normalized recurrent products; null: no layer norm, or not saved
  void* norm_r;  // acc [rows] reciprocal standard deviations of those; null as norm
  // outputs
  void* y;           // storage [rows, P], row stride y_stride
  int64_t y_stride;  // of rows, in elements
  void* h_n;         // storage [B, P]
  void* c_n;         // storage [B, H]
  void* workspace;   // forward_workspace() bytes, 64-byte aligned, contents irrelevant
  TangentOf tangent_of;
  QuantizedWeights quantized;
};

// The tangents with which backward's own tangent is made (the derivative of a derivative): of the
// gradients of what is read in LstmBackward, which holds the point, to those of what is written.
// dy, dh_n and the like are then tangents. Without bf16_products and variants, storage = acc.
struct Tangents {
  const void* gates;  // acc [rows, 4H]: before the activations, from a forward with TangentOf;
                      // null: this is a backward itself
  const void* c_seq;  // acc [rows, H]
  const void* c0;     // acc [B, H]
  const void* dout;   // acc [rows, H]: dout_seq and dc_seq as backward made them
  const void* dc;
  const void* dh_more;    // acc [rows, P]: dgates times the tangent of W_hh; null: nothing
  const void* dout_more;  // acc [rows, H]: dr times the tangent of W_hr; null: nothing
};

struct LstmBackward {
  Dtype dtype;
  bool bf16_products;  // as in LstmForward
  int threads;
  Steps steps;
  int64_t H;
  int64_t P;
  Variants variants;
  // inputs
  const void* w_hh;  // as in LstmForward; null: dh0 gets no product (the caller adds it)
  const void* w_hr;  // as in LstmForward
  const void* h0;    // storage [B, P]; read for h_prev only, else may be null
  const void* c0;    // storage [B, H]
  const void* y;  // storage [rows, P], row stride y_stride; read for h_prev only, else may be null
  int64_t y_stride;
  const void* gates;   // acc [rows, 4H] as forward saved them
  const void* c_seq;   // acc [rows, H] as forward saved it
  const void* norm;    // acc [rows, 4H] as forward saved it; null: no layer norm
  const void* norm_r;  // acc [rows], likewise
  const void* dy;      // storage [rows, P], row stride dy_stride; null: zero
  int64_t dy_stride;
  const void* dh_n;    // storage [B, P]; null: zero
  const void* dc_n;    // storage [B, H]; null: zero
  const void* dcells;  // storage [rows, H]: gradient of every c_t; null: zero
  const void* x;       // storage [rows, I]; read with dw_hh only
  const void* w_ih;    // storage [4H, I]; read for dx only
  int64_t I;
  // outputs
  void* dgates;    // operand [rows, 4H]: gradient before the activations; must not be gates; null
                   // with dw_hh
  void* dproduct;  // acc [rows, 4H]: gradient of the recurrent product; null: no layer norm, then
                   // it is dgates
  void* h_prev;  // storage [rows, P]: what W_hh was multiplied with at each step, for dW_hh; null:
                 // not wanted, or dw_hh is
  void* dr;      // operand [rows, P]: gradient of each product with W_hr, for dW_hr; null: no
                 // projection
  void* cell_out;   // operand [rows, H]: what W_hr was multiplied with, for dW_hr; null: not wanted
  void* dpeephole;  // acc [B, 3H]: sums over the steps, added to what is there; null: none
  void* dnorm;      // acc [B, 6H]: likewise of gamma_hh (4H), gamma_ch and beta_ch; null: none
  void* dh0;        // storage [B, P]
  void* dc0;        // storage [B, H]
  void* dout_seq;   // acc [rows, H]: gradient of each o * tanh(c); null: not wanted
  void* dc_seq;     // acc [rows, H]: of each c, with what comes through that; null as dout_seq
  // The gradients of products, made beside the recurrence. All null: the caller makes them. Not
  // with a layer norm, and T > 0. With lengths they are zeros before: padding is left as it is, and
  // so is everything if no sequence has a step.
  void* dx;         // acc [rows, I]; null: not wanted
  void* dw_ih;      // acc [4H, I]
  void* dw_hh;      // acc [4H, P]
  void* db;         // acc [4H]; null: not wanted
  void* workspace;  // backward_workspace() bytes, 64-byte aligned, contents irrelevant
  Tangents tangents;
};

// Both directions of a layer, of the same dtype, products, sizes and threads; the first's workspace
// is for both.
template <class P>
struct OfTwo : P {
  P second;
};

// out = a w, or a^T w, over one long dimension K; of the same a, more_out = a more_w at once.
struct Matmul {
  Dtype dtype;         // of w
  bool bf16_products;  // a and w are multiplied as bf16; K is then even, unless a is transposed
  int threads;
  int64_t M;
  int64_t N;
  int64_t more_N;  // 0: no more_w
  int64_t K;
  bool a_transposed;
  const void* a;       // operand [M, K], or [K, M] if transposed
  const void* w;       // storage [K, N]
  const void* more_w;  // storage [K, more_N]
  bool rounded;        // out and more_out are storage, else acc
  void* out;           // [M, N]
  void* more_out;      // [M, more_N]
  void* sums;          // acc [M]: of a over K, if a is transposed; null: not wanted
  void* workspace;     // matmul_workspace() bytes, 64-byte aligned, contents irrelevant
};

}  // namespace lstm_ext
