// The whole op in one launch, for maps of which a tile of channels fits into shared memory.
//
// A block owns a slice of a sample's channels and up to targets_per_block of its targets. It goes
// through the slice tile by tile; while one tile of A and G is worked on, the next is on its way
// into the other half of shared memory. A tile of A stays there for its sum S, for its weighted
// sum, and for all targets of the block, so that A and G are read from device memory once.
// The maps of the block stay in shared memory too. At the end they are added to those of the
// sample's other blocks, in the order of the slices, in up to two steps:
//   - the blocks of a cluster, where the device has clusters, read each other's maps, each block
//     having a share of the cells, and then share the making of the output;
//   - clusters of the same sample (elsewhere: blocks) write their sums to the workspace, and the
//     last to finish adds them.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cam.h"
#include "cuda/block.cuh"
#include "cuda/cluster.cuh"
#include "cuda/finish.cuh"
#include "cuda/operand.cuh"
#include "cuda/shared_memory.cuh"
#include "math/methods.h"

namespace gradcampp {

// The second pass of the attention method: a channel's weight is the mean of attention times A.
struct AttentionPooling {
  static constexpr bool kElementwise = false, kTotal = false, kPair = true, kSecond = false;
  template <class V>
  static __device__ __forceinline__ void term(V attention, V a, V, V, V& first, V&) {
    first += attention * a;
  }
  template <class V>
  static __device__ __forceinline__ V weight(V first, V, V, V positions, V) {
    return first / positions;
  }
};

// a where a > floor, else a * 0: ReLU for a floor of 0, nothing for one of -infinity (which turns
// an infinity into NaN).
template <class V>
__device__ __forceinline__ V above(V a, V floor) {
  return a * select(a > floor, one<V>(), zero<V>());
}

// Where things lie in the block's shared memory, in bytes from its start.
struct SharedLayout {
  int activations, gradients;  // two tiles each
  int maps;                    // [groups, targets_per_block, positions]
  int totals, weights;         // [channels of a tile]
  int scratch;                 // [2, kThreads]
  int flag;
  int bytes;
};

// Registers are kept few enough for this many blocks on a processor.
constexpr int kBlocksPerProcessor = 4;

struct FusedArguments {
  Operand activations, gradients;
  TileShape activation_tile, gradient_tile;
  SharedLayout shared;
  int64_t channels, channels_per_slice;
  int64_t targets;
  Extent extent;
  int positions;
  int channels_log2;             // of a tile
  int clusters, cluster_blocks;  // clusters * cluster_blocks blocks have a slice each
  int targets_per_block, target_blocks;
  double floor, eps;
  void* partial;       // [samples, target_blocks, clusters, targets_per_block, positions]
  unsigned* finished;  // [samples, target_blocks], zero: how many clusters are done
  void* output;
  int64_t output_map;  // from map to map of the output
  FinishArguments finish;
};

// With which of the `channels` (a power of two) of a tile a thread at position p begins: such that
// a warp on 32 positions of a [positions, channels] tile reads from 32 different banks.
template <class T>
__device__ __forceinline__ int first_channel(int p, int channels) {
  constexpr int kBankBytes = 128;
  const int row_bytes = channels * static_cast<int>(sizeof(T));
  const int words = row_bytes < kBankBytes ? p * row_bytes / kBankBytes : p;
  constexpr int kPerWord = sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1;
  return words * kPerWord & (channels - 1);
}

// What the tile adds to one target's map: element(c, p) summed over its channels. A thread owns a
// position, or, where there are fewer positions than threads, a position and every groups-th
// channel; no two threads own the same cell of maps.
template <class T, class Acc, class Element>
__device__ __forceinline__ void add_tile_to_map(const FusedArguments& args, int channels, Acc* maps,
                                                Element element) {
  const int thread = static_cast<int>(threadIdx.x);
  const int width = args.positions < kThreads ? args.positions : kThreads;
  const int groups = kThreads / width, group = thread / width;
  if (group >= groups) return;
  maps += group * args.targets_per_block * args.positions;
  const bool turned =
      channels == 1 << args.channels_log2 && (args.activations.layout == Layout::kChannelsLast ||
                                              args.gradients.layout == Layout::kChannelsLast);
  for (int p = thread - group * width; p < args.positions; p += width) {
    Acc sum = 0;
    if (turned) {
      const int first = first_channel<T>(p, channels);
      walk(
          group, channels, groups, [&](int i) { return element((i + first) & (channels - 1), p); },
          [&](int, Acc value) { sum += value; });
    } else {
      walk(
          group, channels, groups, [&](int c) { return element(c, p); },
          [&](int, Acc value) { sum += value; });
    }
    maps[p] += sum;
  }
}

// Which part of the work is this block's. Blocks of a cluster are neighbours in the grid; blocks
// with other targets of the same channels come next, so that they find A in the L2 cache.
struct Share {
  int64_t sample, first_target, first_channel;
  int targets, channels;  // a slice at the end may have no channels
  int cluster, rank;      // of the clusters with the same maps; of the blocks of the cluster
  int64_t unit;           // counts the groups of clusters with the same maps
};

__device__ __forceinline__ Share share_of_block(const FusedArguments& args) {
  Share share;
  share.rank = static_cast<int>(blockIdx.x % args.cluster_blocks);
  unsigned rest = blockIdx.x / args.cluster_blocks;
  const int target_block = static_cast<int>(rest % args.target_blocks);
  rest /= args.target_blocks;
  share.cluster = static_cast<int>(rest % args.clusters);
  share.sample = rest / args.clusters;
  share.unit = share.sample * args.target_blocks + target_block;
  share.first_target = static_cast<int64_t>(target_block) * args.targets_per_block;
  const int64_t targets = args.targets - share.first_target;
  share.targets =
      static_cast<int>(targets < args.targets_per_block ? targets : args.targets_per_block);
  share.first_channel =
      (share.cluster * args.cluster_blocks + share.rank) * args.channels_per_slice;
  const int64_t left = args.channels - share.first_channel;
  const int64_t channels = left < args.channels_per_slice ? left : args.channels_per_slice;
  share.channels = static_cast<int>(channels < 0 ? 0 : channels);
  return share;
}

// maps[i] = the sum of read(source, i) over the sources, in a fixed order, for first <= i < end. A
// thread owns every kThreads-th cell, or, where there are few cells and many sources, first adds
// every crews-th source of one. scratch holds kThreads numbers; a barrier must stand between two
// uses of it.
template <class Acc, class Read>
__device__ __forceinline__ void add_sources(int first, int end, int sources, Acc* maps,
                                            Acc* scratch, Read read) {
  constexpr int kSourcesAtLeast = 4;  // of a crew
  const int thread = static_cast<int>(threadIdx.x), cells = end - first;
  if (cells <= 0) return;
  const int places = cells < kThreads ? kThreads / cells : 1;
  const int wanted = sources / kSourcesAtLeast;
  const int crews = wanted < places ? wanted : places;
  if (crews <= 1) {
    for (int i = first + thread; i < end; i += kThreads) {
      Acc sum = 0;
#pragma unroll 8
      for (int source = 0; source < sources; ++source) sum += read(source, i);
      maps[i] = sum;
    }
    return;
  }
  const int crew = thread / cells;
  if (crew < crews) {
    Acc sum = 0;
#pragma unroll 8
    for (int source = crew; source < sources; source += crews) {
      sum += read(source, first + thread - crew * cells);
    }
    scratch[thread] = sum;
  }
  __syncthreads();
  if (thread < cells) {
    Acc sum = scratch[thread];
    for (int other = 1; other < crews; ++other) sum += scratch[other * cells + thread];
    maps[first + thread] = sum;
  }
}

// Adds up the maps of all blocks that have a part of them. Returns whether this block's cluster is
// the one that makes the output; then all its blocks have the sums in maps.
template <class Acc>
__device__ __noinline__ bool gather_maps(const FusedArguments& args, Acc* maps, Acc* scratch,
                                         int* flag) {
  const Share share = share_of_block(args);
  const int thread = static_cast<int>(threadIdx.x), blocks = args.cluster_blocks;
  const int groups = args.positions < kThreads ? kThreads / args.positions : 1;
  const int group_cells = args.targets_per_block * args.positions;
  const int cells = share.targets * args.positions;
  // The block's share of the cells: nobody else touches them in any of the cluster's maps.
  const int each = (cells + blocks - 1) / blocks;
  const int first = share.rank * each < cells ? share.rank * each : cells;
  const int end = first + each < cells ? first + each : cells;

  __syncthreads();
  add_sources(0, cells, groups, maps, scratch,
              [&](int group, int i) { return maps[group * group_cells + i]; });
  if (blocks > 1) {
    meet(blocks);
    add_sources(first, end, blocks, maps, scratch,
                [&](int rank, int i) { return in_block(maps, rank)[i]; });
  }
  bool last = true;
  if (args.clusters > 1) {
    Acc* const partial = static_cast<Acc*>(args.partial) + share.unit * args.clusters * group_cells;
    for (int i = first + thread; i < end; i += kThreads) {
      __stcg(partial + share.cluster * group_cells + i, maps[i]);
    }
    meet(blocks);
    if (share.rank == 0 && thread == 0) {
      __threadfence();  // the cluster's sums are out before it is counted
      const unsigned before = atomicAdd(args.finished + share.unit, 1u);
      *flag = before == static_cast<unsigned>(args.clusters) - 1;
      __threadfence();  // the others' sums are read after they were counted
    }
    meet(blocks);
    last = *in_block(flag, 0) != 0;
    if (last) {
      add_sources(first, end, args.clusters, maps, scratch,
                  [&](int cluster, int i) { return __ldcg(partial + cluster * group_cells + i); });
    }
  }
  if (blocks > 1 && last) {
    meet(blocks);
    for (int i = thread; i < cells; i += kThreads) {
      const int owner = i / each;
      if (owner != share.rank) maps[i] = in_block(maps, owner)[i];
    }
  }
  meet(blocks);  // no block ends while another reads its memory
  return last;
}

// The block's part of the output, from complete maps. Like gather_maps not inlined, so that the
// main loop has the registers; both are the same for all methods.
template <class Acc>
__device__ __noinline__ void finish_maps(const FusedArguments& args, Acc* maps, Acc* scratch) {
  const Share share = share_of_block(args);
  for (int k = 0; k < share.targets; ++k) {
    Acc* const output = static_cast<Acc*>(args.output) +
                        (share.sample * args.targets + share.first_target + k) * args.output_map;
    finish_map(maps + k * args.positions, args.positions, args.finish, output, scratch, share.rank,
               args.cluster_blocks);
  }
}

template <class Rule, class A, class G>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    fused_kernel(const __grid_constant__ FusedArguments args) {
  using Acc = Accumulator<A>;
  unsigned char* const shared = shared_memory();
  Acc* const maps = reinterpret_cast<Acc*>(shared + args.shared.maps);
  Acc* const totals = reinterpret_cast<Acc*>(shared + args.shared.totals);
  Acc* const weights = reinterpret_cast<Acc*>(shared + args.shared.weights);
  Acc* const scratch = reinterpret_cast<Acc*>(shared + args.shared.scratch);
  const Acc floor = static_cast<Acc>(args.floor), eps = static_cast<Acc>(args.eps);
  const Share share = share_of_block(args);

  const int groups = args.positions < kThreads ? kThreads / args.positions : 1;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < groups * args.targets_per_block * args.positions;
       i += kThreads) {
    maps[i] = 0;
  }

  const A* const activations = static_cast<const A*>(args.activations.data) +
                               share.sample * args.activations.sample +
                               share.first_channel * args.activations.channel;
  const G* const gradients =
      static_cast<const G*>(args.gradients.data) + share.sample * args.gradients.sample +
      share.first_target * args.gradients.target + share.first_channel * args.gradients.channel;
  const int tile_channels = 1 << args.channels_log2;

  // A step is one target's tile of G; with the first target comes the tile of A. Each round asks
  // for the next step, then works on its own; the first round only asks.
  Tile<A> a{}, next_a{};
  Tile<G> g{}, next_g{};
  int k = -1, channels = 0;
  int next_c = 0, next_k = 0;
  for (int parity = 0, a_parity = 0;; parity ^= 1) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this round's step has come, and nobody reads the one before it any more
    a = next_a;
    g = next_g;
    const bool more = next_c < share.channels;
    const int next_channels =
        share.channels - next_c < tile_channels ? share.channels - next_c : tile_channels;
    if (more) {
      if (next_k == 0) {
        next_a = load_tile(args.shared.activations + a_parity * args.activation_tile.bytes,
                           activations + next_c * args.activations.channel, next_channels,
                           args.activations, args.activation_tile, args.extent);
        a_parity ^= 1;
      }
      next_g =
          load_tile(args.shared.gradients + parity * args.gradient_tile.bytes,
                    gradients + next_k * args.gradients.target + next_c * args.gradients.channel,
                    next_channels, args.gradients, args.gradient_tile, args.extent);
      __pipeline_commit();
    }

    if (k >= 0) {
      Acc* const map = maps + k * args.positions;
      if constexpr (Rule::kElementwise) {
        add_tile_to_map<A>(args, channels, map, [&](int c, int p) {
          return Rule::element(g(c, p), above(a(c, p), floor));
        });
      } else {
        if (Rule::kTotal && k == 0) {
          const Row row =
              row_of_thread(args.channels_log2, args.activations.layout == Layout::kChannelsLast);
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
        const Row row =
            row_of_thread(args.channels_log2, args.gradients.layout == Layout::kChannelsLast);
        const int c = row.channel;
        const Acc total = Rule::kTotal ? totals[c] : Acc(0);
        Acc sums[Rule::kSecond ? 2 : 1] = {};
        Acc& second = sums[Rule::kSecond ? 1 : 0];  // a rule without one leaves it alone
        if (c < channels) {
          walk(
              row.lane, args.positions, row.lanes, [&](int p) { return g(c, p); },
              [&](int p, Acc gradient) {
                const Acc beside = Rule::kPair ? above(a(c, p), floor) : Acc(0);
                Rule::term(gradient, beside, total, eps, sums[0], second);
              });
        }
        add_over_row(row, sums, scratch);
        if (row.lane == 0) {
          weights[c] = Rule::weight(sums[0], second, total, static_cast<Acc>(args.positions), eps);
        }
        __syncthreads();
        add_tile_to_map<A>(args, channels, map, [&](int channel, int p) {
          return weights[channel] * above(a(channel, p), floor);
        });
      }
    }
    if (!more) break;
    k = next_k;
    channels = next_channels;
    if (++next_k == share.targets) {
      next_k = 0;
      next_c += tile_channels;
    }
  }

  if (gather_maps(args, maps, scratch, reinterpret_cast<int*>(shared + args.shared.flag))) {
    finish_maps(args, maps, scratch);
  }
}

}  // namespace gradcampp
