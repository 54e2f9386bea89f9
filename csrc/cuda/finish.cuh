// From the sum over channels to the output: non-finite check, ReLU, normalisation, upsampling; or,
// for the attention method, the softmax that the second pass takes as its gradients.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cam.h"
#include "cuda/block.cuh"
#include "math/methods.h"
#include "math/normalize.h"
#include "math/resize.h"

namespace gradcampp {

using namespace GCPP_TARGET;

struct FinishArguments {
  int64_t space[kSpaceDims], size[kSpaceDims];
  bool relu, resized, softmax;
  Normalize normalize;
  Interpolation interpolation;
  double temperature, eps;
};

// The extremes of a map, and 0, or NaN where a cell is not finite.
template <class Acc>
struct Extremes {
  Acc low = std::numeric_limits<Acc>::infinity();
  Acc high = -std::numeric_limits<Acc>::infinity();
  Acc poison = 0;

  // Returns the cell, after ReLU where wanted.
  __device__ __forceinline__ Acc add(Acc cell, bool relu) {
    poison += cell * 0;
    if (relu) cell = cell > 0 ? cell : Acc(0);
    low = cell < low ? cell : low;
    high = cell > high ? cell : high;
    return cell;
  }
  __device__ __forceinline__ void reduce(Acc* scratch) {
    low = reduce_over_block(low, scratch, Smaller());
    high = reduce_over_block(high, scratch, Larger());
    poison = reduce_over_block(poison, scratch, Add());
  }
  __device__ __forceinline__ Acc normalized(Acc cell, Normalize how) const {
    return GCPP_TARGET::normalized(cell, low, high, how) + poison;
  }
};

template <class Acc>
__device__ __forceinline__ Acc mix(Acc low, Acc high, Acc weight) {
  return low + weight * (high - low);
}

// Writes the resized map; cell(i) is cell i of the map. A warp makes 32 columns of up to 32 rows:
// a lane has one column, finds where one of the rows lies, and tells the others. What a row takes
// from the cells above and below stays in registers while the next row lies between the same two.
// Warps first, first + step, ... of the whole output are done here.
template <class Acc, class Cell>
__device__ __forceinline__ void resize_map(Cell cell, const FinishArguments& args, Acc* output,
                                           int64_t first, int64_t step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t height = args.size[1], width = args.size[2];
  const int64_t bands = (height + kWarp - 1) / kWarp, columns = (width + kWarp - 1) / kWarp;
  for (int64_t unit = first; unit < args.size[0] * bands * columns; unit += step) {
    const int64_t x = unit % columns * kWarp + lane;
    const int64_t y0 = unit / columns % bands * kWarp;
    const int64_t z = unit / columns / bands;
    const int rows = static_cast<int>(height - y0 < kWarp ? height - y0 : kWarp);
    const Source<Acc> depth = source<Acc>(z, args.space[0], args.size[0], args.interpolation);
    const Source<Acc> column =
        source<Acc>(x < width ? x : width - 1, args.space[2], width, args.interpolation);
    const Source<Acc> row = source<Acc>(lane < rows ? y0 + lane : height - 1, args.space[1], height,
                                        args.interpolation);
    const int row_low = static_cast<int>(row.low), row_high = static_cast<int>(row.high);
    const int left = static_cast<int>(column.low), right = static_cast<int>(column.high);
    auto along_row = [&](int64_t slice, int y) {
      const int start = static_cast<int>((slice * args.space[1] + y) * args.space[2]);
      return mix<Acc>(cell(start + left), cell(start + right), column.weight);
    };
    auto along_depth = [&](int y) {
      const Acc near = along_row(depth.low, y);
      return depth.low == depth.high ? near
                                     : mix<Acc>(near, along_row(depth.high, y), depth.weight);
    };
    int low = -1, high = -1;
    Acc above = 0, below = 0;
    Acc* pixel = output + (z * height + y0) * width + x;
    for (int j = 0; j < rows; ++j) {
      const int next_low = __shfl_sync(kAllLanes, row_low, j);
      const int next_high = __shfl_sync(kAllLanes, row_high, j);
      const Acc weight = __shfl_sync(kAllLanes, row.weight, j);
      if (next_low != low || next_high != high) {
        low = next_low;
        high = next_high;
        above = along_depth(low);
        below = along_depth(high);
      }
      if (x < width) pixel[j * width] = mix<Acc>(above, below, weight);
    }
  }
}

// map: softmax(cells / temperature) + eps over all positions, NaN throughout where a cell is not
// finite. Whole block, one of `parts` that have the same map and write a part of the output each;
// map may lie in shared or device memory; scratch holds kWarps numbers.
template <class Acc>
__device__ __forceinline__ void softmax_map(const Acc* map, int positions,
                                            const FinishArguments& args, Acc* output, Acc* scratch,
                                            int part, int parts) {
  const Acc temperature = static_cast<Acc>(args.temperature);
  Extremes<Acc> extremes;
  for (int p = static_cast<int>(threadIdx.x); p < positions; p += kThreads) {
    extremes.add(map[p] / temperature, false);
  }
  extremes.reduce(scratch);
  Acc sum = 0;
  for (int p = static_cast<int>(threadIdx.x); p < positions; p += kThreads) {
    sum += exp(map[p] / temperature - extremes.high);
  }
  sum = reduce_over_block(sum, scratch, Add()) + extremes.poison;
  for (int p = part * kThreads + static_cast<int>(threadIdx.x); p < positions;
       p += parts * kThreads) {
    output[p] = exp(map[p] / temperature - extremes.high) / sum + static_cast<Acc>(args.eps);
  }
}

// One map in shared memory, complete but for these steps, to the output. Whole block, one of
// `parts` that have the same map and write a part of the output each; maps that follow one another
// need no barrier between.
template <class Acc>
__device__ __forceinline__ void finish_map(Acc* map, int positions, const FinishArguments& args,
                                           Acc* output, Acc* scratch, int part, int parts) {
  const int thread = static_cast<int>(threadIdx.x);
  if (args.softmax) {
    softmax_map(map, positions, args, output, scratch, part, parts);
    return;
  }
  Extremes<Acc> extremes;
  for (int p = thread; p < positions; p += kThreads) map[p] = extremes.add(map[p], args.relu);
  extremes.reduce(scratch);
  if (!args.resized) {
    for (int p = part * kThreads + thread; p < positions; p += parts * kThreads) {
      output[p] = extremes.normalized(map[p], args.normalize);
    }
    return;
  }
  for (int p = thread; p < positions; p += kThreads) {
    map[p] = extremes.normalized(map[p], args.normalize);
  }
  __syncthreads();
  resize_map([map](int p) { return map[p]; }, args, output, part * kWarps + thread / kWarp,
             parts * kWarps);
}

}  // namespace gradcampp
