// The second path, for maps of which no tile fits into shared memory, and the channel weights
// alone. Nothing stays on chip between its kernels: weights_kernel reads A and G once;
// sum_kernel reads A again (for the methods without channel weights, A and G for the first time);
// cells_kernel adds the slices; resize_kernel makes the output.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cam.h"
#include "cuda/block.cuh"
#include "cuda/finish.cuh"
#include "cuda/fused.cuh"
#include "cuda/operand.cuh"
#include "cuda/shared_memory.cuh"

namespace gradcampp {

// Where element (c, p) of one channel block of an operand lies.
template <class T>
struct View {
  const T* data;
  const Operand& operand;
  const Extent& extent;

  __device__ __forceinline__ Accumulator<T> operator()(int c, int p) const {
    return widened(data[c * operand.channel + operand.offset(p, extent)]);
  }
};

struct WeightsArguments {
  Operand activations, gradients;
  int64_t channels, targets;
  Extent extent;
  int positions;
  int channels_log2;  // of a block
  double floor, eps;
  void* weights;  // [samples, targets, channels]
};

// A block makes the weights of 2^channels_log2 channels of a sample, for all targets.
template <class Rule, class A, class G>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const __grid_constant__ WeightsArguments args) {
  using Acc = Accumulator<A>;
  Acc* const totals = reinterpret_cast<Acc*>(shared_memory());  // [2^channels_log2]
  Acc* const scratch = totals + kThreads;                       // [2, kThreads]
  const Acc floor = static_cast<Acc>(args.floor), eps = static_cast<Acc>(args.eps);

  const int block_channels = 1 << args.channels_log2;
  const int64_t blocks = (args.channels + block_channels - 1) >> args.channels_log2;
  const int64_t sample = blockIdx.x / blocks;
  const int64_t first_channel = blockIdx.x % blocks * block_channels;
  const int64_t left = args.channels - first_channel;
  const int channels = static_cast<int>(left < block_channels ? left : block_channels);

  const View<A> a{static_cast<const A*>(args.activations.data) + sample * args.activations.sample +
                      first_channel * args.activations.channel,
                  args.activations, args.extent};
  if (Rule::kTotal) {
    const Row row = row_of_thread(args.channels_log2, args.activations.adjacent);
    Acc sum[1] = {0};
    if (row.channel < channels) {
      walk(
          row.lane, args.positions, row.lanes, [&](int p) { return a(row.channel, p); },
          [&](int, Acc cell) { sum[0] += above(cell, floor); });
    }
    add_over_row(row, sum, scratch);
    if (row.lane == 0) totals[row.channel] = sum[0];
    __syncthreads();
  }
  const Row row = row_of_thread(args.channels_log2, args.gradients.adjacent);
  const int c = row.channel;
  const Acc total = Rule::kTotal ? totals[c] : Acc(0);
  for (int64_t k = 0; k < args.targets; ++k) {
    const View<G> g{static_cast<const G*>(args.gradients.data) + sample * args.gradients.sample +
                        k * args.gradients.target + first_channel * args.gradients.channel,
                    args.gradients, args.extent};
    Acc sums[2] = {0, 0};
    if (c < channels) {
      walk(
          row.lane, args.positions, row.lanes, [&](int p) { return g(c, p); },
          [&](int p, Acc gradient) {
            const Acc beside = Rule::kPair ? above(a(c, p), floor) : Acc(0);
            Rule::term(gradient, beside, total, eps, sums[0], sums[1]);
          });
    }
    add_over_row(row, sums, scratch);
    if (row.lane == 0 && c < channels) {
      static_cast<Acc*>(
          args.weights)[(sample * args.targets + k) * args.channels + first_channel + c] =
          Rule::weight(sums[0], sums[1], total, static_cast<Acc>(args.positions), eps);
    }
    __syncthreads();
  }
}

// L = sum over channels of w A.
struct Weighted {
  static constexpr bool kElementwise = false;
};

struct SumArguments {
  Operand activations, gradients;
  int64_t samples, channels, channels_per_slice, targets;
  Extent extent;
  int positions, slices, position_blocks;
  bool lanes_over_channels;  // a warp has a position and its lanes the channels; else a thread has
  double floor;
  const void* weights;  // [samples, targets, channels]
  void* partial;        // [samples, targets, slices, positions]
};

constexpr int kSumTargets = 4;  // that share one read of A

template <class Rule, class A>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumArguments args) {
  using Acc = Accumulator<A>;
  const Acc floor = static_cast<Acc>(args.floor);
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = args.lanes_over_channels ? kWarp : 1;
  const int64_t target_blocks = (args.targets + kSumTargets - 1) / kSumTargets;
  int64_t block = blockIdx.x;
  const int p =
      static_cast<int>(block % args.position_blocks) * (kThreads / lanes) + thread / lanes;
  block /= args.position_blocks;
  const int64_t slice = block % args.slices;
  block /= args.slices;
  const int64_t first_target = block % target_blocks * kSumTargets;
  const int64_t sample = block / target_blocks;
  const int targets = static_cast<int>(
      args.targets - first_target < kSumTargets ? args.targets - first_target : kSumTargets);

  Acc sums[kSumTargets] = {};
  if (p < args.positions) {
    const int64_t first = slice * args.channels_per_slice;
    const int64_t end = args.channels - first < args.channels_per_slice
                            ? args.channels
                            : first + args.channels_per_slice;
    const A* const a = static_cast<const A*>(args.activations.data) +
                       sample * args.activations.sample + args.activations.offset(p, args.extent);
    const A* const g = static_cast<const A*>(args.gradients.data) + sample * args.gradients.sample +
                       first_target * args.gradients.target + args.gradients.offset(p, args.extent);
    const Acc* const weights = static_cast<const Acc*>(args.weights) +
                               (sample * args.targets + first_target) * args.channels;
#pragma unroll 4
    for (int64_t c = first + thread % lanes; c < end; c += lanes) {
      const Acc cell = above(widened(a[c * args.activations.channel]), floor);
#pragma unroll
      for (int k = 0; k < kSumTargets; ++k) {
        if (k >= targets) break;
        if constexpr (Rule::kElementwise) {
          sums[k] += Rule::element(
              widened(g[k * args.gradients.target + c * args.gradients.channel]), cell);
        } else {
          sums[k] += weights[k * args.channels + c] * cell;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kSumTargets; ++k) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sums[k] += __shfl_xor_sync(kAllLanes, sums[k], offset);
    }
    if (k < targets && p < args.positions && thread % lanes == 0) {
      static_cast<Acc*>(
          args.partial)[((sample * args.targets + first_target + k) * args.slices + slice) *
                            args.positions +
                        p] = sums[k];
    }
  }
}

struct CellsArguments {
  int positions, slices, blocks;  // of a map
  const void* partial;            // [maps, slices, positions]
  void* cells;     // [maps, positions]: complete but for normalisation; may be partial
  void* extremes;  // [maps, blocks, 3]: low, high, poison
  bool relu;
};

constexpr int kCellsPerBlock = 8 * kThreads;

template <class Acc>
__global__ void __launch_bounds__(kThreads) cells_kernel(const CellsArguments args) {
  Acc* const scratch = reinterpret_cast<Acc*>(shared_memory());
  const int64_t map = blockIdx.x / args.blocks;
  const int block = static_cast<int>(blockIdx.x % args.blocks);
  const Acc* const partial =
      static_cast<const Acc*>(args.partial) + map * args.slices * args.positions;
  Acc* const cells = static_cast<Acc*>(args.cells) + map * args.positions;
  const int first = block * kCellsPerBlock;
  const int end = args.positions - first < kCellsPerBlock ? args.positions : first + kCellsPerBlock;
  Extremes<Acc> extremes;
  for (int p = first + static_cast<int>(threadIdx.x); p < end; p += kThreads) {
    Acc sum = 0;
#pragma unroll 4
    for (int64_t slice = 0; slice < args.slices; ++slice)
      sum += partial[slice * args.positions + p];
    cells[p] = extremes.add(sum, args.relu);
  }
  extremes.reduce(scratch);
  if (threadIdx.x == 0) {
    Acc* const out = static_cast<Acc*>(args.extremes) + (map * args.blocks + block) * 3;
    out[0] = extremes.low;
    out[1] = extremes.high;
    out[2] = extremes.poison;
  }
}

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const Acc* maps, int positions, FinishArguments finish, Acc* output) {
  const int64_t map = static_cast<int64_t>(blockIdx.x) * positions;
  softmax_map(maps + map, positions, finish, output + map, reinterpret_cast<Acc*>(shared_memory()),
              0, 1);
}

struct ResizeArguments {
  int64_t pixels;
  int positions;
  int map_blocks;        // that cells_kernel had for a map
  int blocks;            // that this kernel has for a map
  const void* cells;     // [maps, positions]
  const void* extremes;  // [maps, map_blocks, 3]
  void* output;          // [maps, pixels]
  FinishArguments finish;
};

template <class Acc>
__global__ void __launch_bounds__(kThreads)
    resize_kernel(const __grid_constant__ ResizeArguments args) {
  Acc* const scratch = reinterpret_cast<Acc*>(shared_memory());
  const int64_t map = blockIdx.x / args.blocks;
  const int64_t block = blockIdx.x % args.blocks;
  Extremes<Acc> extremes;
  for (int i = static_cast<int>(threadIdx.x); i < args.map_blocks; i += kThreads) {
    const Acc* const part =
        static_cast<const Acc*>(args.extremes) + (map * args.map_blocks + i) * 3;
    extremes.low = Smaller()(extremes.low, part[0]);
    extremes.high = Larger()(extremes.high, part[1]);
    extremes.poison += part[2];
  }
  extremes.reduce(scratch);
  const Acc* const cells = static_cast<const Acc*>(args.cells) + map * args.positions;
  const Normalize how = args.finish.normalize;
  resize_map([&](int p) { return extremes.normalized(cells[p], how); }, args.finish,
             static_cast<Acc*>(args.output) + map * args.pixels,
             block * kWarps + static_cast<int64_t>(threadIdx.x) / kWarp,
             static_cast<int64_t>(args.blocks) * kWarps);
}

}  // namespace gradcampp
