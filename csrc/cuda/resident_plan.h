// The part of the plan of the families whose blocks keep all of the weights: cluster and tagged.
#pragma once

#include "cuda/plan.h"

namespace lstm_ext {

struct Tiles {
  const Tile* begin;
  const Tile* end;
};
template <size_t N>
Tiles all(const Tile (&tiles)[N]) {
  return {tiles, tiles + N};
}

inline bool keeps_all(CudaFamily family) {
  return family == CudaFamily::kCluster || family == CudaFamily::kTagged;
}

// The tiles that are compiled for one of the two.
Tiles resident_tiles_of(const CudaProblem&, CudaFamily);

// Every plan of the two that the kernels can run, whether or not a block has the shared memory.
std::vector<CudaPlan> resident_plans(const CudaProblem&, const CudaProperties&);

// As refuse(), of a plan of the two that has a tile and whose slices and groups cover the layer.
std::string refuse_resident_plan(const CudaPlan&, const CudaProblem&, const Tile&);

}  // namespace lstm_ext
