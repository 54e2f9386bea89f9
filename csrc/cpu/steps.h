// The steps of the op on one tile of channels that stays in cache between them:
//   activation_totals  S_c          reads A
//   channel_weights    w_c          reads G, given S_c
//   add_weighted       L += w_c A   reads A again, from cache
//   add_elements       L += rule    reads A and G, for rules without channel weights
// Each has two loops, one for each order of the elements in memory, and both read memory in the
// order in which it lies. Maps and per-channel arrays are padded to whole packs.
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
// The same in one instruction, for where -inf has shown itself before.
template <class V>
GCPP_HOST_DEVICE V floored(V a, V floor) {
  return select(a < floor, floor, a);
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

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

// Asks for a cache line that will be read soon. Addresses behind the tensor are harmless: a
// prefetch never faults.
GCPP_HOST_DEVICE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// How far ahead rows are asked for: past the end of a tile of small rows, where the hardware's own
// prefetching stops because the reading turns to the other tensor.
constexpr int64_t kAheadBytes = 4096;
template <class S>
GCPP_HOST_DEVICE Pack<Accumulator<S>> load_ahead(const S* p, int64_t n, const S* end) {
  prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
  return load_n(p, n, end);
}

// Sums over the positions of each channel where positions are neighbours.
// term(c, x, n, first, second) adds n positions of channel c from x on; result(c, first, second)
// takes the sums of a pack of channels from c on.
template <class T, bool kSecond, class Term, class Result>
GCPP_HOST_DEVICE void row_sums(int64_t channels, int64_t positions, Term term, Result result) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t begin = 0; begin < channels; begin += lanes) {
    Pack<T> first[lanes] = {}, second[lanes] = {};
    for (int64_t i = 0; i < smaller(lanes, channels - begin); ++i) {
      Pack<T> f[4] = {}, s[4] = {};
      sweep<T>(positions, [&](int j, int64_t x, int64_t n) __attribute__((always_inline)) {
        term(begin + i, x, n, f[j], s[j]);
      });
      first[i] = (f[0] + f[1]) + (f[2] + f[3]);
      if (kSecond) second[i] = (s[0] + s[1]) + (s[2] + s[3]);
    }
    result(begin, lane_sums<T>(first), kSecond ? lane_sums<T>(second) : Pack<T>{});
  }
}

// Sums over the positions of each channel where channels are neighbours: all channels of eight
// positions at a time. term(c, x, n, first, second) adds n channels from c on at position x.
template <class T, class Term>
GCPP_HOST_DEVICE void column_sums(int64_t channels, int64_t positions, T* first, T* second,
                                  Term term) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t c = 0; c < channels; c += lanes) {
    store(first + c, Pack<T>{});
    if (second != nullptr) store(second + c, Pack<T>{});
  }
  auto group = [&](auto count, int64_t x) __attribute__((always_inline)) {
    auto pack = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      Pack<T> f{}, s{};
#pragma GCC unroll 8
      for (int i = 0; i < decltype(count)::value; ++i) term(c, x + i, n, f, s);
      store(first + c, load(first + c) + f);
      if (second != nullptr) store(second + c, load(second + c) + s);
    };
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) pack(c, lanes);
    if (c < channels) pack(c, channels - c);
  };
  int64_t x = 0;
  for (; x + 8 <= positions; x += 8) group(Constant<8>{}, x);
  for (; x < positions; ++x) group(Constant<1>{}, x);
}

template <class S, class T = Accumulator<S>>
void activation_totals(const Tile<S>& a, T floor_value, T* totals) {
  const Pack<T> floor = broadcast<T>(floor_value);
  if (a.order == Order::kSpaceInner) {
    row_sums<T, false>(
        a.channels, a.positions,
        [&](int64_t c, int64_t x, int64_t n, Pack<T>& sum, Pack<T>&)
            __attribute__((always_inline)) {
              sum += above(load_ahead(a.data + c * a.channel + x, n, a.end), floor);
            },
        [&](int64_t c, Pack<T> sum, Pack<T>) { store(totals + c, sum); });
  } else {
    column_sums<T>(a.channels, a.positions, totals, nullptr,
                   [&](int64_t c, int64_t x, int64_t n, Pack<T>& sum, Pack<T>&)
                       __attribute__((always_inline)) {
                         const S* p = a.data + x * a.position + c;
                         prefetch(p + 8 * a.position);
                         sum += above(load_n(p, n, a.end), floor);
                       });
  }
}

// `a` is read by rules with kPair alone, and has then the order of `g`. `second` is scratch for
// one value a channel.
template <class Rule, class S, class T = Accumulator<S>>
void channel_weights(const Tile<S>& g, const Tile<S>& a, const T* totals, T floor_value,
                     T eps_value, T* second, T* weights) {
  const Pack<T> floor = broadcast<T>(floor_value), eps = broadcast<T>(eps_value);
  const T positions = static_cast<T>(g.positions);
  auto finish = [&](int64_t c, Pack<T> f, Pack<T> s) {
    const Pack<T> total = Rule::kTotal ? load(totals + c) : Pack<T>{};
    store(weights + c, Rule::weight(f, s, total, broadcast<T>(positions), eps));
  };
  if (g.order == Order::kSpaceInner) {
    row_sums<T, Rule::kSecond>(
        g.channels, g.positions,
        [&](int64_t c, int64_t x, int64_t n, Pack<T>& f, Pack<T>& s)
            __attribute__((always_inline)) {
              Pack<T> av{};
              if constexpr (Rule::kPair) {
                av = above(load_n(a.data + c * a.channel + x, n, a.end), floor);
              }
              const Pack<T> total = Rule::kTotal ? broadcast<T>(totals[c]) : Pack<T>{};
              Rule::term(load_ahead(g.data + c * g.channel + x, n, g.end), av, total, eps, f, s);
            },
        finish);
    return;
  }
  if (g.order == Order::kUniform) {  // never with kPair
    for (int64_t begin = 0; begin < g.channels; begin += kLanes<T>) {
      T value[kLanes<T>] = {};
      for (int64_t i = 0; i < smaller(kLanes<T>, g.channels - begin); ++i) {
        value[i] = widen(g.data[(begin + i) * g.channel]);
      }
      Pack<T> f{}, s{};
      const Pack<T> total = Rule::kTotal ? load(totals + begin) : Pack<T>{};
      Rule::term(load(value), Pack<T>{}, total, eps, f, s);
      finish(begin, f * positions, s * positions);
    }
    return;
  }
  column_sums<T>(g.channels, g.positions, weights, Rule::kSecond ? second : nullptr,
                 [&](int64_t c, int64_t x, int64_t n, Pack<T>& f, Pack<T>& s)
                     __attribute__((always_inline)) {
                       Pack<T> av{};
                       if constexpr (Rule::kPair)
                         av = above(load_n(a.data + x * a.position + c, n, a.end), floor);
                       const Pack<T> total = Rule::kTotal ? load(totals + c) : Pack<T>{};
                       const S* p = g.data + x * g.position + c;
                       prefetch(p + 8 * g.position);
                       Rule::term(load_n(p, n, g.end), av, total, eps, f, s);
                     });
  for (int64_t c = 0; c < g.channels; c += kLanes<T>) {
    finish(c, load(weights + c), Rule::kSecond ? load(second + c) : Pack<T>{});
  }
}

// Means over positions of (attention + eps) * a: the second weights of the attention method.
template <class S, class T = Accumulator<S>>
void attended_means(const Tile<S>& a, const T* attention, T floor_value, T eps_value, T* weights) {
  const Pack<T> floor = broadcast<T>(floor_value), eps = broadcast<T>(eps_value);
  const T positions = static_cast<T>(a.positions);
  if (a.order == Order::kSpaceInner) {
    row_sums<T, false>(
        a.channels, a.positions,
        [&](int64_t c, int64_t x, int64_t n, Pack<T>& f, Pack<T>&) __attribute__((always_inline)) {
          const Pack<T> av = above(load_n(a.data + c * a.channel + x, n, a.end), floor);
          f += (load(attention + x) + eps) * av;
        },
        [&](int64_t c, Pack<T> sum, Pack<T>) { store(weights + c, sum / positions); });
    return;
  }
  column_sums<T>(
      a.channels, a.positions, weights, nullptr,
      [&](int64_t c, int64_t x, int64_t n, Pack<T>& f, Pack<T>&) __attribute__((always_inline)) {
        const Pack<T> av = above(load_n(a.data + x * a.position + c, n, a.end), floor);
        f += (attention[x] + eps_value) * av;
      });
  for (int64_t c = 0; c < a.channels; c += kLanes<T>) {
    store(weights + c, load(weights + c) / positions);
  }
}

// kChannels rows of A into kTargets maps: each pack of A and of a map is loaded once for
// kChannels * kTargets products.
template <int kChannels, int kTargets, bool kShown, class S, class T>
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
      const Pack<T> raw = load_n(rows + j * a.channel + x, n, a.end);
      av[j] = kShown ? floored(raw, floor) : above(raw, floor);
    }
    for (int k = 0; k < kTargets; ++k) {
      T* map = maps + k * map_stride + x;
      Pack<T> sum = w[k][0] * av[0];
      for (int j = 1; j < kChannels; ++j) sum += w[k][j] * av[j];
      store(map, load(map) + sum);
    }
  });
}

// Maps from neighbouring channels: positions are taken four at a time so that a pack of weights
// is loaded once for four products.
template <bool kShown, class S, class T>
void add_columns(const Tile<S>& a, Pack<T> floor, const T* weights, int64_t weight_stride,
                 int64_t targets, T* maps, int64_t map_stride) {
  constexpr int64_t lanes = kLanes<T>;
  auto dot = [&](auto count, int64_t x, const T* w, T* map) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    Pack<T> sum[kCount] = {};
    const S* row = a.data + x * a.position;
    auto pack = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      const Pack<T> weight = load(w + c);
      for (int i = 0; i < kCount; ++i) {
        const S* p = row + i * a.position + c;
        prefetch(p + 4 * a.position);
        const Pack<T> raw = load_n(p, n, a.end);
        sum[i] += weight * (kShown ? floored(raw, floor) : above(raw, floor));
      }
    };
    int64_t c = 0;
    for (; c + lanes <= a.channels; c += lanes) pack(c, lanes);
    if (c < a.channels) pack(c, a.channels - c);
    for (int i = 0; i < kCount; ++i) map[x + i] += lane_sum<T>(sum[i]);
  };
  auto dots = [&](auto count, int64_t x) __attribute__((always_inline)) {
    for (int64_t k = 0; k < targets; ++k) {
      dot(count, x, weights + k * weight_stride, maps + k * map_stride);
    }
  };
  int64_t x = 0;
  for (; x + 4 <= a.positions; x += 4) dots(Constant<4>{}, x);
  for (; x < a.positions; ++x) dots(Constant<1>{}, x);
}

// kShown: activations of -inf have poisoned the weights before.
template <bool kShown, class S, class T = Accumulator<S>>
void add_weighted(const Tile<S>& a, T floor_value, const T* weights, int64_t weight_stride,
                  int64_t targets, T* maps, int64_t map_stride) {
  const Pack<T> floor = broadcast<T>(floor_value);
  if (a.order == Order::kChannelInner) {
    return add_columns<kShown>(a, floor, weights, weight_stride, targets, maps, map_stride);
  }
  // All channels go into a few maps before the next ones: those stay in L1.
  auto add = [&](auto targets_at_once, int64_t k) {
    constexpr int kTargets = decltype(targets_at_once)::value;
    const T* w = weights + k * weight_stride;
    T* map = maps + k * map_stride;
    int64_t c = 0;
    for (; c + 4 <= a.channels; c += 4) {
      add_rows<4, kTargets, kShown>(a, c, floor, w, weight_stride, map, map_stride);
    }
    for (; c < a.channels; ++c) {
      add_rows<1, kTargets, kShown>(a, c, floor, w, weight_stride, map, map_stride);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= targets; k += 4) add(Constant<4>{}, k);
  for (; k < targets; ++k) add(Constant<1>{}, k);
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
        sum[j] +=
            Rule::element(load_n(g_row + c, n, g.end), above(load_n(a_row + c, n, a.end), floor));
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
