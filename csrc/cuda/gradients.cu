// The backward pass of the op: derivatives by activations and gradients from those by the raw maps.
// A block has some channels of a sample and goes through their positions twice for each target:
// for the sums over the channel, then for the derivatives.
#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/scalar.cuh"
#include "cuda/shared_memory.cuh"
#include "math/gradients.h"

namespace gradcampp {

using namespace GCPP_TARGET;

namespace {

__device__ __forceinline__ void narrow(double value, double* to) { *to = value; }
__device__ __forceinline__ void narrow(float value, float* to) { *to = value; }
__device__ __forceinline__ void narrow(float value, __half* to) { *to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* to) {
  *to = __float2bfloat16_rn(value);
}

// What a target's channel weight leaves for the derivatives by the activations:
// e w + constant + slope g.
template <class Acc>
struct Share {
  Acc w, constant, slope;
};

struct GradientKernelArguments {
  CamGradientArguments op;
  int64_t positions;
  void* shares;       // [samples, targets, channels]
  int channels_log2;  // of a block
  bool channels_adjacent;
};

__device__ __forceinline__ int64_t offset_of(int64_t position, const int64_t* space,
                                             const int64_t* strides) {
  const int64_t row = position / space[2], slice = row / space[1];
  return slice * strides[0] + (row - slice * space[1]) * strides[1] +
         (position - row * space[2]) * strides[2];
}

template <class Rule, class T>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const __grid_constant__ GradientKernelArguments args) {
  using Acc = Accumulator<T>;
  const CamArguments& cam = args.op.forward;
  const int block_channels = 1 << args.channels_log2;
  const int64_t blocks = (cam.channels + block_channels - 1) >> args.channels_log2;
  const int64_t n = blockIdx.x / blocks;
  const Row row = row_of_thread(args.channels_log2, args.channels_adjacent);
  const int64_t c = blockIdx.x % blocks * block_channels + row.channel;
  // Threads without a channel take part in the sums, with no positions.
  const int64_t positions = c < cam.channels ? args.positions : 0;
  const Acc floor = cam.rectify ? Acc(0) : -static_cast<Acc>(INFINITY);
  const Acc eps = static_cast<Acc>(cam.eps);

  const T* const a = static_cast<const T*>(cam.activations) + n * cam.activation_sample +
                     c * cam.activation_channel;
  const auto activation = [&](int64_t p) {
    const Acc value = widened(a[offset_of(p, cam.space, cam.activation_space)]);
    return value > floor ? value : floor;
  };
  const auto gradient = [&](int64_t k, int64_t p) {
    const T* const g = static_cast<const T*>(cam.gradients) + n * cam.gradient_sample +
                       k * cam.gradient_target + c * cam.gradient_channel;
    return Acc(widened(g[offset_of(p, cam.space, cam.gradient_space)]));
  };
  const Acc* const by_maps =
      static_cast<const Acc*>(args.op.map_gradients) + n * cam.targets * args.positions;
  const auto by_map = [&](int64_t k, int64_t p) { return by_maps[k * args.positions + p]; };
  const auto put_by_gradient = [&](int64_t k, int64_t p, Acc value) {
    T* const to = static_cast<T*>(args.op.by_gradients) + n * args.op.by_gradient_sample +
                  k * args.op.by_gradient_target + c * args.op.by_gradient_channel;
    narrow(value, to + offset_of(p, cam.space, args.op.by_gradient_space));
  };
  const auto put_by_activation = [&](int64_t p, Acc value) {
    T* const to = static_cast<T*>(args.op.by_activations) + n * args.op.by_activation_sample +
                  c * args.op.by_activation_channel;
    const bool passes = !cam.rectify || activation(p) > 0;
    narrow(passes ? value : Acc(0), to + offset_of(p, cam.space, args.op.by_activation_space));
  };

  if constexpr (Rule::kElementwise) {
    for (int64_t p = row.lane; p < positions; p += row.lanes) {
      const Acc ap = activation(p);
      Acc by_a = 0;
      for (int64_t k = 0; k < cam.targets; ++k) {
        const Acc gp = gradient(k, p), e = by_map(k, p);
        by_a += e * Rule::by_activation(gp, ap);
        if (args.op.by_gradients != nullptr) put_by_gradient(k, p, e * Rule::by_gradient(gp, ap));
      }
      if (args.op.by_activations != nullptr) put_by_activation(p, by_a);
    }
  } else {
    constexpr int kSums = Rule::kSums;
    Acc* const scratch = reinterpret_cast<Acc*>(shared_memory());  // [kSums + 1, kThreads]
    Acc total[1] = {0};
    if constexpr (Rule::kTotal) {
      for (int64_t p = row.lane; p < positions; p += row.lanes) total[0] += activation(p);
      add_over_row(row, total, scratch);
      __syncthreads();
    }
    Share<Acc>* const shares =
        static_cast<Share<Acc>*>(args.shares) + n * cam.targets * cam.channels + c;
    for (int64_t k = 0; k < cam.targets; ++k) {
      Acc sums[kSums + 1] = {};
      for (int64_t p = row.lane; p < positions; p += row.lanes) {
        const Acc ap = activation(p);
        Rule::add(gradient(k, p), ap, total[0], eps, sums);
        sums[kSums] += by_map(k, p) * ap;
      }
      add_over_row(row, sums, scratch);
      __syncthreads();
      const Acc d = sums[kSums];
      const auto channel = Rule::finish(sums, total[0], static_cast<Acc>(args.positions), eps);
      if (args.op.by_gradients != nullptr) {
        for (int64_t p = row.lane; p < positions; p += row.lanes) {
          const Acc gp = gradient(k, p);
          put_by_gradient(k, p, d * Rule::by_gradient(gp, activation(p), channel, eps));
        }
      }
      if (row.lane == 0 && c < cam.channels) {
        shares[k * cam.channels] = {channel.w, d * channel.by_total,
                                    d * Rule::by_activation(Acc(1), Acc(0), channel)};
      }
    }
    if (args.op.by_activations == nullptr) return;
    __syncthreads();
    for (int64_t p = row.lane; p < positions; p += row.lanes) {
      Acc by_a = 0;
      for (int64_t k = 0; k < cam.targets; ++k) {
        const Share<Acc> share = shares[k * cam.channels];
        by_a += by_map(k, p) * share.w + share.constant + share.slope * gradient(k, p);
      }
      put_by_activation(p, by_a);
    }
  }
}

template <class T>
cudaError_t launch(const CamGradientArguments& op, void* workspace, cudaStream_t stream) {
  const CamArguments& cam = op.forward;
  GradientKernelArguments args{op, cam.positions(), workspace, 0, false};
  // A warp on 32 neighbouring channels, or as many threads to a channel as it has positions.
  args.channels_adjacent = cam.activation_channel == 1 && cam.activation_space[2] != 1;
  while (args.channels_adjacent ? (1 << args.channels_log2) < kWarp
                                : (args.positions << args.channels_log2) * 2 <= kThreads) {
    ++args.channels_log2;
  }
  const int64_t block_channels = int64_t{1} << args.channels_log2;
  const int64_t grid = cam.samples * ((cam.channels + block_channels - 1) / block_channels);
  if (grid > 0x7fffffff) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaError_t error = cudaErrorInvalidValue;
  with_gradient_rule(cam.method, cam.eps != 0, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (!Rule::kElementwise) {
      config.dynamicSmemBytes = (Rule::kSums + 1) * kThreads * sizeof(Accumulator<T>);
    }
    error = cudaLaunchKernelEx(&config, gradients_kernel<Rule, T>, args);
    return true;
  });
  return error;
}

}  // namespace

int64_t gradient_workspace_bytes(const CamGradientArguments& args) {
  const CamArguments& cam = args.forward;
  const int64_t shares = cam.samples * cam.targets * cam.channels;
  return shares * static_cast<int64_t>(cam.dtype == ScalarType::kDouble ? sizeof(Share<double>)
                                                                        : sizeof(Share<float>));
}

cudaError_t cam_gradient(const CamGradientArguments& args, void* workspace, cudaStream_t stream) {
  switch (args.forward.dtype) {
    case ScalarType::kDouble:
      return launch<double>(args, workspace, stream);
    case ScalarType::kFloat:
      return launch<float>(args, workspace, stream);
    case ScalarType::kHalf:
      return launch<__half>(args, workspace, stream);
    case ScalarType::kBFloat16:
      return launch<__nv_bfloat16>(args, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace gradcampp
