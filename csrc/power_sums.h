// Arguments of the two ops of Smooth Grad-CAM++ (arXiv:1908.01224) as plain data, on any device.
#pragma once

#include <cstdint>

#include "cam.h"

namespace gradcampp {

constexpr int kPowers = 3;  // g, g^2, g^3

// sums += g, g^2, g^3 of so many copies. Strides are in elements; dimensions of sums are N, K, C
// and the spatial ones, in any order, those that fold into one already folded: the last is
// innermost.
struct AddPowersArguments {
  static constexpr int kDims = 3 + kSpaceDims;

  ScalarType dtype;  // of gradients
  int64_t copies;
  int64_t size[kDims];
  const void* gradients;
  int64_t gradient_copy, gradient[kDims];
  double* sums;
  int64_t sum_power, sum[kDims];

  int64_t elements() const {
    int64_t count = 1;
    for (int64_t length : size) count *= length;
    return count;
  }
};

// Channel weights from the sums over `copies` noisy copies.
struct PowerWeightsArguments {
  ScalarType dtype;  // of activations
  int64_t samples, targets, channels;
  int64_t space[kSpaceDims];

  const void* activations;  // [N, C, *space]
  int64_t activation_sample, activation_channel, activation_space[kSpaceDims];

  const double* sums;  // [3, N, K, C, *space]
  int64_t sum_power, sum_sample, sum_target, sum_channel, sum_space[kSpaceDims];

  double copies;
  bool rectify;
  double eps;
  void* weights;  // [N, K, C] contiguous, float, or double where the activations are

  int64_t positions() const { return space[0] * space[1] * space[2]; }
};

}  // namespace gradcampp
