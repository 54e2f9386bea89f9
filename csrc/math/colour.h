// From a map's value to a row of the colour table, and from a blended colour to a byte.
#pragma once

#include <cstdint>

#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

// 0 to 255; NaN and everything below 0 is 0.
GCPP_HOST_DEVICE int colour_index(float value) {
  const float scaled = value * 255.0f + 0.5f;
  return scaled >= 0.0f ? (scaled < 255.0f ? static_cast<int>(scaled) : 255) : 0;
}

GCPP_HOST_DEVICE uint8_t colour_byte(float value) {
  return static_cast<uint8_t>(value >= 0.0f ? (value < 255.0f ? value + 0.5f : 255.0f) : 0.0f);
}

}  // namespace gradcampp::GCPP_TARGET
