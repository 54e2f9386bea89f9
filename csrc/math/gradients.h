// The methods' derivatives: from e, the derivative of a loss by the raw map, to those by the
// gradients g and activations a that the map was made of. V is float, double, or a SIMD pack; T is
// one number. The rules are those of methods.h.
//
// With channel weights the map is sum_c w_c a_c, so that the loss changes by e w with a directly,
// and by d = sum over x of e a with the channel's weight, which depends on every g and a of it.
#pragma once

#include "math/methods.h"

namespace gradcampp::GCPP_TARGET {

// A rule with channel weights.
//   kTotal: it needs S, the sum of a over the channel, and the weight depends on it.
//   kSums:  sums over the positions that add() takes: its own, to which the kernel adds d.
//   add():  one position's share of them.
// finish() makes the derivatives of the channel's weight from the sums:
//   w: the weight itself; by_total: its derivative by S, or by every a.
//   by_gradient(): its derivative by one g. by_activation(): by one a, beyond S.
template <bool kEps>
struct GradCamPlusPlusGradient {
  static constexpr bool kElementwise = false, kTotal = true;
  static constexpr int kSums = 2;

  template <class V>
  static GCPP_HOST_DEVICE void add(V g, V, V total, V eps, V* sums) {
    const V alpha = positive_alpha<kEps>(g, total, eps);
    sums[0] += g * alpha;
    sums[1] += g * alpha * (g * alpha);
  }

  template <class T>
  struct Channel {
    T w, by_total, total;
  };
  template <class T>
  static GCPP_HOST_DEVICE Channel<T> finish(const T* sums, T total, T, T) {
    return {sums[0], -sums[1], total};
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_gradient(V g, V, const Channel<T>& channel, V eps) {
    const V alpha = positive_alpha<kEps>(g, zero<V>() + channel.total, eps);
    return slope(g, alpha, eps);
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_activation(V, V, const Channel<T>&) {
    return zero<V>();
  }

  // of g alpha by g: (2 + 3 eps / g^2) alpha^2
  template <class V>
  static GCPP_HOST_DEVICE V slope(V g, V alpha, V eps) {
    if constexpr (kEps) {
      const V safe = select(g > 0, g, one<V>());
      return (3 * eps / safe / safe + 2) * alpha * alpha;
    } else {
      return 2 * alpha * alpha;
    }
  }
};

template <bool kEps>
struct GradCamPlusPlusNormalizedGradient {
  static constexpr bool kElementwise = false, kTotal = true;
  static constexpr int kSums = 4;

  template <class V>
  static GCPP_HOST_DEVICE void add(V g, V, V total, V eps, V* sums) {
    const V alpha = positive_alpha<kEps>(g, total, eps);
    sums[0] += g * alpha;
    sums[1] += alpha;
    sums[2] += g * alpha * (g * alpha);
    sums[3] += alpha * (g * alpha);
  }

  template <class T>
  struct Channel {
    T w, by_total, total, norm;
  };
  template <class T>
  static GCPP_HOST_DEVICE Channel<T> finish(const T* sums, T total, T, T) {
    const T norm = sums[1] == 0 ? T(1) : sums[1];
    const T w = sums[0] / norm;
    return {w, (w * sums[3] - sums[2]) / norm, total, norm};
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_gradient(V g, V, const Channel<T>& channel, V eps) {
    const V alpha = positive_alpha<kEps>(g, zero<V>() + channel.total, eps);
    V by_g = zero<V>() + channel.total;  // of 1 / alpha
    if constexpr (kEps) {
      const V safe = select(g > 0, g, one<V>());
      by_g -= 2 * eps / safe / safe / safe;
    }
    const V slope = GradCamPlusPlusGradient<kEps>::slope(g, alpha, eps);
    return (slope + (zero<V>() + channel.w) * by_g * alpha * alpha) * (1 / channel.norm);
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_activation(V, V, const Channel<T>&) {
    return zero<V>();
  }
};

struct GradCamGradient {
  static constexpr bool kElementwise = false, kTotal = false;
  static constexpr int kSums = 1;

  template <class V>
  static GCPP_HOST_DEVICE void add(V g, V, V, V, V* sums) {
    sums[0] += g;
  }

  template <class T>
  struct Channel {
    T w, by_total, by_g;
  };
  template <class T>
  static GCPP_HOST_DEVICE Channel<T> finish(const T* sums, T, T positions, T) {
    return {sums[0] / positions, 0, 1 / positions};
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_gradient(V, V, const Channel<T>& channel, V) {
    return zero<V>() + channel.by_g;
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_activation(V, V, const Channel<T>&) {
    return zero<V>();
  }
};

struct XGradCamGradient {
  static constexpr bool kElementwise = false, kTotal = true;
  static constexpr int kSums = 1;

  template <class V>
  static GCPP_HOST_DEVICE void add(V g, V a, V, V, V* sums) {
    sums[0] += g * a;
  }

  template <class T>
  struct Channel {
    T w, by_total, share;
  };
  template <class T>
  static GCPP_HOST_DEVICE Channel<T> finish(const T* sums, T total, T, T eps) {
    const T denominator = total + eps;
    const T share = denominator == 0 ? T(0) : 1 / denominator;
    const T w = sums[0] * share;
    return {w, -w * share, share};
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_gradient(V, V a, const Channel<T>& channel, V) {
    return a * channel.share;
  }
  template <class V, class T>
  static GCPP_HOST_DEVICE V by_activation(V g, V, const Channel<T>& channel) {
    return g * channel.share;
  }
};

// Rules without channel weights: derivatives of one element of the map.
struct LayerCamGradient {
  static constexpr bool kElementwise = true;
  template <class V>
  static GCPP_HOST_DEVICE V by_gradient(V g, V a) {
    return select(g > 0, a, zero<V>());
  }
  template <class V>
  static GCPP_HOST_DEVICE V by_activation(V g, V) {
    return select(g > 0, g, zero<V>());
  }
};

struct HiResCamGradient {
  static constexpr bool kElementwise = true;
  template <class V>
  static GCPP_HOST_DEVICE V by_gradient(V, V a) {
    return a;
  }
  template <class V>
  static GCPP_HOST_DEVICE V by_activation(V g, V) {
    return g;
  }
};

struct GradCamElementwiseGradient {
  static constexpr bool kElementwise = true;
  template <class V>
  static GCPP_HOST_DEVICE V by_gradient(V g, V a) {
    return select(g * a > 0, a, zero<V>());
  }
  template <class V>
  static GCPP_HOST_DEVICE V by_activation(V g, V a) {
    return select(g * a > 0, g, zero<V>());
  }
};

// visit(rule) with the rule of a method that has one: attention is made of others.
template <class Visit>
inline bool with_gradient_rule(Method method, bool eps, Visit visit) {
  switch (method) {
    case Method::kGradCamPlusPlus:
      return eps ? visit(GradCamPlusPlusGradient<true>{}) : visit(GradCamPlusPlusGradient<false>{});
    case Method::kGradCamPlusPlusNormalized:
      return eps ? visit(GradCamPlusPlusNormalizedGradient<true>{})
                 : visit(GradCamPlusPlusNormalizedGradient<false>{});
    case Method::kGradCam:
      return visit(GradCamGradient{});
    case Method::kXGradCam:
      return visit(XGradCamGradient{});
    case Method::kLayerCam:
      return visit(LayerCamGradient{});
    case Method::kHiResCam:
      return visit(HiResCamGradient{});
    case Method::kGradCamElementwise:
      return visit(GradCamElementwiseGradient{});
    case Method::kAttention:
      return false;
  }
  return false;
}

}  // namespace gradcampp::GCPP_TARGET
