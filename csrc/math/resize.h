// Where a pixel of the output lies among the cells of the map.
#pragma once

#include <cstdint>

#include "cam.h"
#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

// value = (1 - weight) * cell[low] + weight * cell[high]
template <class T>
struct Source {
  int64_t low, high;
  T weight;
};

// Half-pixel centres, edges clamped: x = (pixel + 1/2) cells / pixels - 1/2, in exact integers.
template <class T>
GCPP_HOST_DEVICE Source<T> source(int64_t pixel, int64_t cells, int64_t pixels,
                                  Interpolation interpolation) {
  if (interpolation == Interpolation::kNearest) {
    const int64_t cell = pixel * cells / pixels;
    return {cell, cell, T(0)};
  }
  const int64_t denominator = 2 * pixels;
  const int64_t numerator = (2 * pixel + 1) * cells - pixels;
  if (numerator <= 0) return {0, 0, T(0)};
  const int64_t low = numerator / denominator;
  if (low >= cells - 1) return {cells - 1, cells - 1, T(0)};
  return {low, low + 1, T(numerator - low * denominator) / T(denominator)};
}

}  // namespace gradcampp::GCPP_TARGET
