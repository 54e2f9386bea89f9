// How the threads of a block share out rows of numbers, and how they add what they found.
#pragma once

#include <cuda_runtime.h>

namespace gradcampp {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kThreads % kWarp == 0 && (kThreads & (kThreads - 1)) == 0);

// A block works on 2^channels_log2 channels at once, kThreads >> channels_log2 threads on each.
// Neighbouring threads have neighbouring channels where those are neighbours in memory, else
// neighbouring positions of one channel: either way a warp reads neighbours.
struct Row {
  int channel, lane, lanes;
  int first_offset, last_offset;  // distances in a warp between threads of one channel
  int slot, slots, slot_size;     // warps, or groups of them, that share a channel
  bool writes_slot;
};

__device__ __forceinline__ Row row_of_thread(int channels_log2, bool channels_adjacent) {
  const int thread = static_cast<int>(threadIdx.x), channels = 1 << channels_log2;
  Row row;
  row.lanes = kThreads >> channels_log2;
  row.slot_size = channels;
  if (channels_adjacent) {
    row.channel = thread & (channels - 1);
    row.lane = thread >> channels_log2;
    row.first_offset = channels;
    row.last_offset = kWarp;
    const int group = channels < kWarp ? kWarp : channels;
    row.slot = thread / group;
    row.slots = kThreads / group;
    row.writes_slot = (thread & (kWarp - 1)) < channels;
  } else {
    row.lane = thread & (row.lanes - 1);
    row.channel = thread / row.lanes;
    row.first_offset = 1;
    row.last_offset = row.lanes < kWarp ? row.lanes : kWarp;
    row.slot = row.lane / kWarp;
    row.slots = row.lanes <= kWarp ? 1 : row.lanes / kWarp;
    row.writes_slot = (row.lane & (kWarp - 1)) == 0;
  }
  return row;
}

// Adds the values of a row's threads; every thread gets the sums. All threads of the block call
// it. scratch holds kCount * kThreads numbers; a barrier must stand between two uses of it.
template <int kCount, class Acc>
__device__ __forceinline__ void add_over_row(const Row& row, Acc (&values)[kCount], Acc* scratch) {
  for (int offset = row.first_offset; offset < row.last_offset; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
  }
  if (row.slots == 1) return;
  if (row.writes_slot) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scratch[i * kThreads + row.slot * row.slot_size + row.channel] = values[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int slot = 0; slot < row.slots; ++slot) {
      values[i] += scratch[i * kThreads + slot * row.slot_size + row.channel];
    }
  }
}

// op over the values of all threads, for every thread, in a fixed order. scratch holds kWarps
// numbers and is free again on return.
template <class Acc, class Op>
__device__ __forceinline__ Acc reduce_over_block(Acc value, Acc* scratch, Op op) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  const int thread = static_cast<int>(threadIdx.x);
  if ((thread & (kWarp - 1)) == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, scratch[warp]);
  __syncthreads();
  return value;
}

// use(i, read(i)) for i = first, first + step, ... below end, with several reads on their way at a
// time.
template <class Read, class Use>
__device__ __forceinline__ void walk(int first, int end, int step, Read read, Use use) {
  constexpr int kAtOnce = 4;
  int i = first;
#pragma unroll 1
  for (; i < end - (kAtOnce - 1) * step; i += kAtOnce * step) {
    decltype(read(i)) values[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) values[j] = read(i + j * step);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) use(i + j * step, values[j]);
  }
#pragma unroll 1
  for (; i < end; i += step) use(i, read(i));
}

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Smaller {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

}  // namespace gradcampp
