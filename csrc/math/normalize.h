// The last step at feature resolution: from a raw cell to a normalised one.
#pragma once

#include "cam.h"
#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

// low and high are the extremes of the map that the cell belongs to.
template <class T>
GCPP_HOST_DEVICE T normalized(T cell, T low, T high, Normalize normalize) {
  if (normalize == Normalize::kMinMax) return high == low ? T(0) : (cell - low) / (high - low);
  if (normalize == Normalize::kMax) return high <= T(0) ? T(0) : cell / high;
  return cell;
}

}  // namespace gradcampp::GCPP_TARGET
