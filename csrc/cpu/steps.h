// The steps of the op on one tile of channels that stays in cache between them:
//   activation_totals  S_c          reads A
//   channel_weights    w_c          reads G, given S_c
//   add_weighted       L += w_c A   reads A again, from cache
//   add_elements       L += rule    reads A and G, for rules without channel weights
// Each has two loops, one for each order of the elements in memory. Maps are rows of positions
// padded to whole packs; what stands in the padding is never read as part of the map.
#pragma once

#include "cpu/simd.h"
#include "cpu/view.h"

namespace gradcampp::GCPP_TARGET {

// Activations at or below the floor count as zero: a floor of 0 rectifies, -inf does not.
// NaN stays and -inf becomes NaN, as in math/methods.h.
template <class V>
GCPP_HOST_DEVICE V above(V a, V floor) {
  return a * select(a > floor, one<V>(), zero<V>());
}

// Calls f(j, x, n) for packs of n elements from x on; j < 4 tells independent chains apart.
template <class T, class F>
GCPP_HOST_DEVICE void sweep(int64_t count, F f) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t x = 0;
  for (; x + 4 * lanes <= count; x += 4 * lanes) {
    f(0, x, lanes);
    f(1, x + lanes, lanes);
    f(2, x + 2 * lanes, lanes);
    f(3, x + 3 * lanes, lanes);
  }
  if (x + 2 * lanes <= count) {
    f(0, x, lanes);
    f(1, x + lanes, lanes);
    x += 2 * lanes;
  }
  if (x + lanes <= count) {
    f(2, x, lanes);
    x += lanes;
  }
  if (x < count) f(3, x, count - x);
}

template <class S>
GCPP_HOST_DEVICE Pack<Accumulator<S>> load_n(const S* p, int64_t n, const S* end) {
  return n == kLanes<Accumulator<S>> ? load(p) : load_first(p, n, end);
}

// Sums over the positions of one channel (space inner).
// term(offset, n, first, second) adds the pack at `offset` of the channel's row.
template <class T, class Term>
GCPP_HOST_DEVICE void row_sums(int64_t positions, T& first, T& second, Term term) {
  Pack<T> f[4] = {}, s[4] = {};
  sweep<T>(positions, [&](int j, int64_t x, int64_t n) __attribute__((always_inline)) {
    term(x, n, f[j], s[j]);
  });
  first = lane_sum<T>((f[0] + f[1]) + (f[2] + f[3]));
  second = lane_sum<T>((s[0] + s[1]) + (s[2] + s[3]));
}

// Sums over the positions of kColumns packs of neighbouring channels (channel inner).
// term(j, position, first, second) adds pack j at that position. Sums of 64 positions are summed
// in turn: a single chain over a 112 x 112 map would lose two digits.
template <class T, int kColumns, class Term>
GCPP_HOST_DEVICE void column_sums(int64_t positions, Pack<T>* first, Pack<T>* second, Term term) {
  constexpr int64_t kChain = 64;
  for (int j = 0; j < kColumns; ++j) first[j] = second[j] = Pack<T>{};
  for (int64_t begin = 0; begin < positions; begin += kChain) {
    const int64_t end = smaller(begin + kChain, positions);
    Pack<T> f[kColumns] = {}, s[kColumns] = {};
    for (int64_t x = begin; x < end; ++x) {
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) term(j, x, f[j], s[j]);
    }
    for (int j = 0; j < kColumns; ++j) {
      first[j] += f[j];
      second[j] += s[j];
    }
  }
}

// Runs block(c, columns, n) over the channels of a tile: `columns` whole packs at a time (4 or
// 1), the last pack with n channels. The tag carries `columns` as a constant.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <class T, class Block>
GCPP_HOST_DEVICE void for_columns(int64_t channels, Block block) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) block(c, Constant<4>{}, lanes);
  for (; c < channels; c += lanes) block(c, Constant<1>{}, smaller(lanes, channels - c));
}

// Stores a pack of per-channel results; the last pack may be cut.
template <class T>
GCPP_HOST_DEVICE void store_n(T* p, Pack<T> v, int64_t n) {
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
}

template <class S, class T = Accumulator<S>>
void activation_totals(const Tile<S>& a, T floor_value, T* totals) {
  const Pack<T> floor = broadcast<T>(floor_value);
  if (a.order == Order::kSpaceInner) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const S* row = a.data + c * a.channel;
      T unused;
      row_sums<T>(a.positions, totals[c], unused,
                  [&](int64_t x, int64_t n, Pack<T>& sum, Pack<T>&) __attribute__((always_inline)) {
                    sum += above(load_n(row + x, n, a.end), floor);
                  });
    }
    return;
  }
  for_columns<T>(a.channels, [&](int64_t c, auto columns, int64_t n) {
    constexpr int kColumns = decltype(columns)::value;
    Pack<T> sum[kColumns], unused[kColumns];
    const S* column = a.data + c;
    column_sums<T, kColumns>(
        a.positions, sum, unused,
        [&](int j, int64_t x, Pack<T>& first, Pack<T>&) __attribute__((always_inline)) {
          const S* p = column + x * a.position + j * kLanes<T>;
          first += above(load_n(p, n, a.end), floor);
        });
    for (int j = 0; j < kColumns; ++j) store_n(totals + c + j * kLanes<T>, sum[j], n);
  });
}

// `a` is read by rules with kPair alone, and has then the order of `g`.
template <class Rule, class S, class T = Accumulator<S>>
void channel_weights(const Tile<S>& g, const Tile<S>& a, const T* totals, T floor_value,
                     T eps_value, T* weights) {
  const Pack<T> floor = broadcast<T>(floor_value), eps = broadcast<T>(eps_value);
  const T positions = static_cast<T>(g.positions);
  if (g.order == Order::kUniform) {
    if constexpr (!Rule::kPair) {
      for (int64_t c = 0; c < g.channels; ++c) {
        const T value = widen(g.data[c * g.channel]), total = Rule::kTotal ? totals[c] : T(0);
        T first = 0, second = 0;
        Rule::term(value, T(0), total, eps_value, first, second);
        weights[c] =
            Rule::weight(first * positions, second * positions, total, positions, eps_value);
      }
    }
    return;
  }
  if (g.order == Order::kSpaceInner) {
    for (int64_t c = 0; c < g.channels; ++c) {
      const S* g_row = g.data + c * g.channel;
      const S* a_row = Rule::kPair ? a.data + c * a.channel : nullptr;
      const T total_value = Rule::kTotal ? totals[c] : T(0);
      const Pack<T> total = broadcast<T>(total_value);
      T first, second;
      row_sums<T>(g.positions, first, second,
                  [&](int64_t x, int64_t n, Pack<T>& f, Pack<T>& s) __attribute__((always_inline)) {
                    Pack<T> av{};
                    if constexpr (Rule::kPair) av = above(load_n(a_row + x, n, a.end), floor);
                    Rule::term(load_n(g_row + x, n, g.end), av, total, eps, f, s);
                  });
      weights[c] = Rule::weight(first, second, total_value, positions, eps_value);
    }
    return;
  }
  for_columns<T>(g.channels, [&](int64_t c, auto columns, int64_t n) {
    constexpr int kColumns = decltype(columns)::value;
    Pack<T> first[kColumns], second[kColumns], total[kColumns] = {};
    if constexpr (Rule::kTotal) {
      for (int j = 0; j < kColumns; ++j) {
        total[j] = load_n(totals + c + j * kLanes<T>, n, totals + g.channels);
      }
    }
    column_sums<T, kColumns>(
        g.positions, first, second,
        [&](int j, int64_t x, Pack<T>& f, Pack<T>& s) __attribute__((always_inline)) {
          const int64_t lane = c + j * kLanes<T>;
          Pack<T> av{};
          if constexpr (Rule::kPair) {
            av = above(load_n(a.data + lane + x * a.position, n, a.end), floor);
          }
          Rule::term(load_n(g.data + lane + x * g.position, n, g.end), av, total[j], eps, f, s);
        });
    for (int j = 0; j < kColumns; ++j) {
      const Pack<T> w =
          Rule::weight(first[j], second[j], total[j], broadcast<T>(positions), eps);
      store_n(weights + c + j * kLanes<T>, w, n);
    }
  });
}

// Sums of (attention + eps) * a over positions, divided by their number: the second weights of
// the attention method.
template <class S, class T = Accumulator<S>>
void attended_means(const Tile<S>& a, const T* attention, T floor_value, T eps_value, T* weights) {
  const Pack<T> floor = broadcast<T>(floor_value), eps = broadcast<T>(eps_value);
  const T positions = static_cast<T>(a.positions);
  if (a.order == Order::kSpaceInner) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const S* row = a.data + c * a.channel;
      T sum, unused;
      row_sums<T>(a.positions, sum, unused,
                  [&](int64_t x, int64_t n, Pack<T>& f, Pack<T>&) __attribute__((always_inline)) {
                    f += (load(attention + x) + eps) * above(load_n(row + x, n, a.end), floor);
                  });
      weights[c] = sum / positions;
    }
    return;
  }
  for_columns<T>(a.channels, [&](int64_t c, auto columns, int64_t n) {
    constexpr int kColumns = decltype(columns)::value;
    Pack<T> sum[kColumns], unused[kColumns];
    column_sums<T, kColumns>(
        a.positions, sum, unused,
        [&](int j, int64_t x, Pack<T>& f, Pack<T>&) __attribute__((always_inline)) {
          const S* p = a.data + c + j * kLanes<T> + x * a.position;
          f += broadcast<T>(attention[x] + eps_value) * above(load_n(p, n, a.end), floor);
        });
    for (int j = 0; j < kColumns; ++j) {
      store_n(weights + c + j * kLanes<T>, sum[j] / broadcast<T>(positions), n);
    }
  });
}

// kChannels rows of A into kTargets maps: each pack of A and of a map is loaded once for
// kChannels * kTargets products.
template <int kChannels, int kTargets, class S, class T>
GCPP_HOST_DEVICE void add_rows(const Tile<S>& a, int64_t c, Pack<T> floor, const T* weights,
                               int64_t weight_stride, T* maps, int64_t map_stride) {
  Pack<T> w[kTargets][kChannels];
  for (int k = 0; k < kTargets; ++k) {
    for (int j = 0; j < kChannels; ++j) w[k][j] = broadcast<T>(weights[k * weight_stride + c + j]);
  }
  const S* rows = a.data + c * a.channel;
  sweep<T>(a.positions, [&](int, int64_t x, int64_t n) __attribute__((always_inline)) {
    Pack<T> av[kChannels];
    for (int j = 0; j < kChannels; ++j) {
      av[j] = above(load_n(rows + j * a.channel + x, n, a.end), floor);
    }
    for (int k = 0; k < kTargets; ++k) {
      T* map = maps + k * map_stride + x;
      Pack<T> sum = w[k][0] * av[0];
      for (int j = 1; j < kChannels; ++j) sum += w[k][j] * av[j];
      store(map, load(map) + sum);
    }
  });
}

// One map from rows of channels: positions are taken four at a time so that a pack of weights is
// loaded once for four products.
template <class S, class T>
void add_columns(const Tile<S>& a, Pack<T> floor, const T* weights, T* map) {
  constexpr int64_t lanes = kLanes<T>;
  auto dot = [&](auto count, int64_t x) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    Pack<T> sum[kCount] = {};
    const S* row = a.data + x * a.position;
    for (int64_t c = 0; c < a.channels; c += lanes) {
      const int64_t n = smaller(lanes, a.channels - c);
      const Pack<T> w = load_n(weights + c, n, weights + a.channels);
      for (int i = 0; i < kCount; ++i) {
        sum[i] += w * above(load_n(row + i * a.position + c, n, a.end), floor);
      }
    }
    for (int i = 0; i < kCount; ++i) map[x + i] += lane_sum<T>(sum[i]);
  };
  int64_t x = 0;
  for (; x + 4 <= a.positions; x += 4) dot(Constant<4>{}, x);
  for (; x < a.positions; ++x) dot(Constant<1>{}, x);
}

template <class S, class T = Accumulator<S>>
void add_weighted(const Tile<S>& a, T floor_value, const T* weights, int64_t weight_stride,
                  int64_t targets, T* maps, int64_t map_stride) {
  const Pack<T> floor = broadcast<T>(floor_value);
  if (a.order == Order::kChannelInner) {
    for (int64_t k = 0; k < targets; ++k) {
      add_columns(a, floor, weights + k * weight_stride, maps + k * map_stride);
    }
    return;
  }
  auto add = [&](auto channels, int64_t c) {
    constexpr int kChannels = decltype(channels)::value;
    int64_t k = 0;
    for (; k + 4 <= targets; k += 4) {
      add_rows<kChannels, 4>(a, c, floor, weights + k * weight_stride, weight_stride,
                             maps + k * map_stride, map_stride);
    }
    for (; k < targets; ++k) {
      add_rows<kChannels, 1>(a, c, floor, weights + k * weight_stride, weight_stride,
                             maps + k * map_stride, map_stride);
    }
  };
  int64_t c = 0;
  for (; c + 4 <= a.channels; c += 4) add(Constant<4>{}, c);
  for (; c < a.channels; ++c) add(Constant<1>{}, c);
}

// Both tiles have the same order.
template <class Rule, class S, class T = Accumulator<S>>
void add_elements(const Tile<S>& g, const Tile<S>& a, T floor_value, T* map) {
  const Pack<T> floor = broadcast<T>(floor_value);
  if (a.order == Order::kChannelInner) {
    for (int64_t x = 0; x < a.positions; ++x) {
      const S* g_row = g.data + x * g.position;
      const S* a_row = a.data + x * a.position;
      Pack<T> sum[4] = {};
      sweep<T>(a.channels, [&](int j, int64_t c, int64_t n) __attribute__((always_inline)) {
        sum[j] += Rule::element(load_n(g_row + c, n, g.end),
                                above(load_n(a_row + c, n, a.end), floor));
      });
      map[x] += lane_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    return;
  }
  auto add = [&](auto channels, int64_t c) {
    constexpr int kChannels = decltype(channels)::value;
    const S* g_rows = g.data + c * g.channel;
    const S* a_rows = a.data + c * a.channel;
    sweep<T>(a.positions, [&](int, int64_t x, int64_t n) __attribute__((always_inline)) {
      Pack<T> sum{};
      for (int j = 0; j < kChannels; ++j) {
        sum += Rule::element(load_n(g_rows + j * g.channel + x, n, g.end),
                             above(load_n(a_rows + j * a.channel + x, n, a.end), floor));
      }
      store(map + x, load(map + x) + sum);
    });
  };
  int64_t c = 0;
  for (; c + 4 <= a.channels; c += 4) add(Constant<4>{}, c);
  for (; c < a.channels; ++c) add(Constant<1>{}, c);
}

}  // namespace gradcampp::GCPP_TARGET
