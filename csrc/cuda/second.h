// Forward mode and second derivatives of a layer without variants: the two recurrences that
// lstm_ext/cpu/second.py derives. A product or more a step by the vendor's library, and a kernel
// for all else, two with a projection. No CUDA header.
//
// Elements are fp32 or fp64 throughout: storage = acc. Letters, Steps and rows as in params.h, K
// and padded() as in plan.h; every address is on the device. Rows of padding are left as they are.
#pragma once

#include <cstdint>

#include "cuda/plan.h"
#include "params.h"

namespace lstm_ext {

// What both passes share: one direction of a layer, and the point at which it is differentiated.
struct CudaSecond {
  Dtype dtype;  // kFloat32 or kFloat64
  bool tf32;    // fp32 products with operands rounded to TF32
  int device;   // index; the caller has made it current
  void* stream;
  Steps steps;  // with its reverse
  int64_t H, P;
  const void* gates;  // [rows, 4H] and [rows, H], as forward saved them
  const void* c_seq;
  const void* c0;  // [B, H]
};

// The tangents of forward.
struct CudaTangents {
  // [rows, 4H]: W_ih v_x + v_W_ih x + v_b. Becomes the tangents before the activations.
  void* gates;
  const void* gates_after;  // [rows, 4H]: v_W_hh h_t, for the step after t; null: nothing
  const void* gates_first;  // [B, 4H]: v_W_hh h0; null as gates_after
  const void* h_more;       // [rows, P]: v_W_hr o * tanh(c); null: nothing
  const void* w_hh;         // [4H, padded(P)], as in CudaForwardDirection
  const void* w_hr;         // [P, padded(H)]; null: no projection
  const void* c0;           // [B, H]: the tangent of c0; null: zero
  void* state;              // [B, padded(P)]: the tangent of h0, zero from column P on; overwritten
  void* c_seq;              // [rows, H]
  void* cell_out;           // [rows, H]: of o * tanh(c); null without a projection
  void* y;                  // [rows, P], row stride y_stride
  int64_t y_stride;
  // [B, P] and [B, H]: what they hold stays for a sequence without a step.
  void* h_n;
  void* c_n;
};

// What backward reads and writes, of it and of its tangent.
struct CudaSecondSide {
  const void* dy;  // [rows, P], row stride dy_stride; null: zero
  int64_t dy_stride;
  const void* dcells;  // [rows, H]; dh_n: [B, P]; dc_n: [B, H]; null: zero
  const void* dh_n;
  const void* dc_n;
  const void* h0;  // [B, P], for h_prev; null: zero
  const void* y;   // [rows, P], row stride y_stride, for h_prev
  int64_t y_stride;
  void* dgates;  // [rows, 4H]
  void* h_prev;  // [rows, P]: the h that each step started from, for dW_hh; null: not wanted
  void* dr;      // [rows, P]: whole gradient of each h_t; null: no projection
};

// Backward and its tangent, side by side: sides[0] is backward itself, sides[1] its tangent.
struct CudaSecondBackward {
  CudaSecondSide sides[2];
  const void* gates_dot;  // as CudaTangents left them
  const void* c_seq_dot;
  const void* c0_dot;  // [B, H]; null: zero
  const void* w_hh;    // [P, padded(4H)]: W_hh transposed
  const void* w_hr;    // [H, padded(P)]: W_hr transposed; null: no projection
  const void* v_hh;    // the directions in the weights' space likewise; null: zero
  const void* v_hr;
  // [B, P] and [B, H]: the tangents of h0's and c0's gradients. What they hold stays for a sequence
  // without a step.
  void* dh0;
  void* dc0;
};

// Bytes of scratch, which need no particular contents; 256-byte aligned.
int64_t cuda_tangents_workspace(const CudaSecond&, bool projection);
int64_t cuda_second_workspace(const CudaSecond&, bool projection);

// Launch on the stream and return; nothing waits. Throw std::invalid_argument for another dtype or
// sizes too large, std::runtime_error with CUDA's or the library's own text.
void cuda_tangents(const CudaSecond&, const CudaTangents&, void* workspace);
void cuda_second(const CudaSecond&, const CudaSecondBackward&, void* workspace);

}  // namespace lstm_ext
