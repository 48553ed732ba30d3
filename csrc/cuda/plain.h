// A plain layer in one call: its products over all steps, by the vendor's library, and the
// recurrence. One direction or two, the second reversed, with projections or without; no variants.
// No CUDA header.
//
// Letters as in engine.h; I inputs, D directions. Every address is on the device.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/engine.h"
#include "cuda/vendor.h"

namespace lstm_ext {

// What is null in one direction is so in both, but for the outputs of backward.
struct CudaPlainForward {
  struct Direction {
    const void* w_ih;  // storage [4H, I]
    const void* w_hh;  // storage [4H, P]
    const void* w_hr;  // storage [P, H]; null: no projection, P is H
    const void* b_ih;  // storage [4H], or null
    const void* b_hh;  // as b_ih
    const void* h0;    // storage [B, P]; null: zeros
    const void* c0;    // storage [B, H]; null: zeros
    void* gates;       // acc [rows, 4H]; null: not saved
    void* c_seq;       // acc [rows, H]; null: not saved
    void* h_n;         // storage [B, P]
    void* c_n;         // storage [B, H]
  };
  CudaLayer layer;  // its stream is set
  int64_t I;
  const void* x;  // storage [rows, I]
  void* y;        // storage [rows, D*P]; of one step and direction it may be h_n
  Direction direction[kMaxDirections];
};

struct CudaPlainBackward {
  struct Direction {
    const void* w_ih;  // inputs as in CudaPlainForward
    const void* w_hh;
    const void* w_hr;
    const void* h0;
    const void* c0;
    const void* gates;
    const void* c_seq;
    const void* dh_n;  // storage [B, P]; null: zero
    const void* dc_n;  // storage [B, H]; null: zero
    // Outputs; null: not wanted.
    void* dh0;    // storage [B, P]
    void* dc0;    // storage [B, H]
    void* dw_ih;  // storage [4H, I]
    void* dw_hh;  // storage [4H, P]
    void* dw_hr;  // storage [P, H]
    void* db_ih;  // storage [4H]; db_hh is the same
    void* db_hh;
  };
  CudaLayer layer;
  int64_t I;
  const void* x;
  const void* y;   // not read of one step
  const void* dy;  // storage [rows, D*P]; null: zero
  void* dx;        // storage [rows, I]; null: not wanted
  Direction direction[kMaxDirections];
};

// A call in two steps, between which the caller makes the scratch: bytes() of no particular
// contents, 256-byte aligned, until all that was launched is done. The device is current when one
// is made and when it runs; run() launches on the layer's stream and returns. Both throw as
// cuda_forward, cuda_backward and VendorProduct do.
class CudaPlainForwardRun {
 public:
  explicit CudaPlainForwardRun(const CudaPlainForward&);
  int64_t bytes() const { return cut(nullptr).bytes; }
  void run(void* scratch) const;

 private:
  struct Pieces {
    struct {
      void *gx, *w_hh, *w_hr;
    } direction[kMaxDirections];
    void* workspace;
    int64_t bytes;
  };
  Pieces cut(void* scratch) const;

  const CudaPlainForward p_;
  const VendorProduct input_;
};

class CudaPlainBackwardRun {
 public:
  explicit CudaPlainBackwardRun(const CudaPlainBackward&);
  int64_t bytes() const { return cut(nullptr).bytes; }
  void run(void* scratch) const;

 private:
  // What a dw_hh is a product with: the h that each step started from.
  enum class Previous {
    kZeros,
    kH0,        // the only step's
    kShifted,   // y, a step before: where the first h is zero and steps lie one after another, each
                // of all sequences, which none starts anew
    kGathered,  // made by the recurrence
  };
  struct Pieces {
    struct {
      void *dgates, *h_prev, *w_hh, *w_hr, *dr, *cell_out;
    } direction[kMaxDirections];
    void* x;  // null: as it is given
    void *dx, *workspace;
    int64_t bytes;
  };
  static Previous previous(const CudaPlainBackward&);
  Pieces cut(void* scratch) const;
  // Elements of dgates before those that kShifted multiplies: of the first step.
  int64_t late_gates(int direction) const;
  // The other factor of dw_hh, rows of P; h_prev: where kGathered has it.
  const void* hidden(int direction, const void* h_prev) const;
  void run_recurrence(const Pieces&) const;

  const CudaPlainBackward p_;
  const Previous previous_;
  const bool sums_dx_;   // of half types, in acc before it is rounded
  const bool clears_x_;  // whose padding may hold anything, NaN too: a zero must not meet it
  std::optional<VendorProduct> dx_, more_dx_, dw_ih_, dw_hh_, dw_hr_;
};

}  // namespace lstm_ext
