// The methods: from gradients g, activations a and their sum S over a channel to a channel weight
// or to one element of the map. V is float, double, or a SIMD pack of them.
//
// Non-finite input must reach the map: a NaN or an infinity that a ReLU or a comparison would hide
// is multiplied by zero instead of being replaced by it (0 * inf and 0 * NaN are NaN).
#pragma once

#include "math/platform.h"
#include "math/reciprocal.h"

namespace gradcampp::GCPP_TARGET {

// For each lane; a scalar is one lane.
template <class M, class V>
GCPP_HOST_DEVICE V select(M condition, V yes, V no) {
  return condition ? yes : no;
}
template <class V>
GCPP_HOST_DEVICE V zero() {
  return V{};
}
template <class V>
GCPP_HOST_DEVICE V one() {
  return V{} + 1;
}

// relu(v) that keeps NaN and turns -inf into NaN.
template <class V>
GCPP_HOST_DEVICE V rectified(V v) {
  return v * select(v > 0, one<V>(), zero<V>());
}

// 1 / (2 + S g + eps / g^2) where g > 0, else 0: alpha of arXiv:1710.11063, eq. 19, after
// cancelling g^2, so that tiny gradients survive. An exact zero in the denominator gives 0.
template <bool kEps, class V>
GCPP_HOST_DEVICE V positive_alpha(V g, V total, V eps) {
  V denominator = total * g + 2;
  if constexpr (kEps) denominator += eps / g / g;
  return select((g > 0) & (denominator != 0), reciprocal(denominator), zero<V>());
}

// A rule with channel weights. term() adds one position to the sums; weight() finishes a channel.
//   kTotal: term() needs S, the sum of a over the channel.
//   kPair:  term() reads a beside g.
//   kSecond: the second sum is used.
template <bool kEps>
struct GradCamPlusPlus {
  static constexpr bool kElementwise = false, kTotal = true, kPair = false, kSecond = false;
  template <class V>
  static GCPP_HOST_DEVICE void term(V g, V, V total, V eps, V& first, V&) {
    first += g * positive_alpha<kEps>(g, total, eps);
  }
  // The same for g >= 0 and S >= 0, where nothing needs a comparison.
  template <class V>
  static GCPP_HOST_DEVICE void positive_term(V g, V total, V& first) {
    first += g * reciprocal(total * g + 2);
  }
  template <class V>
  static GCPP_HOST_DEVICE V weight(V first, V, V total, V, V) {
    return first + total * 0;
  }
};

template <bool kEps>
struct GradCamPlusPlusNormalized {
  static constexpr bool kElementwise = false, kTotal = true, kPair = false, kSecond = true;
  template <class V>
  static GCPP_HOST_DEVICE void term(V g, V, V total, V eps, V& first, V& second) {
    const V alpha = positive_alpha<kEps>(g, total, eps);
    first += g * alpha;
    second += alpha;
  }
  template <class V>
  static GCPP_HOST_DEVICE V weight(V first, V second, V total, V, V) {
    return first / select(second == 0, one<V>(), second) + total * 0;
  }
};

struct GradCam {  // attention begins with it too
  static constexpr bool kElementwise = false, kTotal = false, kPair = false, kSecond = false;
  template <class V>
  static GCPP_HOST_DEVICE void term(V g, V, V, V, V& first, V&) {
    first += g;
  }
  template <class V>
  static GCPP_HOST_DEVICE V weight(V first, V, V, V positions, V) {
    return first / positions;
  }
};

struct XGradCam {
  static constexpr bool kElementwise = false, kTotal = false, kPair = true, kSecond = true;
  template <class V>
  static GCPP_HOST_DEVICE void term(V g, V a, V, V, V& first, V& second) {
    first += g * a;
    second += a;
  }
  template <class V>
  static GCPP_HOST_DEVICE V weight(V first, V second, V, V, V eps) {
    const V denominator = second + eps;
    return first * select(denominator == 0, zero<V>(), 1 / denominator);
  }
};

// Rules without channel weights: element() is what one channel adds to the map at one position.
struct LayerCam {
  static constexpr bool kElementwise = true;
  template <class V>
  static GCPP_HOST_DEVICE V element(V g, V a) {
    return rectified(g) * a;
  }
};

struct HiResCam {
  static constexpr bool kElementwise = true;
  template <class V>
  static GCPP_HOST_DEVICE V element(V g, V a) {
    return g * a;
  }
};

struct GradCamElementwise {
  static constexpr bool kElementwise = true;
  template <class V>
  static GCPP_HOST_DEVICE V element(V g, V a) {
    return rectified(g * a);
  }
};

}  // namespace gradcampp::GCPP_TARGET
