// From the arguments of the op to the kernels' launches: paths, tiles, slices, workspace.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cam.h"
#include "cuda/fused.cuh"
#include "cuda/large.cuh"

namespace gradcampp {

struct Device {
  int processors;            // streaming multiprocessors
  int shared_per_block;      // bytes of shared memory that one block can have
  int shared_per_processor;  // bytes that the blocks on one processor share
  int cluster_blocks;        // that a cluster can have; 1 without clusters
};

// Once through A and G: the whole op, or one half of the attention method. The first half ends in
// a softmax; for the second that attention takes the place of the gradients.
struct Pass {
  bool pooling;  // the second half
  bool fused;
  int64_t fused_grid;
  FusedArguments fused_args;
  int64_t counter_bytes;
  // The second path; a grid of 0 is left out.
  int64_t weights_grid, sum_grid, cells_grid, softmax_grid, resize_grid;
  WeightsArguments weights;
  SumArguments sum;
  CellsArguments cells;
  ResizeArguments resize;
};

struct Plan {
  Pass passes[2];
  int count;
  int64_t workspace_bytes;
};

// Depends on nothing but shapes, strides, the addresses' alignment and the device, so that equal
// calls add in equal order. workspace may be null to learn the size.
cudaError_t make_plan(const CamArguments& args, const Device& device, void* workspace, Plan* plan);

}  // namespace gradcampp
