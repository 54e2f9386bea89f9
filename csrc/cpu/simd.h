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

template <class T>
GCPP_HOST_DEVICE void store(T* p, Pack<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// ---- elements as stored ----
//
// A group is what one load of stored elements widens to. BFloat16 fills a whole vector register,
// whose even elements make the first pack and whose odd ones the second: two instructions where
// two loads of neighbours take four. All other types make one pack of neighbours.

template <class S>
constexpr int kPacks = std::is_same_v<S, BFloat16> ? 2 : 1;
template <class S>
constexpr int kGroup = kPacks<S> * kLanes<Accumulator<S>>;  // elements
template <class S>
struct Group {
  Pack<Accumulator<S>> pack[kPacks<S>];
};

template <int kBytes>
struct IntegerOf;
template <>
struct IntegerOf<2> {
  using type = int16_t;
};
template <>
struct IntegerOf<4> {
  using type = int32_t;
};
template <>
struct IntegerOf<8> {
  using type = int64_t;
};
template <class S>
using Integer = typename IntegerOf<sizeof(S)>::type;

// A group as stored, as signed integers: a greater positive number is a greater integer, and all
// numbers with a sign are below zero.
template <class S>
struct BitsOf {
  typedef Integer<S> type __attribute__((vector_size(kGroup<S> * sizeof(S))));
};
template <class S>
using Bits = typename BitsOf<S>::type;
template <class S>
struct UnsignedBitsOf {
  typedef std::make_unsigned_t<Integer<S>> type __attribute__((vector_size(kGroup<S> * sizeof(S))));
};
template <class S>
using UnsignedBits = typename UnsignedBitsOf<S>::type;

template <class S>
GCPP_HOST_DEVICE Bits<S> load_bits(const S* p) {
  Bits<S> bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

// Set lanes before clear ones: the mask of the first n lanes begins at bits + (kGroup - n).
template <class S>
struct FirstLanes {
  Integer<S> bits[2 * kGroup<S>] = {};
  constexpr FirstLanes() {
    for (int i = 0; i < kGroup<S>; ++i) bits[i] = -1;
  }
};
template <class S>
constexpr FirstLanes<S> kFirstLanes;

template <class S>
GCPP_HOST_DEVICE Bits<S> first_lanes(int64_t count) {
  Bits<S> mask;
  std::memcpy(&mask, kFirstLanes<S>.bits + (kGroup<S> - count), sizeof mask);
  return mask;
}

// The first count elements, zeros behind them. Reads a whole group where that stays before end.
template <class S>
GCPP_HOST_DEVICE Bits<S> load_bits(const S* p, int64_t count, const S* end) {
  if (count == kGroup<S>) return load_bits(p);
  if (end - p >= kGroup<S>) return load_bits(p) & first_lanes<S>(count);
  Bits<S> bits{};
  std::memcpy(&bits, p, static_cast<size_t>(count) * sizeof(S));
  return bits;
}

// max(element, 0) where floor is 0, any element where it is the least integer. What has a sign
// becomes 0, -inf and -NaN too: see SignedNonFinite.
template <class S>
GCPP_HOST_DEVICE Bits<S> floored(Bits<S> bits, Integer<S> floor) {
  const Bits<S> least = Bits<S>{} + floor;
  return bits > least ? bits : least;
}

// Watches what floored() would hide.
template <class S>
class SignedNonFinite {
 public:
  GCPP_HOST_DEVICE void see(Bits<S> bits) {
    const UnsignedBits<S> seen = (UnsignedBits<S>)bits;
    greatest_ = seen > greatest_ ? seen : greatest_;
  }
  bool seen() const {
    constexpr uint64_t infinity = sizeof(S) == 8                ? 0xfff0000000000000u
                                  : sizeof(S) == 4              ? 0xff800000u
                                  : std::is_same_v<S, BFloat16> ? 0xff80u
                                                                : 0xfc00u;
    std::make_unsigned_t<Integer<S>> greatest[kGroup<S>];
    std::memcpy(greatest, &greatest_, sizeof greatest_);
    bool any = false;
    for (int i = 0; i < kGroup<S>; ++i) any |= greatest[i] >= infinity;
    return any;
  }

 private:
  UnsignedBits<S> greatest_{};
};

template <class S>
GCPP_HOST_DEVICE Group<S> widened(Bits<S> bits) {
  if constexpr (std::is_floating_point_v<S>) {
    return {(Pack<S>)bits};
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef uint32_t Pairs __attribute__((vector_size(kVectorBytes)));
    const Pairs pairs = (Pairs)bits;
    return {(Pack<float>)(pairs << 16), (Pack<float>)(pairs & 0xffff0000u)};
  } else {
#if defined(__AVX512F__)
    return {(Pack<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits)};
#elif defined(__F16C__)
    return {(Pack<float>)_mm256_cvtph_ps((__m128i)bits)};
#elif defined(__aarch64__)
    return {(Pack<float>)vcvt_f32_f16((float16x4_t)bits)};
#else
    typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
    const Wide wide = __builtin_convertvector((UnsignedBits<S>)bits, Wide);
    // Exponent and mantissa at float's place, times 2^112 for the difference of the biases;
    // subnormals come out right, infinities and NaNs get float's exponent.
    const Wide magnitude = (wide & 0x7fffu) << 13;
    const Wide scaled = (Wide)((Pack<float>)magnitude * 0x1p112f);
    const Wide special = (Wide)((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return {(Pack<float>)(scaled | special | ((wide & 0x8000u) << 16))};
#endif
  }
}

// Neighbours in memory as a group of S holds them, and back.
template <class S, class T = Accumulator<S>, int... l>
GCPP_HOST_DEVICE Group<S> grouped(const T* p, std::integer_sequence<int, l...>) {
  const Pack<T> low = load(p), high = load(p + kLanes<T>);
  return {__builtin_shufflevector(low, high, 2 * l...),
          __builtin_shufflevector(low, high, 2 * l + 1 ...)};
}
template <class S, class T = Accumulator<S>>
GCPP_HOST_DEVICE Group<S> load_group(const T* p) {
  if constexpr (kPacks<S> == 1) {
    return {load(p)};
  } else {
    return grouped<S>(p, std::make_integer_sequence<int, kLanes<T>>{});
  }
}
template <class T, int... l>
GCPP_HOST_DEVICE Group<BFloat16> neighbours(Pack<T> even, Pack<T> odd,
                                            std::integer_sequence<int, l...>) {
  constexpr int lanes = sizeof...(l);
  return {__builtin_shufflevector(even, odd, (l % 2 * lanes + l / 2)...),
          __builtin_shufflevector(even, odd, (l % 2 * lanes + (lanes + l) / 2)...)};
}
template <class S, class T = Accumulator<S>>
GCPP_HOST_DEVICE void add_group(T* p, Group<S> group) {
  if constexpr (kPacks<S> == 2) {
    group =
        neighbours<T>(group.pack[0], group.pack[1], std::make_integer_sequence<int, kLanes<T>>{});
  }
  for (int i = 0; i < kPacks<S>; ++i) {
    store(p + i * kLanes<T>, load(p + i * kLanes<T>) + group.pack[i]);
  }
}

// Lane l is lane index[l] of v.
template <class T>
GCPP_HOST_DEVICE Pack<T> permuted(Pack<T> v, const Integer<T>* index) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_loadu_si512(index);
  if constexpr (sizeof(T) == 4)
    return (Pack<T>)_mm512_maskz_permutexvar_epi32(0xffff, lanes, (__m512i)v);
  return (Pack<T>)_mm512_maskz_permutexvar_epi64(0xff, lanes, (__m512i)v);
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return (Pack<T>)_mm256_permutevar8x32_epi32((__m256i)v, lanes);
  }
#endif
  T lane[kLanes<T>];
  std::memcpy(lane, &v, sizeof v);
  for (int i = 0; i < kLanes<T>; ++i) v[i] = lane[index[i]];
  return v;
#endif
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
  Bits<S> bits{};
  std::memcpy(&bits, &value, sizeof value);
  return widened<S>(bits).pack[0][0];
}

GCPP_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GCPP_HOST_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
GCPP_HOST_DEVICE int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
// Of maps and of arrays with one value a channel: whole groups of every type.
template <class T>
GCPP_HOST_DEVICE int64_t padded(int64_t count) {
  return rounded_up(count, 2 * kLanes<T>);
}

}  // namespace gradcampp::GCPP_TARGET

#include "math/methods.h"  // after reciprocal(), of which its rules use this version for packs
