// Stands in for CUDA's header of this name: see README.md.
#pragma once

#include "emu_core.h"
#include "emu_device.h"
#include "emu_runtime.h"
#include "emu_types.h"
