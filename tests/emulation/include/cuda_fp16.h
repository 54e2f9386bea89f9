#pragma once

#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};
inline __half __float2half_rn(float v) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))};
}
inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
