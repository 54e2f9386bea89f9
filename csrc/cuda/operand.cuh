// Activations or gradients as a kernel sees them: where an element lies, and how a tile of channels
// comes into shared memory.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cam.h"
#include "cuda/block.cuh"
#include "cuda/scalar.cuh"
#include "cuda/shared_memory.cuh"

namespace gradcampp {

constexpr int kVectorBytes = 16;

enum class Layout : int32_t {
  kRows,          // all channels and positions are one run of memory, channel by channel
  kChannelsLast,  // the channels of a position are neighbours, every vector of them is aligned
  kStrided,       // anything else, stride 0 (expanded) included
};

// Positions are counted in int: a map has at most 2^30 of them.
struct Extent {
  int height, width;  // of the spatial sizes; depth is not needed
};

// Strides are in elements.
struct Operand {
  const void* data;
  int64_t sample, target, channel, space[kSpaceDims];
  int64_t position;  // from one position to the next, where `even`
  bool even;         // whether one stride walks through all positions
  bool adjacent;     // whether channels are neighbours in memory and positions are not
  Layout layout;

  __device__ __forceinline__ int64_t offset(int p, const Extent& extent) const {
    if (even) return p * position;
    const int row = p / extent.width, slice = row / extent.height;
    return slice * space[0] + (row - slice * extent.height) * space[1] +
           (p - row * extent.width) * space[2];
  }
};

// How a tile of an operand lies in shared memory: [channels, positions] for kRows and kStrided,
// where a stride of 0 has one row or one column, and [positions, channels] for kChannelsLast.
struct TileShape {
  int rows, columns;  // what is loaded of a full tile: channels, positions
  int channel, position;
  int bytes;  // of one tile, a multiple of 16; kRows has room to keep the alignment of its source
};

// Holds an offset, not a pointer, so that the compiler sees that it reads shared memory.
template <class T>
struct Tile {
  int offset;  // bytes
  int channel, position;

  __device__ __forceinline__ Accumulator<T> operator()(int c, int p) const {
    const T* const data = reinterpret_cast<const T*>(shared_memory() + offset);
    return widened(data[c * channel + p * position]);
  }
};

// Starts the copy of `channels` channels from source and says where they will lie; the caller
// commits, waits and synchronises.
template <class T>
__device__ __forceinline__ Tile<T> load_tile(int stage, const T* source, int channels,
                                             const Operand& operand, const TileShape& shape,
                                             const Extent& extent) {
  constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));
  const int thread = static_cast<int>(threadIdx.x);
  T* tile = reinterpret_cast<T*>(shared_memory() + stage);
  int offset = stage;
  if (operand.layout == Layout::kRows) {
    // One run: elements up to the first aligned address, vectors, the remaining elements.
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(source) % kVectorBytes);
    tile = reinterpret_cast<T*>(shared_memory() + stage + shift);
    offset += shift;
    const int count = channels * shape.columns;
    const int before = (kVectorBytes - shift) % kVectorBytes / static_cast<int>(sizeof(T));
    const int head = before < count ? before : count;
    const int vectors = (count - head) / kVector;
    const int tail = head + vectors * kVector;
    for (int v = thread; v < vectors; v += kThreads) {
      __pipeline_memcpy_async(tile + head + v * kVector, source + head + v * kVector, kVectorBytes);
    }
    if (thread < head) tile[thread] = source[thread];
    if (thread < count - tail) tile[tail + thread] = source[tail + thread];
  } else if (operand.layout == Layout::kChannelsLast) {
    const int vectors = shape.position / kVector;  // of a full tile: a power of two
    const int shift = 31 - __clz(vectors);
#pragma unroll 1
    for (int i = thread; i < shape.columns * vectors; i += kThreads) {
      const int p = i >> shift, c = (i & (vectors - 1)) * kVector;
      if (c < channels) {
        __pipeline_memcpy_async(tile + p * shape.position + c,
                                source + operand.offset(p, extent) + c, kVectorBytes);
      }
    }
  } else {
    const int rows = channels < shape.rows ? channels : shape.rows;
    const int width = shape.columns < kThreads ? shape.columns : kThreads;
    const int groups = kThreads / width;
    const int group = thread / width;
#pragma unroll 1
    for (int p = thread - group * width; group < groups && p < shape.columns; p += width) {
      const T* const column = source + operand.offset(p, extent);
#pragma unroll 4
      for (int c = group; c < rows; c += groups) {
        tile[c * shape.channel + p * shape.position] = column[c * operand.channel];
      }
    }
  }
  return {offset, shape.channel, shape.position};
}

}  // namespace gradcampp
