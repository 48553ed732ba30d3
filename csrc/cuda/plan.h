// Which kernels run a layer, with which tiles, on which grid: a pure function of the problem and
// of the device's properties. No CUDA: tested without a device.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/tiles.h"
#include "params.h"

namespace lstm_ext {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct CudaProperties {
  int major, minor;  // compute capability
  int sm_count;
  int64_t shared_bytes;  // of a block, with the opt-in attribute
  int64_t l2_bytes;
  // How many clusters of 1, 2, 4, 8 and 16 blocks run at once, with a block a multiprocessor; zeros
  // where the kernels that keep all weights have no body: before Hopper, and in code that the
  // driver makes of older PTX.
  std::array<int64_t, 5> clusters;
  bool vendor;   // the vendor's library of products is open
  bool untimed;  // plans whose kernels nobody has timed on a GPU may be chosen
};

struct CudaProblem {
  Dtype dtype;
  bool tf32;
  bool backward;
  bool projection;
  bool variants;  // any of params.h's Variants
  bool normed;    // a layer norm among them
  int directions;
  int64_t T;  // read only as one step or several
  int64_t B, H, P;
};

// One launch a step; one cooperative launch for all of them, with weights that stay on the SM or
// stream through it; one launch of clusters, each of which has all of the weights of its direction;
// each step, a product of the vendor's library and a launch for all else; or (tagged) one
// cooperative launch as the clusters', whose groups of blocks exchange through L2.
enum class CudaFamily : int { kStep = 0, kGrid = 1, kCluster = 2, kVendor = 3, kTagged = 4 };

// Blocks of the vendor family's kernels, at least, that a multiprocessor has at once.
constexpr int kVendorBlocks = 4;

struct CudaPlan {
  CudaFamily family;
  int m_tiles;     // of weight rows a block; see GateRows and PlainRows; 0: no product (vendor)
  int n_tiles;     // of 8 sequences, multiplied at once; as m_tiles
  int held;        // chunks of weights a warp keeps in registers (grid, cluster, tagged)
  int shared;      // the same in shared memory; cluster and tagged count both in m-tiles backward
  bool ahead;      // the others stream through shared memory, asked for ahead (grid)
  int in_l2;       // chunks of a warp's stream that are to stay in L2
  bool fetches;    // what a tile's cells need is asked for before its product (step, grid); there
                   // is memory for it before Ampere, too, whose kernels do not
  int64_t slices;  // blocks that share the units of a direction
  int64_t groups;  // of sequences, each with blocks and (grid) a barrier of its own
  int64_t group_rows;  // sequences of a group
  int cluster;         // blocks of a cluster: the slices, up to a power of two from 2; 0: none
  int64_t shared_bytes;
  double step_us;  // what the cost model expects a step to take
};

// Whether the products run on tensor cores on such a device.
bool on_tensor_cores(Dtype, bool tf32, int major);

// Elements of k, padded to whole chunks.
int64_t padded(int64_t k, Dtype);

// The length of the cell kernel's product, and its chunks of 64 bytes.
int64_t product_length(const CudaProblem&);
int64_t chunks_of(const CudaProblem&);

// Units of a block: four weight rows each in forward, one in backward.
int units_of(int m_tiles, bool backward);

// A plan of any family that has tiles, as far as nothing else is known.
inline CudaPlan begin_plan(const CudaProblem& p, const Tile& tile, CudaFamily family) {
  CudaPlan plan{};
  plan.family = family;
  plan.m_tiles = tile.m;
  plan.n_tiles = tile.n;
  plan.slices = ceil_div(p.H, units_of(tile.m, p.backward));
  return plan;
}

// Every plan that the kernels can run and that fits the device.
std::vector<CudaPlan> all_cuda_plans(const CudaProblem&, const CudaProperties&);

// The one of them that the cost model expects to be the fastest, of those whose cost was measured,
// or of all with `untimed`: streaming ahead was not, nor the family tagged.
CudaPlan make_cuda_plan(const CudaProblem&, const CudaProperties&);

// A stack of like layers as a wavefront: each takes its steps in parts, and part k of layer l needs
// only part k - 1 of itself and part k of the layer below, so that several layers run at once.
struct CudaWavefront {
  int parts;      // 1: the layers run in turn, for nothing is to be gained
  CudaPlan plan;  // of a layer: clusters, if there are parts
  double us;      // what the cost model expects the stack to take, and with the layers in turn
  double us_in_turn;
};

// Only clusters take a part of the steps: the other families fill the device with one layer.
CudaWavefront make_cuda_wavefront(const CudaProblem&, const CudaProperties&, int64_t layers,
                                  int64_t steps);

// Empty if the kernels can run the plan, else what is wrong with it.
std::string refuse(const CudaPlan&, const CudaProblem&);

// For people: one line.
std::string describe(const CudaPlan&, const CudaProblem&);

}  // namespace lstm_ext
