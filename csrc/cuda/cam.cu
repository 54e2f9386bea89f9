#include "cuda/kernels.h"

#include "cuda/plan.h"
#include "cuda/scalar.cuh"

namespace gradcampp {

template <class T>
cudaError_t launch_plan(const Plan& plan, Method method, bool eps, cudaStream_t stream);

namespace {

// Whether the code that the device runs has clusters: a build for older devices alone, compiled
// further from its PTX, has not.
__global__ void code_of_this_device() {}

cudaError_t current_device(Device* device) {
  thread_local int known = -1;  // the device that was asked last, and what it said
  thread_local Device answer;
  int index;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess && index != known) {
    auto read = [&](cudaDeviceAttr attribute, int* value) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
    };
    int clusters = 0;
    read(cudaDevAttrMultiProcessorCount, &answer.processors);
    read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &answer.shared_per_block);
    read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &answer.shared_per_processor);
    read(cudaDevAttrClusterLaunch, &clusters);
    cudaFuncAttributes code = {};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, code_of_this_device);
    answer.cluster_blocks = clusters != 0 && code.ptxVersion >= 90 ? kMostClusterBlocks : 1;
    known = error == cudaSuccess ? index : -1;
  }
  *device = answer;
  return error;
}

cudaError_t plan_here(const CamArguments& args, void* workspace, Plan* plan) {
  Device device;
  const cudaError_t error = current_device(&device);
  return error != cudaSuccess ? error : make_plan(args, device, workspace, plan);
}

}  // namespace

cudaError_t workspace_bytes(const CamArguments& args, int64_t* bytes) {
  Plan plan;
  const cudaError_t error = plan_here(args, nullptr, &plan);
  *bytes = plan.workspace_bytes;
  return error;
}

cudaError_t cam(const CamArguments& args, void* workspace, cudaStream_t stream) {
  Plan plan;
  const cudaError_t error = plan_here(args, workspace, &plan);
  if (error != cudaSuccess) return error;
  const bool eps = args.eps != 0;
  switch (args.dtype) {
    case ScalarType::kDouble:
      return launch_plan<double>(plan, args.method, eps, stream);
    case ScalarType::kFloat:
      return launch_plan<float>(plan, args.method, eps, stream);
    case ScalarType::kHalf:
      return launch_plan<__half>(plan, args.method, eps, stream);
    case ScalarType::kBFloat16:
      return launch_plan<__nv_bfloat16>(plan, args.method, eps, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace gradcampp
