// Stands in for the header of this name: float32 reciprocals as inexact as the instruction that
// the GPU runs, rcp.approx.ftz.f32, may be, always to the same side so that the errors add up.
#pragma once

#include <cfloat>
#include <cmath>

#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

template <class V>
V reciprocal(V v) {
  return 1 / v;
}
inline float reciprocal(float v) {
  if (std::fabs(v) < FLT_MIN) return std::copysign(HUGE_VALF, v);
  const float exact = 1 / v;
  if (std::fabs(exact) < FLT_MIN) return std::copysign(0.0f, v);
  return std::isfinite(exact) ? std::nextafter(exact, std::copysign(HUGE_VALF, v)) : exact;
}

}  // namespace gradcampp::GCPP_TARGET
