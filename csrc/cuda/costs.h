// The cost model's figures.
#pragma once

#include "cuda/plan.h"

namespace lstm_ext {

// Rates in bytes or multiply-adds a microsecond, overheads in microseconds. Fitted to what 1810
// plans took on an H100 SXM, bf16 and TF32, near the fastest of each of 96 shapes, forward and
// backward (bench/results/nvidia-h100-80gb-hbm3/NOTES.md), but for what is marked as a lead; scaled
// by multiprocessors where that is what matters. The plan they choose takes 1.02 times the fastest
// one's time on average.
struct Costs {
  double launch = 1.75;                      // one kernel after another in a stream
  double barrier = 1.11;                     // through global memory
  double cell = 0.93, cell_backward = 1.32;  // loads, the sum over the warps, the cell's functions
  double state_per_sm = 58e3, weights_per_sm = 42e3;  // from L2, all of them reading at once
  double memory_per_sm = 16.8e3;                      // HBM, the same
  // In a grid that streams weights from there, groups and tiles fetch them apart.
  double grid_memory = 1.37;
  double in_l2 = 0.7;            // of L2, for weights that are to stay there; a lead
  double shared_per_sm = 540e3;  // weights that a grid's blocks keep there
  double tensor16 = 0.906e6, tensor32 = 0.494e6;  // per SM
  double fma32 = 0.12e6, fma64 = 0.05e6;          // per SM; leads
  // A cell, and an exchange through distributed shared memory; for each sequence of a group.
  double cluster = 0.67, cluster_backward = 1.31, cluster_sequence = 0.028;
  double cluster_shared_per_sm = 138e3;
  // What an exchange through L2 takes longer than one of a cluster; a lead.
  double tagged = 0.25;
  double vendor = 2.2;  // a large product of the vendor's library against those; a lead
  double part = 8;      // of a wavefront: two kernels begin and end, and an event between streams
  double calls = 30;    // what the calling thread takes for it, from Python
};

inline double macs_per_us(const CudaProblem& p, const CudaProperties& device, const Costs& costs) {
  if (p.dtype == Dtype::kFloat64) return costs.fma64;
  if (!on_tensor_cores(p.dtype, p.tf32, device.major)) return costs.fma32;
  return p.dtype == Dtype::kFloat32 ? costs.tensor32 : costs.tensor16;
}

}  // namespace lstm_ext
