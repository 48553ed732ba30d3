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

// gx = x W_ih^T.
VendorProduct input_product(const CudaPlainForward& p) {
  make_current(p.layer.device);
  Product product = product_of(p.layer, p.layer.steps.rows, 4 * p.layer.H, p.I, false, true);
  product.wide = true;
  product.alignment = alignment_of({p.x, p.w_ih, p.gates});
  return VendorProduct(product);
}

}  // namespace

CudaPlainForwardRun::CudaPlainForwardRun(const CudaPlainForward& p)
    : p_(p), input_(input_product(p)) {}

CudaPlainForwardRun::Pieces CudaPlainForwardRun::cut(void* scratch) const {
  const CudaLayer& l = p_.layer;
  Cutter cutter(scratch);
  Pieces pieces{};
  pieces.gx = p_.gates ? p_.gates : cutter.take(l.steps.rows * 4 * l.H * acc_bytes(l.dtype));
  const bool as_read = l.K == l.H && alignment_of({p_.w_hh}) >= 16;
  if (!as_read) pieces.w_hh = cutter.take(4 * l.H * l.K * storage_bytes(l.dtype));
  // One after the other.
  pieces.workspace = cutter.take(std::max(input_.workspace(), cuda_forward_workspace(l, false)));
  pieces.bytes = cutter.used();
  return pieces;
}

void CudaPlainForwardRun::run(void* scratch) const {
  const CudaLayer& l = p_.layer;
  const Pieces pieces = cut(scratch);
  make_current(l.device);
  input_.run(p_.x, p_.w_ih, pieces.gx, pieces.workspace, l.stream);
  if (pieces.w_hh)
    cuda_arrange({l.dtype, false, 4 * l.H, l.H, l.K}, p_.w_hh, pieces.w_hh, l.stream);
  CudaForwardDirection d{};
  d.gx = pieces.gx;
  d.b_ih = p_.b_ih;
  d.b_hh = p_.b_hh;
  d.w_hh = pieces.w_hh ? pieces.w_hh : p_.w_hh;
  d.h0 = p_.h0;
  d.c0 = p_.c0;
  d.gates = p_.gates;  // a row's gx is read before they are
  d.c_seq = p_.c_seq;
  d.y = p_.y;
  d.y_stride = l.H;
  d.h_n = p_.h_n;
  d.c_n = p_.c_n;
  cuda_forward(l, &d, pieces.workspace, {0, l.steps.T});
}

// ---- backward -----------------------------------------------------------------------------------

CudaPlainBackwardRun::CudaPlainBackwardRun(const CudaPlainBackward& p)
    : p_(p),
      previous_(!p.dw_hh                               ? Previous::kNone
                : p.layer.steps.T == 1                 ? p.h0 ? Previous::kH0 : Previous::kNone
                : !p.h0 && p.layer.steps.stride_b == 1 ? Previous::kShifted
                                                       : Previous::kGathered) {
  const CudaLayer& l = p_.layer;
  make_current(l.device);
  const int64_t rows = l.steps.rows, gates = 4 * l.H;
  const auto choose = [](std::optional<VendorProduct>& chosen, Product product,
                         std::initializer_list<const void*> addresses) {
    product.alignment = alignment_of(addresses);
    chosen.emplace(product);
  };
  if (p_.dx) choose(dx_, product_of(l, rows, p_.I, gates, false, false), {p_.w_ih, p_.dx});
  if (p_.dw_ih) choose(dw_ih_, product_of(l, gates, p_.I, rows, true, false), {p_.x, p_.dw_ih});
  if (previous_ == Previous::kNone) return;
  const bool shifted = previous_ == Previous::kShifted;
  const void* const late = reinterpret_cast<const void*>(late_gates() * storage_bytes(l.dtype));
  choose(dw_hh_, product_of(l, gates, l.H, shifted ? rows - l.steps.B : rows, true, false),
         {p_.dw_hh, late,
          shifted                      ? p_.y
          : previous_ == Previous::kH0 ? p_.h0
                                       : nullptr});
}

int64_t CudaPlainBackwardRun::late_gates() const {
  return previous_ == Previous::kShifted ? p_.layer.steps.B * 4 * p_.layer.H : 0;
}

CudaPlainBackwardRun::Pieces CudaPlainBackwardRun::cut(void* scratch) const {
  const CudaLayer& l = p_.layer;
  const int64_t storage = storage_bytes(l.dtype), rows = l.steps.rows;
  Cutter cutter(scratch);
  Pieces pieces{};
  pieces.dgates = cutter.take(rows * 4 * l.H * storage);
  if (previous_ == Previous::kGathered) pieces.h_prev = cutter.take(rows * l.H * storage);
  pieces.w_hh = cutter.take(l.H * padded(4 * l.H, l.dtype) * storage);
  // One after the other.
  int64_t workspace = cuda_backward_workspace(l, false);
  for (const auto* product : {&dx_, &dw_ih_, &dw_hh_}) {
    if (*product) workspace = std::max(workspace, (*product)->workspace());
  }
  pieces.workspace = cutter.take(workspace);
  pieces.bytes = cutter.used();
  return pieces;
}

void CudaPlainBackwardRun::run(void* scratch) const {
  const CudaLayer& l = p_.layer;
  const int64_t storage = storage_bytes(l.dtype), rows = l.steps.rows, gates = 4 * l.H;
  const Pieces pieces = cut(scratch);
  make_current(l.device);
  cuda_arrange({l.dtype, true, gates, l.H, padded(gates, l.dtype)}, p_.w_hh, pieces.w_hh, l.stream);
  CudaBackwardDirection d{};
  d.w_hh = pieces.w_hh;
  d.h0 = p_.h0;
  d.c0 = p_.c0;
  d.y = p_.y;
  d.y_stride = d.dy_stride = l.H;
  d.gates = p_.gates;
  d.c_seq = p_.c_seq;
  d.dy = p_.dy;
  d.dh_n = p_.dh_n;
  d.dc_n = p_.dc_n;
  d.dgates = pieces.dgates;
  d.h_prev = pieces.h_prev;
  d.dh0 = p_.dh0;
  d.dc0 = p_.dc0;
  cuda_backward(l, &d, pieces.workspace, {0, l.steps.T});

  void* const dgates = pieces.dgates;
  const auto multiply = [&](const std::optional<VendorProduct>& product, const void* a,
                            const void* b, void* out) {
    if (product) product->run(a, b, out, pieces.workspace, l.stream);
  };
  multiply(dx_, dgates, p_.w_ih, p_.dx);
  multiply(dw_ih_, dgates, p_.x, p_.dw_ih);
  switch (previous_) {
    case Previous::kNone:
      if (p_.dw_hh) cuda_zero(p_.dw_hh, gates * l.H * storage, l.stream);
      break;
    case Previous::kH0:
      multiply(dw_hh_, dgates, p_.h0, p_.dw_hh);
      break;
    case Previous::kShifted:
      multiply(dw_hh_, static_cast<char*>(dgates) + late_gates() * storage, p_.y, p_.dw_hh);
      break;
    case Previous::kGathered:
      multiply(dw_hh_, dgates, pieces.h_prev, p_.dw_hh);
  }
  if (p_.db_ih || p_.db_hh)
    cuda_sum_rows(l.dtype, dgates, rows, gates, p_.db_ih, p_.db_hh, l.stream);
}

}  // namespace lstm_ext
