// The steps of the op on one tile of channels that stays in cache between them:
//   activation_totals  S_c          reads A
//   channel_weights    w_c          reads G, given S_c
//   add_weighted       L += w_c A   reads A again, from cache
//   add_elements       L += rule    reads A and G, for rules without channel weights
// Each has two loops, one for each order of the elements in memory, and both read memory in the
// order in which it lies. Maps and per-channel arrays are padded to `padded`.
//
// The first three come in two versions. The quick one clears negative activations and gradients as
// integers, before they are widened, which also hides -inf and -NaN; it says whether it met any,
// and then the careful one does the tile again.
#pragma once

#include "cpu/simd.h"
#include "cpu/view.h"

namespace gradcampp::GCPP_TARGET {

// The activations of a tile, with those at or below the floor as zero: a floor of 0 rectifies, -inf
// does not. kCareful: NaN stays and -inf becomes NaN, as in math/methods.h.
template <bool kCareful, class S>
class Activations {
 public:
  using T = Accumulator<S>;
  explicit GCPP_HOST_DEVICE Activations(T floor)
      : floor_(broadcast<T>(floor)),
        least_(floor == 0 ? 0 : static_cast<Integer<S>>(Integer<S>(1) << (8 * sizeof(S) - 1))) {}

  GCPP_HOST_DEVICE Group<S> operator()(Bits<S> bits) const {
    if constexpr (!kCareful) return widened<S>(floored<S>(bits, least_));
    Group<S> a = widened<S>(bits);
    for (Pack<T>& v : a.pack) v *= select(v > floor_, one<Pack<T>>(), zero<Pack<T>>());
    return a;
  }

 private:
  Pack<T> floor_;
  Integer<S> least_;
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class S>
constexpr int kChains = 4 / kPacks<S>;  // of dependent additions, each a group wide

// How a group of a sweep is loaded from p on, in a tensor that stops at end: all of it, its lanes
// under a mask, or its first elements.
template <class S>
struct Whole {
  GCPP_HOST_DEVICE Bits<S> operator()(const S* p, const S*) const { return load_bits(p); }
};
template <class S>
struct Masked {
  Bits<S> mask;
  GCPP_HOST_DEVICE Bits<S> operator()(const S* p, const S*) const { return load_bits(p) & mask; }
};
template <class S>
struct First {
  int64_t count;
  GCPP_HOST_DEVICE Bits<S> operator()(const S* p, const S* end) const {
    return load_bits(p, count, end);
  }
};

// Calls f(j, x, load) for groups of elements from x on; j < kChains tells chains apart. What is
// left behind the last whole group is a group of its own with zeros behind it. kOverlap: where
// there is room, it ends with the last element instead, and those that came before are zero.
template <class S, bool kOverlap = false, class F>
GCPP_HOST_DEVICE void sweep(int64_t count, F f) {
  constexpr int64_t step = kGroup<S>;
  int64_t x = 0;
  for (; x + kChains<S> * step <= count; x += kChains<S> * step) {
    for (int j = 0; j < kChains<S>; ++j) f(j, x + j * step, Whole<S>{});
  }
  if (kChains<S> == 4 && x + 2 * step <= count) {
    f(0, x, Whole<S>{});
    f(1, x + step, Whole<S>{});
    x += 2 * step;
  }
  if (x + step <= count) {
    f(0, x, Whole<S>{});
    x += step;
  }
  if (x == count) return;
  if (kOverlap && count >= step) {
    f(1, count - step, Masked<S>{~first_lanes<S>(step - (count - x))});
  } else {
    f(1, x, First<S>{count - x});
  }
}

// Asks for a cache line that will be read soon. Addresses behind the tensor are harmless: a
// prefetch never faults.
GCPP_HOST_DEVICE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The memory that a later step will read, asked for while this one computes: so that memory is
// busy in the steps that read from cache too, and does not wait where reading turns from one
// tensor to the other.
class Ahead {
 public:
  explicit GCPP_HOST_DEVICE Ahead(const void* next) : next_(static_cast<const char*>(next)) {}
  GCPP_HOST_DEVICE void ask() {
    prefetch(next_);
    next_ += kVectorBytes;
  }

 private:
  const char* next_;
};

template <class S>
GCPP_HOST_DEVICE Pack<Accumulator<S>> pack_sum(const Group<S>* chains) {
  Pack<Accumulator<S>> sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = chains[i / kPacks<S>].pack[i % kPacks<S>];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sums over the positions of each channel where positions are neighbours.
// term(j, c, x, load, first, second) adds a group of channel c from x on; result(c, first, second)
// takes the sums of a pack of channels from c on.
template <class S, bool kSecond, class Term, class Result>
GCPP_HOST_DEVICE void row_sums(int64_t channels, int64_t positions, Term term, Result result) {
  using T = Accumulator<S>;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t begin = 0; begin < padded<T>(channels); begin += lanes) {
    const int64_t count = larger(0, smaller(lanes, channels - begin));
    Pack<T> first[lanes], second[lanes];
    for (int64_t i = 0; i < count; ++i) {
      Group<S> f[kChains<S>] = {}, s[kChains<S>] = {};
      sweep<S, true>(positions, [&](int j, int64_t x, auto load) __attribute__((always_inline)) {
        term(j, begin + i, x, load, f[j], s[j]);
      });
      first[i] = pack_sum<S>(f);
      if (kSecond) second[i] = pack_sum<S>(s);
    }
    for (int64_t i = count; i < lanes; ++i) first[i] = second[i] = Pack<T>{};
    result(begin, lane_sums<T>(first), kSecond ? lane_sums<T>(second) : Pack<T>{});
  }
}

// Sums over the positions of each channel where channels are neighbours: all channels of eight
// positions at a time. term(c, x, load, first, second) adds a group of channels from c on at
// position x.
template <class S, class T = Accumulator<S>, class Term>
GCPP_HOST_DEVICE void column_sums(int64_t channels, int64_t positions, T* first, T* second,
                                  Term term) {
  for (int64_t c = 0; c < padded<T>(channels); c += kLanes<T>) {
    store(first + c, Pack<T>{});
    if (second != nullptr) store(second + c, Pack<T>{});
  }
  auto some = [&](auto count, int64_t x) __attribute__((always_inline)) {
    auto group = [&](int64_t c, auto load) __attribute__((always_inline)) {
      Group<S> f{}, s{};
#pragma GCC unroll 8
      for (int i = 0; i < decltype(count)::value; ++i) term(c, x + i, load, f, s);
      add_group<S>(first + c, f);
      if (second != nullptr) add_group<S>(second + c, s);
    };
    int64_t c = 0;
    for (; c + kGroup<S> <= channels; c += kGroup<S>) group(c, Whole<S>{});
    if (c < channels) group(c, First<S>{channels - c});
  };
  int64_t x = 0;
  for (; x + 8 <= positions; x += 8) some(Constant<8>{}, x);
  for (; x < positions; ++x) some(Constant<1>{}, x);
}

// Returns whether it hid something. Asks for half as much memory as it reads.
template <bool kCareful, class S, class T = Accumulator<S>>
bool activation_totals(const Tile<S>& a, T floor, Ahead ahead, T* totals) {
  const Activations<kCareful, S> shown(floor);
  SignedNonFinite<S> hidden;
  auto add = [&](Bits<S> bits, Group<S>& sum) __attribute__((always_inline)) {
    if (!kCareful) hidden.see(bits);
    const Group<S> av = shown(bits);
    for (int i = 0; i < kPacks<S>; ++i) sum.pack[i] += av.pack[i];
  };
  if (a.order == Order::kSpaceInner) {
    row_sums<S, false>(
        a.channels, a.positions,
        [&](int j, int64_t c, int64_t x, auto load, Group<S>& sum, Group<S>&)
            __attribute__((always_inline)) {
              if (j % 2 == 0) ahead.ask();
              add(load(a.data + c * a.channel + x, a.end), sum);
            },
        [&](int64_t c, Pack<T> sum, Pack<T>) { store(totals + c, sum); });
  } else {
    column_sums<S>(a.channels, a.positions, totals, static_cast<T*>(nullptr),
                   [&](int64_t c, int64_t x, auto load, Group<S>& sum, Group<S>&)
                       __attribute__((always_inline)) {
                         const S* p = a.data + x * a.position + c;
                         prefetch(p + 8 * a.position);
                         add(load(p, a.end), sum);
                       });
  }
  return !kCareful && hidden.seen();
}

// Weights by a rule for gradients that are at least zero, which negative ones become. Returns
// whether it hid something. Asks for as much memory as it reads. Not for Order::kUniform.
template <class Rule, class S, class T = Accumulator<S>>
bool positive_weights(const Tile<S>& g, const T* totals, Ahead ahead, T* weights) {
  SignedNonFinite<S> hidden;
  auto add = [&](Bits<S> bits, const Group<S>& total, Group<S>& sum)
                 __attribute__((always_inline)) {
                   hidden.see(bits);
                   const Group<S> gv = widened<S>(floored<S>(bits, 0));
                   for (int i = 0; i < kPacks<S>; ++i) {
                     Rule::positive_term(gv.pack[i], total.pack[i], sum.pack[i]);
                   }
                 };
  auto finish = [&](int64_t c, Pack<T> sum) { store(weights + c, sum + load(totals + c) * 0); };
  if (g.order == Order::kSpaceInner) {
    row_sums<S, false>(
        g.channels, g.positions,
        [&](int, int64_t c, int64_t x, auto load, Group<S>& sum, Group<S>&)
            __attribute__((always_inline)) {
              Group<S> total;
              for (Pack<T>& v : total.pack) v = broadcast<T>(totals[c]);
              ahead.ask();
              add(load(g.data + c * g.channel + x, g.end), total, sum);
            },
        [&](int64_t c, Pack<T> sum, Pack<T>) { finish(c, sum); });
  } else {
    column_sums<S>(g.channels, g.positions, weights, static_cast<T*>(nullptr),
                   [&](int64_t c, int64_t x, auto load, Group<S>& sum, Group<S>&)
                       __attribute__((always_inline)) {
                         const S* p = g.data + x * g.position + c;
                         prefetch(p + 8 * g.position);
                         add(load(p, g.end), load_group<S>(totals + c), sum);
                       });
    for (int64_t c = 0; c < padded<T>(g.channels); c += kLanes<T>) finish(c, load(weights + c));
  }
  return hidden.seen();
}

// `a` is read by rules with kPair alone, and has then the order of `g`. `second` is scratch for
// one value a channel. Asks for as much memory as it reads of `g`.
template <class Rule, class S, class T = Accumulator<S>>
void channel_weights(const Tile<S>& g, const Tile<S>& a, const T* totals, T floor, T eps_value,
                     Ahead ahead, T* second, T* weights) {
  const Activations<true, S> shown(floor);
  const Pack<T> eps = broadcast<T>(eps_value);
  const T positions = static_cast<T>(g.positions);
  auto add = [&](const S* g_data, const S* a_data, auto load, const Group<S>& total, Group<S>& f,
                 Group<S>& s) __attribute__((always_inline)) {
    const Group<S> gv = widened<S>(load(g_data, g.end));
    Group<S> av{};
    if constexpr (Rule::kPair) av = shown(load(a_data, a.end));
    for (int i = 0; i < kPacks<S>; ++i) {
      Rule::term(gv.pack[i], av.pack[i], total.pack[i], eps, f.pack[i], s.pack[i]);
    }
  };
  auto finish = [&](int64_t c, Pack<T> f, Pack<T> s) {
    const Pack<T> total = Rule::kTotal ? load(totals + c) : Pack<T>{};
    store(weights + c, Rule::weight(f, s, total, broadcast<T>(positions), eps));
  };
  if (g.order == Order::kSpaceInner) {
    row_sums<S, Rule::kSecond>(
        g.channels, g.positions,
        [&](int, int64_t c, int64_t x, auto load, Group<S>& f, Group<S>& s)
            __attribute__((always_inline)) {
              Group<S> total{};
              if constexpr (Rule::kTotal) {
                for (Pack<T>& v : total.pack) v = broadcast<T>(totals[c]);
              }
              ahead.ask();
              add(g.data + c * g.channel + x, a.data + c * a.channel + x, load, total, f, s);
            },
        finish);
    return;
  }
  if (g.order == Order::kUniform) {  // never with kPair
    for (int64_t begin = 0; begin < padded<T>(g.channels); begin += kLanes<T>) {
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
  column_sums<S>(g.channels, g.positions, weights, Rule::kSecond ? second : nullptr,
                 [&](int64_t c, int64_t x, auto load, Group<S>& f, Group<S>& s)
                     __attribute__((always_inline)) {
                       const S* p = g.data + x * g.position + c;
                       prefetch(p + 8 * g.position);
                       const Group<S> total = Rule::kTotal ? load_group<S>(totals + c) : Group<S>{};
                       add(p, a.data + x * a.position + c, load, total, f, s);
                     });
  for (int64_t c = 0; c < padded<T>(g.channels); c += kLanes<T>) {
    finish(c, load(weights + c), Rule::kSecond ? load(second + c) : Pack<T>{});
  }
}

// Means over positions of (attention + eps) * a: the second weights of the attention method.
template <class S, class T = Accumulator<S>>
void attended_means(const Tile<S>& a, const T* attention, T floor, T eps_value, T* weights) {
  const Activations<true, S> shown(floor);
  const Pack<T> eps = broadcast<T>(eps_value);
  const T positions = static_cast<T>(a.positions);
  if (a.order == Order::kSpaceInner) {
    row_sums<S, false>(
        a.channels, a.positions,
        [&](int, int64_t c, int64_t x, auto load, Group<S>& f, Group<S>&)
            __attribute__((always_inline)) {
              const Group<S> av = shown(load(a.data + c * a.channel + x, a.end));
              const Group<S> attended = load_group<S>(attention + x);
              for (int i = 0; i < kPacks<S>; ++i) {
                f.pack[i] += (attended.pack[i] + eps) * av.pack[i];
              }
            },
        [&](int64_t c, Pack<T> sum, Pack<T>) { store(weights + c, sum / positions); });
    return;
  }
  column_sums<S>(a.channels, a.positions, weights, static_cast<T*>(nullptr),
                 [&](int64_t c, int64_t x, auto load, Group<S>& f, Group<S>&)
                     __attribute__((always_inline)) {
                       const Group<S> av = shown(load(a.data + x * a.position + c, a.end));
                       for (int i = 0; i < kPacks<S>; ++i) {
                         f.pack[i] += (attention[x] + eps_value) * av.pack[i];
                       }
                     });
  for (int64_t c = 0; c < padded<T>(a.channels); c += kLanes<T>) {
    store(weights + c, load(weights + c) / positions);
  }
}

// kChannels rows of A into kTargets maps: each group of A and of a map is loaded once for
// kChannels * kTargets products.
template <int kChannels, int kTargets, class Shown, class S, class T>
GCPP_HOST_DEVICE void add_rows(const Tile<S>& a, int64_t c, const Shown& shown, const T* weights,
                               int64_t weight_stride, Ahead& ahead, T* maps, int64_t map_stride) {
  Pack<T> w[kTargets][kChannels];
  for (int k = 0; k < kTargets; ++k) {
    for (int j = 0; j < kChannels; ++j) w[k][j] = broadcast<T>(weights[k * weight_stride + c + j]);
  }
  const S* rows = a.data + c * a.channel;
  sweep<S>(a.positions, [&](int, int64_t x, auto load) __attribute__((always_inline)) {
    for (int j = 0; j < kChannels; j += 2) ahead.ask();
    Group<S> av[kChannels];
    for (int j = 0; j < kChannels; ++j) av[j] = shown(load(rows + j * a.channel + x, a.end));
    for (int k = 0; k < kTargets; ++k) {
      Group<S> sum;
      for (int i = 0; i < kPacks<S>; ++i) {
        sum.pack[i] = w[k][0] * av[0].pack[i];
        for (int j = 1; j < kChannels; ++j) sum.pack[i] += w[k][j] * av[j].pack[i];
      }
      add_group<S>(maps + k * map_stride + x, sum);
    }
  });
}

// Rows of at most kGroups groups into kTargets maps, which stay in registers for all channels. The
// last group of a row may reach into the next one: what it adds to the padding of the map is not
// looked at.
template <int kGroups, int kTargets, class Shown, class S, class T>
void add_short_rows(const Tile<S>& a, const Shown& shown, const T* weights, int64_t weight_stride,
                    Ahead& ahead, T* maps, int64_t map_stride) {
  constexpr int64_t last = (kGroups - 1) * kGroup<S>;
  Group<S> sum[kTargets][kGroups] = {};
  auto add = [&](int64_t c, auto load_last) __attribute__((always_inline)) {
    const S* row = a.data + c * a.channel;
    for (int i = 0; i < kGroups; i += 2) ahead.ask();
    Group<S> av[kGroups];
    for (int i = 0; i < kGroups - 1; ++i) av[i] = shown(load_bits(row + i * kGroup<S>));
    av[kGroups - 1] = shown(load_last(row + last, a.end));
    for (int k = 0; k < kTargets; ++k) {
      const Pack<T> w = broadcast<T>(weights[k * weight_stride + c]);
      for (int i = 0; i < kGroups; ++i) {
        for (int j = 0; j < kPacks<S>; ++j) sum[k][i].pack[j] += w * av[i].pack[j];
      }
    }
  };
  int64_t c = 0;
  for (; c < a.channels && a.end - (a.data + c * a.channel + last) >= kGroup<S>; ++c) {
    add(c, Whole<S>{});
  }
  for (; c < a.channels; ++c) add(c, First<S>{a.positions - last});
  for (int k = 0; k < kTargets; ++k) {
    for (int i = 0; i < kGroups; ++i)
      add_group<S>(maps + k * map_stride + i * kGroup<S>, sum[k][i]);
  }
}

// Maps from neighbouring channels: positions are taken some at a time so that a group of weights
// is loaded once for so many products.
template <class Shown, class S, class T>
void add_columns(const Tile<S>& a, const Shown& shown, const T* weights, int64_t weight_stride,
                 int64_t targets, T* maps, int64_t map_stride) {
  auto dot = [&](auto count, int64_t x, const T* w, T* map) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    Pack<T> sum[kCount] = {};
    const S* row = a.data + x * a.position;
    auto group = [&](int64_t c, auto load) __attribute__((always_inline)) {
      const Group<S> weight = load_group<S>(w + c);
      for (int i = 0; i < kCount; ++i) {
        const S* p = row + i * a.position + c;
        prefetch(p + kCount * a.position);
        const Group<S> av = shown(load(p, a.end));
        for (int j = 0; j < kPacks<S>; ++j) sum[i] += weight.pack[j] * av.pack[j];
      }
    };
    int64_t c = 0;
    for (; c + kGroup<S> <= a.channels; c += kGroup<S>) group(c, Whole<S>{});
    if (c < a.channels) group(c, First<S>{a.channels - c});
    if constexpr (kCount == kLanes<T>) {
      store(map + x, load(map + x) + lane_sums<T>(sum));
    } else {
      for (int i = 0; i < kCount; ++i) map[x + i] += lane_sum<T>(sum[i]);
    }
  };
  auto dots = [&](auto count, int64_t x) __attribute__((always_inline)) {
    for (int64_t k = 0; k < targets; ++k) {
      dot(count, x, weights + k * weight_stride, maps + k * map_stride);
    }
  };
  int64_t x = 0;
  for (; x + kLanes<T> <= a.positions; x += kLanes<T>) dots(Constant<kLanes<T>>{}, x);
  for (; x < a.positions; ++x) dots(Constant<1>{}, x);
}

// Quick where nothing is hidden, or where the weights are NaN where something is. Asks for half as
// much memory as it reads.
template <bool kCareful, class S, class T = Accumulator<S>>
void add_weighted(const Tile<S>& a, T floor, const T* weights, int64_t weight_stride,
                  int64_t targets, Ahead ahead, T* maps, int64_t map_stride) {
  const Activations<kCareful, S> shown(floor);
  if (a.order == Order::kChannelInner) {
    return add_columns(a, shown, weights, weight_stride, targets, maps, map_stride);
  }
  // All channels go into a few maps before the next ones: those stay in registers or L1.
  auto add = [&](auto targets_at_once, int64_t k) {
    constexpr int kTargets = decltype(targets_at_once)::value;
    const T* w = weights + k * weight_stride;
    T* map = maps + k * map_stride;
    auto short_rows = [&](auto groups) {
      add_short_rows<decltype(groups)::value, kTargets>(a, shown, w, weight_stride, ahead, map,
                                                        map_stride);
    };
    switch ((a.positions - 1) / kGroup<S>) {
      case 0:
        return short_rows(Constant<1>{});
      case 1:
        return short_rows(Constant<2>{});
      case 2:
        if constexpr (kPacks<S> == 1) return short_rows(Constant<3>{});
        break;
      case 3:
        if constexpr (kPacks<S> == 1) return short_rows(Constant<4>{});
        break;
    }
    int64_t c = 0;
    for (; c + 4 <= a.channels; c += 4) {
      add_rows<4, kTargets>(a, c, shown, w, weight_stride, ahead, map, map_stride);
    }
    for (; c < a.channels; ++c) {
      add_rows<1, kTargets>(a, c, shown, w, weight_stride, ahead, map, map_stride);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= targets; k += 4) add(Constant<4>{}, k);
  for (; k < targets; ++k) add(Constant<1>{}, k);
}

// Both tiles have the same order.
template <class Rule, class S, class T = Accumulator<S>>
void add_elements(const Tile<S>& g, const Tile<S>& a, T floor, T* map) {
  const Activations<true, S> shown(floor);
  auto add = [&](int64_t c, int64_t x, auto load, Group<S>& sum) __attribute__((always_inline)) {
    const Group<S> gv = widened<S>(load(g.data + c * g.channel + x * g.position, g.end));
    const Group<S> av = shown(load(a.data + c * a.channel + x * a.position, a.end));
    for (int i = 0; i < kPacks<S>; ++i) sum.pack[i] += Rule::element(gv.pack[i], av.pack[i]);
  };
  if (a.order == Order::kChannelInner) {
    for (int64_t x = 0; x < a.positions; ++x) {
      Group<S> sum[kChains<S>] = {};
      sweep<S, true>(a.channels, [&](int j, int64_t c, auto load)
                                     __attribute__((always_inline)) { add(c, x, load, sum[j]); });
      map[x] += lane_sum<T>(pack_sum<S>(sum));
    }
    return;
  }
  auto add_channels = [&](auto channels, int64_t c) {
    sweep<S>(a.positions, [&](int, int64_t x, auto load) __attribute__((always_inline)) {
      Group<S> sum{};
      for (int j = 0; j < decltype(channels)::value; ++j) add(c + j, x, load, sum);
      add_group<S>(map + x, sum);
    });
  };
  int64_t c = 0;
  for (; c + 4 <= a.channels; c += 4) add_channels(Constant<4>{}, c);
  for (; c < a.channels; ++c) add_channels(Constant<1>{}, c);
}

}  // namespace gradcampp::GCPP_TARGET
