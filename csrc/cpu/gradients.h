// The op's backward pass at feature resolution: derivatives by activations and gradients from those
// by the raw maps. A worker takes some channels of a sample at a time, reads them into rows of
// positions, whatever their strides, and goes through each row twice: for the sums over the
// channel, then for the derivatives.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "math/gradients.h"

namespace gradcampp::GCPP_TARGET {

constexpr int64_t kGradientChannels = 16;           // read together: a cache line of neighbours
constexpr int64_t kGradientTileBytes = 512 * 1024;  // of one buffer; fewer channels of large maps

GCPP_HOST_DEVICE void narrow(double value, double* to) { *to = value; }
GCPP_HOST_DEVICE void narrow(float value, float* to) { *to = value; }
GCPP_HOST_DEVICE void narrow(float value, BFloat16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
GCPP_HOST_DEVICE void narrow(float value, Half* to) {
#if defined(__F16C__)
  to->bits = static_cast<uint16_t>(_cvtss_sh(value, 0));
#elif defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(value);
  std::memcpy(to, &half, sizeof half);
#else
  // Adding a power of two leaves the bits that a half has room for, rounded to the nearest.
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof bits);
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 and more
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal halves: units of 2^-24
    half = static_cast<uint32_t>(static_cast<int32_t>((magnitude * 0x1p24f + 0x1p23f) - 0x1p23f));
  } else {
    half = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
#endif
}

// Strides of one tensor of the backward pass, those of the space folded into rows.
template <class S>
struct Place {
  S* data;  // of the first channel; null where nothing is wanted
  int64_t channel;
  const int64_t* space;

  // f(channel, position, element) for every element of `count` channels.
  template <class F>
  void each(int64_t count, const int64_t* size, F f) const {
    int64_t x = 0;
    for (int64_t d = 0; d < size[0]; ++d) {
      for (int64_t h = 0; h < size[1]; ++h) {
        S* line = data + d * space[0] + h * space[1];
        const int64_t first = x;
        x += size[2];
        if (channel == 1) {  // neighbours in memory one after the other
          for (int64_t w = 0; w < size[2]; ++w) {
            for (int64_t c = 0; c < count; ++c) f(c, first + w, line[w * space[2] + c]);
          }
        } else {
          for (int64_t c = 0; c < count; ++c) {
            S* row = line + c * channel;
            if (space[2] == 1) {
              for (int64_t w = 0; w < size[2]; ++w) f(c, first + w, row[w]);
            } else {
              for (int64_t w = 0; w < size[2]; ++w) f(c, first + w, row[w * space[2]]);
            }
          }
        }
      }
    }
  }
};

template <class S>
class CamGradient {
 public:
  CamGradient(const CamGradientArguments& args, const Parallel& parallel)
      : args_(args), cam_(args.forward), parallel_(parallel) {
    positions_ = cam_.positions();
    row_ = padded<T>(positions_);
    tile_ = smaller(larger(kGradientTileBytes / (row_ * static_cast<int64_t>(sizeof(T))), 1),
                    smaller(kGradientChannels, cam_.channels));
    tiles_ = (cam_.channels + tile_ - 1) / tile_;
    workers_ = larger(1, smaller(parallel.threads, cam_.samples * tiles_));
  }

  bool run() {
    const int64_t rows = 3 * tile_ + cam_.targets;
    const size_t bytes = static_cast<size_t>(workers_ * rows * row_) * sizeof(T);
    scratch_ = static_cast<T*>(allocate_workspace(bytes));
    if (scratch_ == nullptr) return false;
    std::memset(scratch_, 0, bytes);  // the padding of rows stays zero
    parallel_.run(
        workers_,
        [](void* self, int64_t worker) { static_cast<const CamGradient*>(self)->work(worker); },
        this);
    free_workspace(scratch_);
    return true;
  }

 private:
  using T = Accumulator<S>;
  using V = Pack<T>;

  void work(int64_t worker) const {
    T* a = scratch_ + worker * (3 * tile_ + cam_.targets) * row_;
    T* g = a + tile_ * row_;
    T* by_a = g + tile_ * row_;
    T* e = by_a + tile_ * row_;
    const int64_t units = cam_.samples * tiles_;
    int64_t sample = -1;
    for (int64_t u = units * worker / workers_; u < units * (worker + 1) / workers_; ++u) {
      const int64_t n = u / tiles_, first = u % tiles_ * tile_;
      if (n != sample) read_map_gradients(sample = n, e);
      channels(n, first, smaller(tile_, cam_.channels - first), a, g, by_a, e);
    }
  }

  void read_map_gradients(int64_t n, T* e) const {
    const T* from = static_cast<const T*>(args_.map_gradients) + n * cam_.targets * positions_;
    for (int64_t k = 0; k < cam_.targets; ++k) {
      std::memcpy(e + k * row_, from + k * positions_, static_cast<size_t>(positions_) * sizeof(T));
    }
  }

  void channels(int64_t n, int64_t first, int64_t count, T* a, T* g, T* by_a, const T* e) const {
    const int64_t row = row_;
    const T floor = cam_.rectify ? T(0) : -static_cast<T>(__builtin_inf());
    place<const S>(cam_.activations, n * cam_.activation_sample, first, cam_.activation_channel,
                   cam_.activation_space)
        .each(count, cam_.space, [&](int64_t c, int64_t x, const S& element) {
          const T value = widen(element);
          a[c * row + x] = value > floor ? value : floor;
        });
    std::memset(by_a, 0, static_cast<size_t>(count * row) * sizeof(T));
    for (int64_t k = 0; k < cam_.targets; ++k) {
      place<const S>(cam_.gradients, n * cam_.gradient_sample + k * cam_.gradient_target, first,
                     cam_.gradient_channel, cam_.gradient_space)
          .each(count, cam_.space,
                [&](int64_t c, int64_t x, const S& element) { g[c * row + x] = widen(element); });
      for (int64_t c = 0; c < count; ++c) {
        with_gradient_rule(cam_.method, cam_.eps != 0, [&](auto rule) {
          derive<decltype(rule)>(a + c * row, g + c * row, by_a + c * row, e + k * row);
          return true;
        });
      }
      if (args_.by_gradients == nullptr) continue;
      place<S>(args_.by_gradients, n * args_.by_gradient_sample + k * args_.by_gradient_target,
               first, args_.by_gradient_channel, args_.by_gradient_space)
          .each(count, cam_.space,
                [&](int64_t c, int64_t x, S& element) { narrow(g[c * row + x], &element); });
    }
    if (args_.by_activations == nullptr) return;
    place<S>(args_.by_activations, n * args_.by_activation_sample, first,
             args_.by_activation_channel, args_.by_activation_space)
        .each(count, cam_.space, [&](int64_t c, int64_t x, S& element) {
          narrow(!cam_.rectify || a[c * row + x] > 0 ? by_a[c * row + x] : T(0), &element);
        });
  }

  // One channel and target: the derivatives by g take the place of g, those by a are added.
  template <class Rule>
  void derive(const T* a, T* g, T* by_a, const T* e) const {
    if constexpr (Rule::kElementwise) {
      for (int64_t x = 0; x < row_; x += kLanes<T>) {
        const V gx = load(g + x), ax = load(a + x), ex = load(e + x);
        store(by_a + x, load(by_a + x) + ex * Rule::by_activation(gx, ax));
        store(g + x, ex * Rule::by_gradient(gx, ax));
      }
    } else {
      const V eps = broadcast(static_cast<T>(cam_.eps));
      T total = 0;
      if constexpr (Rule::kTotal) {
        V sum{};
        for (int64_t x = 0; x < row_; x += kLanes<T>) sum += load(a + x);
        total = lane_sum<T>(sum);
      }
      V packs[Rule::kSums] = {}, by_weight{};
      const V all = broadcast(total);
      for (int64_t x = 0; x < row_; x += kLanes<T>) {
        const V ax = load(a + x);
        Rule::add(load(g + x), ax, all, eps, packs);
        by_weight += load(e + x) * ax;
      }
      T sums[Rule::kSums];
      for (int i = 0; i < Rule::kSums; ++i) sums[i] = lane_sum<T>(packs[i]);
      const T d = lane_sum<T>(by_weight);
      const auto channel =
          Rule::finish(sums, total, static_cast<T>(positions_), static_cast<T>(cam_.eps));
      for (int64_t x = 0; x < row_; x += kLanes<T>) {
        const V gx = load(g + x), ax = load(a + x);
        const V by_weights = Rule::by_activation(gx, ax, channel) + channel.by_total;
        store(by_a + x, load(by_a + x) + load(e + x) * channel.w + d * by_weights);
        store(g + x, d * Rule::by_gradient(gx, ax, channel, eps));
      }
      for (int64_t x = positions_; x < row_; ++x) g[x] = 0;
    }
  }

  template <class Element>
  Place<Element> place(const void* data, int64_t offset, int64_t first, int64_t channel,
                       const int64_t* space) const {
    Element* start = static_cast<Element*>(const_cast<void*>(data));
    return {start + offset + first * channel, channel, space};
  }

  const CamGradientArguments& args_;
  const CamArguments& cam_;
  const Parallel& parallel_;
  int64_t positions_, row_, tile_, tiles_, workers_;
  T* scratch_ = nullptr;
};

inline bool cam_gradient(const CamGradientArguments& args, const Parallel& parallel) {
  switch (args.forward.dtype) {
    case ScalarType::kDouble:
      return CamGradient<double>(args, parallel).run();
    case ScalarType::kFloat:
      return CamGradient<float>(args, parallel).run();
    case ScalarType::kHalf:
      return CamGradient<Half>(args, parallel).run();
    case ScalarType::kBFloat16:
      return CamGradient<BFloat16>(args, parallel).run();
  }
  return false;
}

}  // namespace gradcampp::GCPP_TARGET
