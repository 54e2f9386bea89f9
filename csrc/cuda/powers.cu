// The ops of Smooth Grad-CAM++: sums of powers of gradients, and channel weights from them. Sums
// are kept in double, so that g^3 of a gradient of 1e-20 is not lost.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/scalar.cuh"
#include "cuda/shared_memory.cuh"
#include "math/methods.h"
#include "math/powers.h"

namespace gradcampp {

using namespace GCPP_TARGET;

namespace {

constexpr int kWeightChannelsLog2 = 3;  // of a block: 32 threads have one channel

// A thread has an element and reads it in every copy; neighbours are neighbours in the sums.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_powers_kernel(const __grid_constant__ AddPowersArguments args) {
  int64_t left = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t from = 0, to = 0;
#pragma unroll
  for (int d = AddPowersArguments::kDims - 1; d > 0; --d) {
    if (args.size[d] == 1) continue;
    const int64_t index = left % args.size[d];
    left /= args.size[d];
    from += index * args.gradient[d];
    to += index * args.sum[d];
  }
  if (left >= args.size[0]) return;
  const T* const g = static_cast<const T*>(args.gradients) + from + left * args.gradient[0];
  double* const sums = args.sums + to + left * args.sum[0];
  double sum[kPowers] = {0, 0, 0};
#pragma unroll 4
  for (int64_t m = 0; m < args.copies; ++m) {
    const double value = static_cast<double>(widened(g[m * args.gradient_copy]));
    sum[0] += value;
    sum[1] += value * value;
    sum[2] += value * value * value;
  }
#pragma unroll
  for (int power = 0; power < kPowers; ++power) sums[power * args.sum_power] += sum[power];
}

__device__ __forceinline__ int64_t offset_of(int64_t position, const int64_t* space,
                                             const int64_t* strides) {
  const int64_t row = position / space[2], slice = row / space[1];
  return slice * strides[0] + (row - slice * space[1]) * strides[1] +
         (position - row * space[2]) * strides[2];
}

// A block makes the weights of 2^kWeightChannelsLog2 channels of a sample for one target.
template <class T>
__global__ void __launch_bounds__(kThreads)
    power_weights_kernel(const __grid_constant__ PowerWeightsArguments args) {
  constexpr int kChannels = 1 << kWeightChannelsLog2;
  double* const totals = reinterpret_cast<double*>(shared_memory());  // [kChannels]
  double* const scratch = totals + kChannels;                         // [kThreads]
  const int64_t blocks = (args.channels + kChannels - 1) / kChannels;
  const int64_t map = blockIdx.x / blocks;
  const int64_t sample = map / args.targets, target = map % args.targets;
  const int64_t first_channel = blockIdx.x % blocks * kChannels;
  const int64_t positions = args.space[0] * args.space[1] * args.space[2];

  Row row = row_of_thread(kWeightChannelsLog2, args.activation_channel == 1);
  double sum[1] = {0};
  if (first_channel + row.channel < args.channels) {
    const T* const a = static_cast<const T*>(args.activations) + sample * args.activation_sample +
                       (first_channel + row.channel) * args.activation_channel;
    for (int64_t p = row.lane; p < positions; p += row.lanes) {
      const double cell =
          static_cast<double>(widened(a[offset_of(p, args.space, args.activation_space)]));
      sum[0] += args.rectify ? rectified(cell) : cell;
    }
  }
  add_over_row(row, sum, scratch);
  if (row.lane == 0) totals[row.channel] = sum[0];
  __syncthreads();

  row = row_of_thread(kWeightChannelsLog2, args.sum_channel == 1);
  const int64_t channel = first_channel + row.channel;
  const double total = totals[row.channel];
  double weight[1] = {0};
  if (channel < args.channels) {
    const double* const sums = args.sums + sample * args.sum_sample + target * args.sum_target +
                               channel * args.sum_channel;
    for (int64_t p = row.lane; p < positions; p += row.lanes) {
      const double* const s = sums + offset_of(p, args.space, args.sum_space);
      weight[0] += smooth_share(s[0], s[args.sum_power], s[2 * args.sum_power], total, args.copies,
                                args.eps, args.rectify);
    }
  }
  add_over_row(row, weight, scratch);
  if (row.lane == 0 && channel < args.channels) {
    static_cast<Accumulator<T>*>(args.weights)[map * args.channels + channel] =
        static_cast<Accumulator<T>>(weight[0] + total * 0);
  }
}

template <class Arguments>
cudaError_t start(void (*kernel)(Arguments), const Arguments& args, int64_t blocks,
                  size_t shared_bytes, cudaStream_t stream) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// f(a value of the element type)
template <class F>
cudaError_t by_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::kDouble:
      return f(double{});
    case ScalarType::kFloat:
      return f(float{});
    case ScalarType::kHalf:
      return f(__half{});
    case ScalarType::kBFloat16:
      return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t add_powers(const AddPowersArguments& args, cudaStream_t stream) {
  const int64_t blocks = (args.elements() + kThreads - 1) / kThreads;
  return by_type(args.dtype, [&](auto element) {
    return start(add_powers_kernel<decltype(element)>, args, blocks, 0, stream);
  });
}

cudaError_t power_weights(const PowerWeightsArguments& args, cudaStream_t stream) {
  constexpr int kChannels = 1 << kWeightChannelsLog2;
  const int64_t blocks =
      args.samples * args.targets * ((args.channels + kChannels - 1) / kChannels);
  return by_type(args.dtype, [&](auto element) {
    return start(power_weights_kernel<decltype(element)>, args, blocks,
                 (kChannels + kThreads) * sizeof(double), stream);
  });
}

}  // namespace gradcampp
