// 1 / v for the terms of the Grad-CAM++ weights.
#pragma once

#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

template <class V>
GCPP_HOST_DEVICE V reciprocal(V v) {
  return 1 / v;
}
#if defined(__CUDA_ARCH__)
// One instruction instead of ten: within one unit in the last place, infinity for subnormal v, and
// 0 above 2^126, a quarter of where v itself would overflow.
GCPP_HOST_DEVICE float reciprocal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
#endif

}  // namespace gradcampp::GCPP_TARGET
