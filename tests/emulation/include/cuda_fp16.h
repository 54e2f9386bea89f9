#pragma once

#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
