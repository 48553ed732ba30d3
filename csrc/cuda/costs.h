// The cost model's figures.
#pragma once

#include "cuda/plan.h"

namespace lstm_ext {

// Rates in bytes or multiply-adds a microsecond, overheads in microseconds. Fitted to what 1100
// plans took on an H100 SXM, bf16 and TF32, those that take at most twice as long as the fastest of
// their shape (bench/results/nvidia-h100-80gb-hbm3/NOTES.md), but for what is marked as a lead;
// scaled by multiprocessors where that is what matters.
struct Costs {
  double launch = 1.57;                      // one kernel after another in a stream
  double barrier = 0.95;                     // through global memory
  double cell = 1.05, cell_backward = 1.25;  // loads, the sum over the warps, the cell's functions
  double more_rounds = 0.8;                  // of that, for each round after the first
  double state_per_sm = 58e3, weights_per_sm = 40e3;  // from L2, all of them reading at once
  double memory_per_sm = 22.5e3;                      // HBM, the same
  // In a grid that streams weights from there, groups and tiles fetch them apart.
  double grid_memory = 1.5;
  double in_l2 = 0.7;            // of L2, for weights that are to stay there; a lead
  double shared_per_sm = 135e3;  // weights that a grid's blocks keep there
  // Of mma.sync, per SM: what was measured of it alone; TF32 four fifths of that.
  double tensor16 = 2.4e6, tensor32 = 1e6;
  double fma32 = 0.12e6, fma64 = 0.05e6;  // per SM; leads
  // A cell, and an exchange through distributed shared memory; for each sequence of a group.
  double cluster = 0.69, cluster_backward = 1.35, cluster_sequence = 0.0325;
  double cluster_shared_per_sm = 238e3;
  // What an exchange through L2 takes longer than one of a cluster, besides its bytes; a lead.
  double tagged = 0.25;
  double vendor = 0.85;  // a large product of the vendor's library against those rates; a lead
  double part = 8;       // of a wavefront: two kernels begin and end, and an event between streams
  double calls = 30;     // what the calling thread takes for it, from Python
};

inline double macs_per_us(const CudaProblem& p, const CudaProperties& device, const Costs& costs) {
  if (p.dtype == Dtype::kFloat64) return costs.fma64;
  if (!on_tensor_cores(p.dtype, p.tf32, device.major)) return costs.fma32;
  return p.dtype == Dtype::kFloat32 ? costs.tensor32 : costs.tensor16;
}

}  // namespace lstm_ext
