#include "cuda/kernels.h"

#include "cuda/plan.h"
#include "cuda/scalar.cuh"

namespace gradcampp {

template <class T>
cudaError_t launch_plan(const Plan& plan, Method method, bool eps, cudaStream_t stream);

namespace {

cudaError_t current_device(Device* device) {
  int index;
  cudaError_t error = cudaGetDevice(&index);
  auto read = [&](cudaDeviceAttr attribute, int* value) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  read(cudaDevAttrMultiProcessorCount, &device->processors);
  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_per_block);
  read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_per_processor);
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
