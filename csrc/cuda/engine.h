// The CUDA engine as the bindings see it: parameters, and the calls. No CUDA header.
//
// Letters, Steps and dtypes as in params.h; every address is on the device. K is the length of a
// row of a product padded to whole chunks: padded(n) below.
#pragma once

#include <cstdint>

#include "cuda/plan.h"
#include "params.h"

namespace lstm_ext {

constexpr int kMaxDirections = 2;

// What all directions of a layer share.
struct CudaLayer {
  Dtype dtype;
  bool tf32;   // fp32 products on tensor cores, operands rounded to TF32
  int device;  // index; the caller has made it current
  void* stream;
  int directions;
  Steps steps;  // reverse is not read: each direction has its own
  int64_t H;
  int64_t P;
  int64_t K;      // padded(P)
  bool variants;  // a direction has some; normed: a layer norm
  bool normed;
  CudaPlan plan;
};

struct CudaForwardDirection {
  bool reverse;
  void* gx;          // acc [rows, 4H]: x W_ih^T, without the biases
  const void* b_ih;  // storage [4H], or null
  const void* b_hh;  // as b_ih
  const void* w_hh;  // storage [4H, K], zero from column P on, 16-byte aligned
  const void* w_hr;  // storage [P, padded(H)], as w_hh; null: no projection
  const void* h0;    // storage [B, P]; null: zeros
  const void* c0;    // storage [B, H]; null: zeros
  Variants variants;
  void* gates;  // acc [rows, 4H]; null: not saved; may be gx itself
  void* c_seq;  // acc [rows, H]; null: not saved
  void* norm;   // acc [rows, 4H], norm_r: acc [rows]: as in LstmForward
  void* norm_r;
  void* y;  // storage [rows, P], row stride y_stride
  int64_t y_stride;
  void* h_n;  // storage [B, P]
  void* c_n;  // storage [B, H]
};

struct CudaBackwardDirection {
  bool reverse;
  const void* w_hh;  // storage [P, padded(4H)]: W_hh transposed
  const void* w_hr;  // storage [H, K]: W_hr transposed; null: no projection
  const void* h0;    // storage [B, P]; read for h_prev only; null: zeros
  const void* c0;    // storage [B, H]; null: zeros
  const void* y;     // storage [rows, P], row stride y_stride; read for h_prev only
  int64_t y_stride;
  const void* gates;  // acc [rows, 4H], c_seq: acc [rows, H], as forward saved them
  const void* c_seq;
  Variants variants;
  const void* norm;  // acc [rows, 4H], norm_r: acc [rows], as forward saved them
  const void* norm_r;
  const void* dy;  // storage [rows, P], row stride dy_stride; null: zero
  int64_t dy_stride;
  const void* dh_n;    // storage [B, P]; null: zero
  const void* dc_n;    // storage [B, H]; null: zero
  const void* dcells;  // storage [rows, H]; null: zero
  void* dgates;        // storage [rows, 4H]; with a layer norm acc: its derivative cancels
  void* dproduct;      // storage [rows, 4H], cell_out: storage [rows, H], dpeephole: acc [B, 3H],
  void* cell_out;      // dnorm: acc [B, 6H]: as in LstmBackward
  void* dpeephole;
  void* dnorm;
  void* h_prev;  // storage [rows, P]: the h each step started from; null: not wanted
  void* dr;      // storage [rows, P]: whole gradient of each h_t; null: no projection
  void* dh0;     // storage [B, P]; null: not wanted
  void* dc0;     // storage [B, H]; null: not wanted
};

// Throws std::invalid_argument for sizes that the kernels cannot count in 32 bits.
void require_sizes(const Steps&, int64_t H, int64_t P);

// Bytes of scratch, which need no particular contents; 256-byte aligned.
int64_t cuda_forward_workspace(const CudaLayer&, bool projection);
int64_t cuda_backward_workspace(const CudaLayer&, bool projection);

// Steps first .. last - 1, in the order in which the pass takes them. Clusters may do a part of the
// steps a call, in turn, with the same workspace and tensors: the bits of all at once. A later part
// reads what the earlier ones left in the workspace, y (forward) or dgates (backward), and nothing
// of a part is read before its own call: not its gx, not its dy. The last part in backward makes
// dh0 and dc0 too; the first in backward makes all of h_prev.
struct StepRange {
  int64_t first, last;
};

// Both launch on the stream and return; nothing waits. Throw std::invalid_argument for a plan that
// does not fit the layer, std::runtime_error with CUDA's own text for a call that fails.
void cuda_forward(const CudaLayer&, const CudaForwardDirection*, void* workspace, StepRange);
void cuda_backward(const CudaLayer&, const CudaBackwardDirection*, void* workspace, StepRange);

}  // namespace lstm_ext
