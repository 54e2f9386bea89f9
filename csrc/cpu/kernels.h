// The CPU kernels as the bindings see them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cam.h"
#include "power_sums.h"

namespace gradcampp {

// Runs task(context, worker) for every worker in [0, workers), in any order, at the same time
// where it can. `threads` is how many of them the host can run at once.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t workers, void (*task)(void* context, int64_t worker), void* context);
};

// One build of the kernels for one instruction set. The functions return false where the memory
// for their workspace cannot be had.
struct CpuKernels {
  const char* name;
  bool (*cam)(const CamArguments&, const Parallel&);
  bool (*cam_gradient)(const CamGradientArguments&, const Parallel&);
  void (*overlay)(const OverlayArguments&, const Parallel&);
  void (*add_powers)(const AddPowersArguments&, const Parallel&);
  void (*power_weights)(const PowerWeightsArguments&, const Parallel&);
};

// The fastest build that this machine runs, or the one that the environment variable
// GRADCAMPP_EXT_CPU names. Null where it names none, or one this machine cannot run;
// cpu_kernels_error() then says so.
const CpuKernels* cpu_kernels();
const char* cpu_kernels_error();

// Names of the builds that this machine runs, fastest first, comma-separated.
const char* cpu_kernels_available();

// Memory aligned for every instruction set; null where there is none.
void* allocate_workspace(size_t bytes);
void free_workspace(void* workspace);

}  // namespace gradcampp
