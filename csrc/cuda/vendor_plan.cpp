#include "cuda/vendor_plan.h"

#include <algorithm>

namespace lstm_ext {
namespace {

// Rates in bytes or multiply-adds a microsecond and multiprocessor, overheads in microseconds.
// Fitted to what an H100 SXM took in bf16 and TF32 (bench/results/nvidia-h100-80gb-hbm3/NOTES.md),
// H 1024 to 4096; fma32 and fma64 are leads.
struct VendorCosts {
  double launch = 3.25;  // after another whose results it reads
  double calls = 12;     // a step's two calls, by the thread that makes them: it takes no less
  double tensor16 = 1.76e6, tensor32 = 0.63e6, fma32 = 0.15e6, fma64 = 0.15e6;
  int64_t tile = 64;  // sequences that a product multiplies at once, whether they are there or not
  double l2 = 27.4e3, memory = 19.75e3;  // that a product reads
  double backward = 1.4;  // a product there against one in forward, unless memory's rate bounds it
  double cells = 14.9e3, cells_backward = 10e3;  // read and written by the cells
};

}  // namespace

bool has_vendor_plan(const CudaProblem& p, const CudaProperties& device) {
  // bf16 is no type of Turing's, for the library either.
  const bool has_type = p.dtype != Dtype::kBFloat16 || device.major >= 8;
  return device.vendor && has_type && !p.projection && p.T > 1;
}

CudaPlan make_vendor_plan(const CudaProblem& p, const CudaProperties& device) {
  const VendorCosts costs;
  CudaPlan plan{};
  plan.family = CudaFamily::kVendor;
  plan.slices = ceil_div(p.H, kThreads);
  // No more blocks than run at once: a thread that goes on to another sequence has its biases.
  const int64_t most = kVendorBlocks * device.sm_count / (plan.slices * p.directions);
  plan.group_rows = std::max<int64_t>(ceil_div(p.B, std::max<int64_t>(most, 1)), 1);
  plan.groups = std::max<int64_t>(ceil_div(p.B, plan.group_rows), 1);

  const double sms = device.sm_count, directions = p.directions;
  const double element = double(storage_bytes(p.dtype)), acc = double(acc_bytes(p.dtype));
  const double matrix = 4.0 * double(p.H) * double(p.P);  // elements of W_hh
  const double rate = p.dtype == Dtype::kFloat64                        ? costs.fma64
                      : !on_tensor_cores(p.dtype, p.tf32, device.major) ? costs.fma32
                      : p.dtype == Dtype::kFloat32                      ? costs.tensor32
                                                                        : costs.tensor16;
  const double slower = p.backward ? costs.backward : 1;
  const double math =
      slower * double(ceil_div(p.B, costs.tile) * costs.tile) * matrix / (rate * sms);
  // Weights that do not fit L2 come from memory once a step.
  const double weights = matrix * element;
  const bool stay = weights * directions <= 0.8 * double(device.l2_bytes);
  const double read = weights / ((stay ? costs.l2 / slower : costs.memory) * sms);
  // Of a unit and sequence, as vendor_steps.cu counts them; a layer norm has a block a sequence.
  const double bytes = p.backward ? 9 * acc + 9 * element : 15 * acc + 2 * element;
  const double blocks = double(p.normed ? p.B : plan.slices * plan.groups) * directions;
  const double rest =
      bytes * double(p.B) * double(p.H) * directions /
      ((p.backward ? costs.cells_backward : costs.cells) * std::clamp(blocks, 1.0, sms));
  plan.step_us = std::max(
      (1 + directions) * costs.launch + directions * std::max(math, read) + rest, costs.calls);
  return plan;
}

std::string refuse_vendor_plan(const CudaPlan& plan, const CudaProblem& p) {
  if (p.projection) return "the vendor family has no projection";
  if (plan.m_tiles || plan.n_tiles || plan.held || plan.shared || plan.ahead || plan.in_l2 ||
      plan.fetches || plan.cluster || plan.shared_bytes)
    return "the vendor family has no tiles, no clusters and keeps no weights";
  if (plan.slices != ceil_div(p.H, kThreads)) return "the slices do not cover the hidden units";
  if (plan.groups < 1 || plan.group_rows < 1 || plan.groups * plan.group_rows < p.B)
    return "the groups do not cover the batch";
  return "";
}

}  // namespace lstm_ext
