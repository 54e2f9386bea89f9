// Smooth Grad-CAM++: a position's share of a channel weight, from sums over noisy copies.
#pragma once

#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

// relu(M1) M2 / (2 M2 + S M3 + eps), the M being the means of g, g^2 and g^3 over the copies; M2 is
// cancelled as g^2 is in methods.h. `rectify` keeps M3 from going below 0, which it can do where M1
// is positive: there the denominator would have poles. An exact zero in it gives 0. NaN and
// infinities reach the result, as in methods.h.
GCPP_HOST_DEVICE double smooth_share(double first, double second, double third, double total,
                                     double copies, double eps, bool rectify) {
  const double positive = first > 0 ? first : first * 0;
  const double ratio = third / (second == 0 ? 1 : second);
  double denominator = 2 + total * (rectify && ratio < 0 ? ratio * 0 : ratio);
  if (eps != 0) denominator += eps * copies / (second == 0 ? 1 : second);
  return denominator == 0 ? 0 : positive / copies / denominator;
}

}  // namespace gradcampp::GCPP_TARGET
