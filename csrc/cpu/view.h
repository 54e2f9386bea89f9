// One tensor of the op as a kernel walks it: a run of channels of one sample.
#pragma once

#include "cam.h"
#include "cpu/simd.h"

namespace gradcampp::GCPP_TARGET {

enum class Order {
  kSpaceInner,    // positions are neighbours: contiguous
  kChannelInner,  // channels are neighbours: channels-last, token sequences
  kUniform,       // one value for all positions of a channel: expanded gradients
  kOther,         // staged into kSpaceInner, a tile at a time
};

// Strides of [C, *space] with the spatial dimensions folded into one where that is possible.
struct Walk {
  Order order;
  int64_t channel;         // stride
  int64_t position;        // stride, unless order is kOther
  const int64_t* space;    // sizes
  const int64_t* strides;  // of the spatial dimensions
  int64_t positions;
};

inline Walk make_walk(const int64_t* space, const int64_t* strides, int64_t channels,
                      int64_t channel) {
  Walk walk{Order::kOther, channels == 1 ? 1 : channel,   0, space,
            strides,       space[0] * space[1] * space[2]};
  bool folds = true;
  int64_t stride = 0;  // of the innermost dimension that is longer than one
  int64_t expected = 0;
  for (int d = kSpaceDims - 1; d >= 0; --d) {
    if (space[d] == 1) continue;
    if (stride == 0 && expected == 0) {
      stride = strides[d];
    } else if (strides[d] != expected) {
      folds = false;
    }
    expected = strides[d] * space[d];
    if (strides[d] == 0) {  // uniform only where every stride is zero
      for (int e = 0; e < kSpaceDims; ++e) folds = folds && (space[e] == 1 || strides[e] == 0);
      if (folds) walk.order = Order::kUniform;
      return walk;
    }
  }
  if (!folds) return walk;
  if (walk.positions == 1) stride = 1;
  walk.position = stride;
  if (walk.channel == 1 && (walk.positions == 1 || stride != 1)) {
    walk.order = Order::kChannelInner;
  } else if (stride == 1) {
    walk.order = Order::kSpaceInner;
  }
  return walk;
}

// A tile: `channels` neighbouring channels of one sample (and target).
template <class S>
struct Tile {
  const S* data;
  const S* end;  // behind the last element of the whole tensor, for loads that overshoot
  Order order;
  int64_t channel, position;  // strides
  int64_t channels, positions;
};

// Copies a tile of any strides into rows of positions, widened. The buffer holds
// channels * positions elements, and a pack more.
template <class S, class T = Accumulator<S>>
Tile<T> stage(const S* data, const Walk& walk, int64_t channels, T* buffer) {
  const int64_t* size = walk.space;
  const int64_t* stride = walk.strides;
  T* row = buffer;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t d = 0; d < size[0]; ++d) {
      for (int64_t h = 0; h < size[1]; ++h) {
        const S* line = data + c * walk.channel + d * stride[0] + h * stride[1];
        for (int64_t w = 0; w < size[2]; ++w) *row++ = widen(line[w * stride[2]]);
      }
    }
  }
  return {buffer, row + kLanes<T>, Order::kSpaceInner, walk.positions, 1, channels, walk.positions};
}

}  // namespace gradcampp::GCPP_TARGET
