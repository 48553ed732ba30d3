// The vendor family's part of the plan: a plan a problem, for the library chooses its own tiles.
#pragma once

#include "cuda/plan.h"

namespace lstm_ext {

// Whether the family can run the problem on such a device.
bool has_vendor_plan(const CudaProblem&, const CudaProperties&);

CudaPlan make_vendor_plan(const CudaProblem&, const CudaProperties&);

// As refuse(), of a plan of the family.
std::string refuse_vendor_plan(const CudaPlan&, const CudaProblem&);

}  // namespace lstm_ext
