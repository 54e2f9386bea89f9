// SIMD packs by the compiler's vector extension: one text for SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "math/methods.h"
#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage formats without arithmetic of their own.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct PackOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Pack = typename PackOf<T>::type;
template <class T>
using Mask = decltype(Pack<T>{} > Pack<T>{});  // all bits of a lane set, or none

template <class T>
GCPP_HOST_DEVICE Pack<T> broadcast(T value) {
  return Pack<T>{} + value;
}

// Loads of kLanes<Accumulator> elements from any address, widened to the accumulator.
GCPP_HOST_DEVICE Pack<float> load(const float* p) {
  Pack<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
GCPP_HOST_DEVICE Pack<double> load(const double* p) {
  Pack<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

GCPP_HOST_DEVICE Pack<float> load(const BFloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Pack<float>)(__builtin_convertvector(bits, FloatBits) << 16);
}

GCPP_HOST_DEVICE Pack<float> load(const Half* p) {
#if defined(__AVX512F__)
  return (Pack<float>)_mm512_maskz_cvtph_ps(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Pack<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  float16x4_t half;
  std::memcpy(&half, p, sizeof half);
  return (Pack<float>)vcvt_f32_f16(half);
#else
  HalfBits narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const FloatBits bits = __builtin_convertvector(narrow, FloatBits);
  // Exponent and mantissa at float's place, times 2^112 for the difference of the biases;
  // subnormals come out right, infinities and NaNs get float's exponent.
  const FloatBits magnitude = (bits & 0x7fffu) << 13;
  const FloatBits scaled = (FloatBits)((Pack<float>)magnitude * 0x1p112f);
  const FloatBits special = (FloatBits)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Pack<float>)(scaled | special | ((bits & 0x8000u) << 16));
#endif
}

template <class T>
GCPP_HOST_DEVICE void store(T* p, Pack<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// A pack of set lanes before a pack of clear ones: the mask of the first n lanes begins at
// bits + (kLanes - n).
template <class T>
struct FirstLanes {
  std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t> bits[2 * kLanes<T>] = {};
  constexpr FirstLanes() {
    for (int i = 0; i < kLanes<T>; ++i) bits[i] = -1;
  }
};
template <class T>
constexpr FirstLanes<T> kFirstLanes;

// The first count elements, zeros behind them. Reads a whole pack where that stays before end.
template <class S>
GCPP_HOST_DEVICE Pack<Accumulator<S>> load_first(const S* p, int64_t count, const S* end) {
  using T = Accumulator<S>;
  constexpr int lanes = kLanes<T>;
  if (end - p >= lanes) {
    Mask<T> mask;
    std::memcpy(&mask, kFirstLanes<T>.bits + (lanes - count), sizeof mask);
    return (Pack<T>)((Mask<T>)load(p) & mask);
  }
  S padded[lanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(S));
  return load(padded);
}

// Sum of the lanes, in a fixed order.
template <class T>
GCPP_HOST_DEVICE T lane_sum(Pack<T> v) {
  constexpr int lanes = kLanes<T>;
  if constexpr (lanes == 16) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  } else if constexpr (lanes == 8) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  } else if constexpr (lanes == 4) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  }
  return v[0] + v[1];
}

// A value of a storage format on its own.
template <class S>
GCPP_HOST_DEVICE Accumulator<S> widen(S value) {
  if constexpr (std::is_floating_point_v<S>) {
    return value;
  } else {
    S padded[kLanes<float>] = {value};
    return load(padded)[0];
  }
}

GCPP_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GCPP_HOST_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
GCPP_HOST_DEVICE int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace gradcampp::GCPP_TARGET
