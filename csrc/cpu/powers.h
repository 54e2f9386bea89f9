// The ops of Smooth Grad-CAM++: sums of powers of gradients, and channel weights from them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "math/powers.h"

namespace gradcampp::GCPP_TARGET {

// Elements or channels that are worked on side by side, with what is summed of them in L1.
constexpr int64_t kPowerLanes = 64, kWeightLanes = 16;
constexpr int64_t kElementsPerWorker = 16 * 1024;

// `count` neighbours in the innermost dimension: all copies are read before the sums are written.
template <class S>
void add_powers_block(const AddPowersArguments& args, const S* gradients, double* sums,
                      int64_t count) {
  constexpr int last = AddPowersArguments::kDims - 1;
  const int64_t g_stride = args.gradient[last], s_stride = args.sum[last];
  double sum[kPowers][kPowerLanes] = {};
  for (int64_t m = 0; m < args.copies; ++m) {
    const S* copy = gradients + m * args.gradient_copy;
    double g[kPowerLanes] = {};
    for (int64_t i = 0; i < count; ++i) g[i] = widen(copy[i * g_stride]);
    for (int64_t i = 0; i < kPowerLanes; ++i) {
      sum[0][i] += g[i];
      sum[1][i] += g[i] * g[i];
      sum[2][i] += g[i] * g[i] * g[i];
    }
  }
  for (int power = 0; power < kPowers; ++power) {
    double* to = sums + power * args.sum_power;
    for (int64_t i = 0; i < count; ++i) to[i * s_stride] += sum[power][i];
  }
}

template <class S>
void add_powers_rows(const AddPowersArguments& args, int64_t begin, int64_t end) {
  constexpr int last = AddPowersArguments::kDims - 1;
  const int64_t length = args.size[last];
  for (int64_t i = begin; i < end;) {
    const int64_t first = i % length;
    int64_t from = first * args.gradient[last], to = first * args.sum[last], left = i / length;
    for (int d = last - 1; d >= 0; --d) {
      const int64_t index = left % args.size[d];
      left /= args.size[d];
      from += index * args.gradient[d];
      to += index * args.sum[d];
    }
    const int64_t count = smaller(smaller(length - first, end - i), kPowerLanes);
    add_powers_block(args, static_cast<const S*>(args.gradients) + from, args.sums + to, count);
    i += count;
  }
}

// One sample and block of channels, for every target: lanes are channels.
template <class S>
void power_weights_block(const PowerWeightsArguments& args, int64_t n, int64_t channel) {
  const int64_t lanes = smaller(kWeightLanes, args.channels - channel);
  // f(offset of a position by these strides)
  auto each_position = [&](const int64_t* stride, auto f) {
    for (int64_t d = 0; d < args.space[0]; ++d) {
      for (int64_t h = 0; h < args.space[1]; ++h) {
        for (int64_t w = 0; w < args.space[2]; ++w) {
          f(d * stride[0] + h * stride[1] + w * stride[2]);
        }
      }
    }
  };
  double total[kWeightLanes] = {};
  const S* activations = static_cast<const S*>(args.activations) + n * args.activation_sample +
                         channel * args.activation_channel;
  each_position(args.activation_space, [&](int64_t offset) {
    for (int64_t c = 0; c < lanes; ++c) {
      const double a = widen(activations[offset + c * args.activation_channel]);
      total[c] += args.rectify ? rectified(a) : a;
    }
  });
  for (int64_t k = 0; k < args.targets; ++k) {
    double weight[kWeightLanes] = {};
    const double* sums =
        args.sums + n * args.sum_sample + k * args.sum_target + channel * args.sum_channel;
    each_position(args.sum_space, [&](int64_t offset) {
      for (int64_t c = 0; c < lanes; ++c) {
        const double* sum = sums + offset + c * args.sum_channel;
        weight[c] += smooth_share(sum[0], sum[args.sum_power], sum[2 * args.sum_power], total[c],
                                  args.copies, args.eps, args.rectify);
      }
    });
    for (int64_t c = 0; c < lanes; ++c) {
      const double value = weight[c] + total[c] * 0;
      const int64_t to = (n * args.targets + k) * args.channels + channel + c;
      if (args.dtype == ScalarType::kDouble) {
        static_cast<double*>(args.weights)[to] = value;
      } else {
        static_cast<float*>(args.weights)[to] = static_cast<float>(value);
      }
    }
  }
}

// Cuts [0, count) into as many parts as there is work for; f(begin, end) does one.
template <class Args>
void in_parts(const Args& args, const Parallel& parallel, int64_t count, int64_t elements,
              void (*f)(const Args&, int64_t, int64_t)) {
  struct Job {
    const Args& args;
    int64_t count, workers;
    void (*f)(const Args&, int64_t, int64_t);
  } job{args, count, 1, f};
  job.workers = larger(1, smaller(parallel.threads, elements / kElementsPerWorker));
  parallel.run(
      job.workers,
      [](void* context, int64_t worker) {
        const Job& job = *static_cast<Job*>(context);
        job.f(job.args, job.count * worker / job.workers, job.count * (worker + 1) / job.workers);
      },
      &job);
}

template <class S>
void power_weights_units(const PowerWeightsArguments& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.channels + kWeightLanes - 1) / kWeightLanes;
  for (int64_t unit = begin; unit < end; ++unit) {
    power_weights_block<S>(args, unit / blocks, unit % blocks * kWeightLanes);
  }
}

// f(a value of the element type)
template <class F>
void by_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::kDouble:
      return f(double{});
    case ScalarType::kFloat:
      return f(float{});
    case ScalarType::kHalf:
      return f(Half{});
    case ScalarType::kBFloat16:
      return f(BFloat16{});
  }
}

inline void add_powers(const AddPowersArguments& args, const Parallel& parallel) {
  const int64_t count = args.elements();
  by_type(args.dtype, [&](auto element) {
    in_parts(args, parallel, count, count * args.copies, add_powers_rows<decltype(element)>);
  });
}

inline void power_weights(const PowerWeightsArguments& args, const Parallel& parallel) {
  const int64_t units = args.samples * ((args.channels + kWeightLanes - 1) / kWeightLanes);
  const int64_t elements = args.samples * args.targets * args.channels * args.positions();
  by_type(args.dtype, [&](auto element) {
    in_parts(args, parallel, units, elements, power_weights_units<decltype(element)>);
  });
}

}  // namespace gradcampp::GCPP_TARGET
