#include <algorithm>

#include "cuda/arrange.h"
#include "cuda/launch.h"
#include "cuda/plain.h"
#include "cuda/scratch.h"

namespace lstm_ext {
namespace {

// Row-major, as it is stored without gaps.
Product product_of(const CudaLayer& layer, int64_t M, int64_t N, int64_t K, bool a_transposed,
                   bool b_transposed) {
  Product p{};
  p.dtype = layer.dtype;
  p.tf32 = layer.tf32;
  p.a_transposed = a_transposed;
  p.b_transposed = b_transposed;
  p.device = layer.device;
  p.M = M;
  p.N = N;
  p.K = K;
  p.lda = a_transposed ? M : K;
  p.ldb = b_transposed ? K : N;
  p.ldout = N;
  return p;
}

// One for all directions. alignment(k): of the addresses of direction k.
template <class Alignment>
VendorProduct choose(const CudaLayer& layer, Product product, const Alignment& alignment) {
  product.alignment = alignment(0);
  for (int k = 1; k < layer.directions; ++k)
    product.alignment = std::min(product.alignment, alignment(k));
  return VendorProduct(product);
}

// An address of storage so many elements on; null stays null.
template <class Void>
Void* ahead(const CudaLayer& layer, Void* address, int64_t elements) {
  if (!address) return nullptr;
  const int64_t bytes = elements * storage_bytes(layer.dtype);
  return reinterpret_cast<Void*>(reinterpret_cast<uintptr_t>(address) + uintptr_t(bytes));
}

bool any(const CudaPlainBackward& p, void* CudaPlainBackward::Direction::* wanted) {
  return p.direction[0].*wanted || (p.layer.directions > 1 && p.direction[1].*wanted);
}

// Where w (rows, columns) is arranged for forward; null if it can be read as it is.
void* room_for(Cutter& cutter, const CudaLayer& layer, const void* w, int64_t rows,
               int64_t columns) {
  const int64_t width = padded(columns, layer.dtype);
  if (width == columns && alignment_of({w}) >= 16) return nullptr;
  return cutter.take(rows * width * storage_bytes(layer.dtype));
}

// w (rows, columns), or its transpose, as the recurrence reads it: in `room`, or where it is.
const void* arranged(const CudaLayer& layer, const void* w, int64_t rows, int64_t columns,
                     bool transposed, void* room) {
  if (!w || !room) return w;
  const int64_t width = padded(transposed ? rows : columns, layer.dtype);
  cuda_arrange({layer.dtype, transposed, rows, columns, width}, w, room, layer.stream);
  return room;
}

// gx = x W_ih^T.
VendorProduct input_product(const CudaPlainForward& p) {
  make_current(p.layer.device);
  Product product = product_of(p.layer, p.layer.steps.rows, 4 * p.layer.H, p.I, false, true);
  product.wide = true;
  return choose(p.layer, product, [&](int k) {
    return alignment_of({p.x, p.direction[k].w_ih, p.direction[k].gates});
  });
}

}  // namespace

CudaPlainForwardRun::CudaPlainForwardRun(const CudaPlainForward& p)
    : p_(p), input_(input_product(p)) {}

CudaPlainForwardRun::Pieces CudaPlainForwardRun::cut(void* scratch) const {
  const CudaLayer& l = p_.layer;
  Cutter cutter(scratch);
  Pieces pieces{};
  for (int k = 0; k < l.directions; ++k) {
    const auto& d = p_.direction[k];
    auto& piece = pieces.direction[k];
    piece.gx = d.gates ? d.gates : cutter.take(l.steps.rows * 4 * l.H * acc_bytes(l.dtype));
    piece.w_hh = room_for(cutter, l, d.w_hh, 4 * l.H, l.P);
    if (d.w_hr) piece.w_hr = room_for(cutter, l, d.w_hr, l.P, l.H);
  }
  // One after the other.
  const int64_t recurrence = cuda_forward_workspace(l, p_.direction[0].w_hr);
  pieces.workspace = cutter.take(std::max(input_.workspace(), recurrence));
  pieces.bytes = cutter.used();
  return pieces;
}

void CudaPlainForwardRun::run(void* scratch) const {
  const CudaLayer& l = p_.layer;
  const Pieces pieces = cut(scratch);
  make_current(l.device);
  CudaForwardDirection directions[kMaxDirections] = {};
  for (int k = 0; k < l.directions; ++k) {
    const auto& from = p_.direction[k];
    const auto& piece = pieces.direction[k];
    input_.run(p_.x, from.w_ih, piece.gx, pieces.workspace, l.stream);
    CudaForwardDirection& d = directions[k];
    d.reverse = k == 1;
    d.gx = piece.gx;
    d.b_ih = from.b_ih;
    d.b_hh = from.b_hh;
    d.w_hh = arranged(l, from.w_hh, 4 * l.H, l.P, false, piece.w_hh);
    d.w_hr = arranged(l, from.w_hr, l.P, l.H, false, piece.w_hr);
    d.h0 = from.h0;
    d.c0 = from.c0;
    d.gates = from.gates;  // a row's gx is read before they are
    d.c_seq = from.c_seq;
    d.y = ahead(l, p_.y, k * l.P);
    d.y_stride = l.directions * l.P;
    d.h_n = from.h_n;
    d.c_n = from.c_n;
  }
  cuda_forward(l, directions, pieces.workspace, {0, l.steps.T});
}

// ---- backward -----------------------------------------------------------------------------------

CudaPlainBackwardRun::CudaPlainBackwardRun(const CudaPlainBackward& p)
    : p_(p),
      previous_(previous(p)),
      sums_dx_(p.dx && p.layer.directions > 1 &&
               acc_bytes(p.layer.dtype) != storage_bytes(p.layer.dtype)),
      clears_x_(p.layer.steps.lengths && !p.layer.steps.offsets &&
                any(p, &CudaPlainBackward::Direction::dw_ih)) {
  const CudaLayer& l = p_.layer;
  make_current(l.device);
  const int64_t rows = l.steps.rows, gates = 4 * l.H;
  if (p_.dx) {
    Product product = product_of(l, rows, p_.I, gates, false, false);
    product.wide = sums_dx_;
    const auto alignment = [&](int k) {
      return alignment_of({p_.direction[k].w_ih, sums_dx_ ? nullptr : p_.dx});
    };
    dx_ = choose(l, product, alignment);
    product.accumulate = true;
    if (l.directions > 1) more_dx_ = choose(l, product, alignment);
  }
  if (any(p_, &CudaPlainBackward::Direction::dw_ih)) {
    dw_ih_ = choose(l, product_of(l, gates, p_.I, rows, true, false), [&](int k) {
      return alignment_of({clears_x_ ? nullptr : p_.x, p_.direction[k].dw_ih});
    });
  }
  if (any(p_, &CudaPlainBackward::Direction::dw_hh) && previous_ != Previous::kZeros) {
    const bool shifted = previous_ == Previous::kShifted;
    Product product = product_of(l, gates, l.P, shifted ? rows - l.steps.B : rows, true, false);
    if (shifted) product.ldb = l.directions * l.P;
    dw_hh_ = choose(l, product, [&](int k) {
      const int64_t late = late_gates(k) * storage_bytes(l.dtype);
      return alignment_of(
          {p_.direction[k].dw_hh, reinterpret_cast<const void*>(late), hidden(k, nullptr)});
    });
  }
  if (any(p_, &CudaPlainBackward::Direction::dw_hr)) {
    dw_hr_ = choose(l, product_of(l, l.P, l.H, rows, true, false),
                    [&](int k) { return alignment_of({p_.direction[k].dw_hr}); });
  }
}

CudaPlainBackwardRun::Previous CudaPlainBackwardRun::previous(const CudaPlainBackward& p) {
  const Steps& steps = p.layer.steps;
  const bool zeros = !p.direction[0].h0;
  const bool all_active = !steps.lengths || steps.offsets;  // in the first step
  if (steps.T == 1 && zeros) return Previous::kZeros;
  if (steps.T == 1 && all_active && !steps.reset) return Previous::kH0;
  const bool whole = !steps.offsets && !steps.lengths && !steps.reset && steps.stride_b == 1;
  return zeros && whole ? Previous::kShifted : Previous::kGathered;
}

int64_t CudaPlainBackwardRun::late_gates(int direction) const {
  const bool late = previous_ == Previous::kShifted && direction == 0;
  return late ? p_.layer.steps.B * 4 * p_.layer.H : 0;
}

const void* CudaPlainBackwardRun::hidden(int direction, const void* h_prev) const {
  const CudaLayer& l = p_.layer;
  switch (previous_) {
    case Previous::kH0:
      return p_.direction[direction].h0;
    case Previous::kShifted:  // the reversed direction's from the second step on
      return ahead(l, p_.y, direction * (l.P + l.steps.B * l.directions * l.P));
    default:
      return h_prev;
  }
}

CudaPlainBackwardRun::Pieces CudaPlainBackwardRun::cut(void* scratch) const {
  const CudaLayer& l = p_.layer;
  const int64_t storage = storage_bytes(l.dtype), rows = l.steps.rows;
  Cutter cutter(scratch);
  Pieces pieces{};
  for (int k = 0; k < l.directions; ++k) {
    const auto& d = p_.direction[k];
    auto& piece = pieces.direction[k];
    piece.dgates = cutter.take(rows * 4 * l.H * storage);
    if (previous_ == Previous::kGathered && d.dw_hh)
      piece.h_prev = cutter.take(rows * l.P * storage);
    piece.w_hh = cutter.take(l.P * padded(4 * l.H, l.dtype) * storage);
    if (!d.w_hr) continue;
    piece.w_hr = cutter.take(l.H * l.K * storage);
    piece.dr = cutter.take(rows * l.P * storage);
    if (d.dw_hr) piece.cell_out = cutter.take(rows * l.H * storage);
  }
  if (clears_x_) pieces.x = cutter.take(rows * p_.I * storage);
  if (sums_dx_) pieces.dx = cutter.take(rows * p_.I * acc_bytes(l.dtype));
  // One after the other.
  int64_t workspace = cuda_backward_workspace(l, p_.direction[0].w_hr);
  for (const auto* product : {&dx_, &more_dx_, &dw_ih_, &dw_hh_, &dw_hr_}) {
    if (*product) workspace = std::max(workspace, (*product)->workspace());
  }
  pieces.workspace = cutter.take(workspace);
  pieces.bytes = cutter.used();
  return pieces;
}

void CudaPlainBackwardRun::run(void* scratch) const {
  const CudaLayer& l = p_.layer;
  const Pieces pieces = cut(scratch);
  make_current(l.device);
  run_recurrence(pieces);
  if (clears_x_) cuda_clear_padding(l.dtype, l.steps, p_.x, p_.I, pieces.x, l.stream);

  const int64_t rows = l.steps.rows, gates = 4 * l.H;
  const auto multiply = [&](const std::optional<VendorProduct>& product, const void* a,
                            const void* b,
                            void* out) { product->run(a, b, out, pieces.workspace, l.stream); };
  for (int k = 0; k < l.directions; ++k) {
    const auto& d = p_.direction[k];
    const auto& piece = pieces.direction[k];
    if (p_.dx) multiply(k ? more_dx_ : dx_, piece.dgates, d.w_ih, sums_dx_ ? pieces.dx : p_.dx);
    if (d.dw_ih) multiply(dw_ih_, piece.dgates, pieces.x ? pieces.x : p_.x, d.dw_ih);
    if (d.dw_hh && dw_hh_)
      multiply(dw_hh_, ahead(l, piece.dgates, late_gates(k)), hidden(k, piece.h_prev), d.dw_hh);
    else if (d.dw_hh)
      cuda_zero(d.dw_hh, gates * l.P * storage_bytes(l.dtype), l.stream);
    if (d.dw_hr) {
      cuda_cell_outputs(l.dtype, l.steps, d.gates, d.c_seq, l.H, piece.cell_out, l.stream);
      multiply(dw_hr_, piece.dr, piece.cell_out, d.dw_hr);
    }
    if (d.db_ih || d.db_hh)
      cuda_sum_rows(l.dtype, piece.dgates, rows, gates, d.db_ih, d.db_hh, l.stream);
  }
  if (sums_dx_) cuda_round(l.dtype, pieces.dx, p_.dx, rows * p_.I, l.stream);
}

void CudaPlainBackwardRun::run_recurrence(const Pieces& pieces) const {
  const CudaLayer& l = p_.layer;
  CudaBackwardDirection directions[kMaxDirections] = {};
  for (int k = 0; k < l.directions; ++k) {
    const auto& from = p_.direction[k];
    const auto& piece = pieces.direction[k];
    CudaBackwardDirection& d = directions[k];
    d.reverse = k == 1;
    d.w_hh = arranged(l, from.w_hh, 4 * l.H, l.P, true, piece.w_hh);
    d.w_hr = arranged(l, from.w_hr, l.P, l.H, true, piece.w_hr);
    d.h0 = from.h0;
    d.c0 = from.c0;
    d.y = ahead(l, p_.y, k * l.P);
    d.dy = ahead(l, p_.dy, k * l.P);
    d.y_stride = d.dy_stride = l.directions * l.P;
    d.gates = from.gates;
    d.c_seq = from.c_seq;
    d.dh_n = from.dh_n;
    d.dc_n = from.dc_n;
    d.dgates = piece.dgates;
    d.h_prev = piece.h_prev;
    d.dr = piece.dr;
    d.dh0 = from.dh0;
    d.dc0 = from.dc0;
  }
  cuda_backward(l, directions, pieces.workspace, {0, l.steps.T});
}

}  // namespace lstm_ext
