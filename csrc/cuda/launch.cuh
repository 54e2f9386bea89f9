// The launches of a plan for one element type; a .cu file for each type instantiates it.
#pragma once

#include <cuda_runtime.h>

#include "cam.h"
#include "cuda/fused.cuh"
#include "cuda/large.cuh"
#include "cuda/plan.h"
#include "cuda/scalar.cuh"
#include "math/methods.h"

namespace gradcampp {

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), int64_t grid, int64_t shared_bytes,
                  int cluster_blocks, cudaStream_t stream, const Arguments&... arguments) {
  constexpr int64_t kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(cluster_blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = cluster_blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Rule, class A, class G>
cudaError_t launch_pass(const Pass& pass, cudaStream_t stream) {
  using Acc = Accumulator<A>;
  constexpr int64_t kScratchBytes = kWarps * sizeof(Acc);
  if (pass.fused) {
    if (pass.counter_bytes > 0) {
      const cudaError_t error = cudaMemsetAsync(pass.fused_args.finished, 0,
                                                static_cast<size_t>(pass.counter_bytes), stream);
      if (error != cudaSuccess) return error;
    }
    return start(fused_kernel<Rule, A, G>, pass.fused_grid, pass.fused_args.shared.bytes,
                 pass.fused_args.cluster_blocks, stream, pass.fused_args);
  }
  cudaError_t error = cudaSuccess;
  if constexpr (!Rule::kElementwise) {
    error = start(weights_kernel<Rule, A, G>, pass.weights_grid, 3 * kThreads * sizeof(Acc), 1,
                  stream, pass.weights);
  }
  if (error == cudaSuccess && pass.sum_grid > 0) {
    using SumRule = std::conditional_t<Rule::kElementwise, Rule, Weighted>;
    error = start(sum_kernel<SumRule, A>, pass.sum_grid, 0, 1, stream, pass.sum);
  }
  if (error == cudaSuccess && pass.cells_grid > 0) {
    error = start(cells_kernel<Acc>, pass.cells_grid, kScratchBytes, 1, stream, pass.cells);
  }
  if (error == cudaSuccess && pass.softmax_grid > 0) {
    error = start(softmax_kernel<Acc>, pass.softmax_grid, kScratchBytes, 1, stream,
                  static_cast<const Acc*>(pass.resize.cells), pass.resize.positions,
                  pass.resize.finish, static_cast<Acc*>(pass.resize.output));
  }
  if (error == cudaSuccess && pass.resize_grid > 0) {
    error = start(resize_kernel<Acc>, pass.resize_grid, kScratchBytes, 1, stream, pass.resize);
  }
  return error;
}

template <class T>
cudaError_t launch_plan(const Plan& plan, Method method, bool eps, cudaStream_t stream) {
  const Pass& pass = plan.passes[0];
  switch (method) {
    case Method::kGradCamPlusPlus:
      return eps ? launch_pass<GradCamPlusPlus<true>, T, T>(pass, stream)
                 : launch_pass<GradCamPlusPlus<false>, T, T>(pass, stream);
    case Method::kGradCamPlusPlusNormalized:
      return eps ? launch_pass<GradCamPlusPlusNormalized<true>, T, T>(pass, stream)
                 : launch_pass<GradCamPlusPlusNormalized<false>, T, T>(pass, stream);
    case Method::kGradCam:
      return launch_pass<GradCam, T, T>(pass, stream);
    case Method::kXGradCam:
      return launch_pass<XGradCam, T, T>(pass, stream);
    case Method::kLayerCam:
      return launch_pass<LayerCam, T, T>(pass, stream);
    case Method::kHiResCam:
      return launch_pass<HiResCam, T, T>(pass, stream);
    case Method::kGradCamElementwise:
      return launch_pass<GradCamElementwise, T, T>(pass, stream);
    case Method::kAttention: {
      const cudaError_t error = launch_pass<GradCam, T, T>(pass, stream);
      if (error != cudaSuccess) return error;
      return launch_pass<AttentionPooling, T, Accumulator<T>>(plan.passes[1], stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace gradcampp
