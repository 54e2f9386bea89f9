// SIMD packs by the compiler's vector extension: one text for SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "math/platform.h"

namespace gradcampp::GCPP_TARGET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct PackOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Pack = typename PackOf<T>::type;
template <class T>
using Mask = decltype(Pack<T>{} > Pack<T>{});  // all bits of a lane set, or none

// 1 / v by the machine's estimate and one step of Newton's method, within 2 units in the last
// place; several times the speed of a division. Infinite v gives NaN, zero gives NaN or infinity.
GCPP_HOST_DEVICE Pack<float> reciprocal(Pack<float> v) {
#if defined(__AVX512F__)
  const Pack<float> estimate = (Pack<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
#elif defined(__AVX__)
  const Pack<float> estimate = (Pack<float>)_mm256_rcp_ps((__m256)v);
#else
  return 1 / v;
#endif
#if defined(__AVX__)
  return estimate + estimate * (1 - v * estimate);
#endif
}

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
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Lane l takes bit kBit of its number away from `a` or, where the bit is set, from `b`:
// sums of neighbours of both in one pack.
template <int kBit, class V, int... l>
GCPP_HOST_DEVICE V pair_sums(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int lanes = sizeof...(l);
  return __builtin_shufflevector(a, b, (l & kBit ? lanes + l : l)...) +
         __builtin_shufflevector(a, b, (l & kBit ? lanes + (l ^ kBit) : l ^ kBit)...);
}

// The sums of the lanes of kLanes packs in one pack: a transposition that adds as it goes.
template <class T, int kBit = 1>
GCPP_HOST_DEVICE Pack<T> lane_sums(const Pack<T>* v) {
  constexpr int lanes = kLanes<T>;
  Pack<T> half[lanes / kBit / 2];
  for (int i = 0; i < lanes / kBit / 2; ++i) {
    half[i] = pair_sums<kBit>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, lanes>{});
  }
  if constexpr (2 * kBit == lanes) {
    return half[0];
  } else {
    return lane_sums<T, 2 * kBit>(half);
  }
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

#include "math/methods.h"  // after reciprocal(), of which its rules use this version for packs
