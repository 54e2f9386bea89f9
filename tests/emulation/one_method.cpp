// Grad-CAM++ in float32 alone: what a changed copy of the kernels is tried on, fast to compile.
#include "cuda/launch.cuh"

namespace gradcampp {

template <>
cudaError_t launch_plan<float>(const Plan& plan, Method, bool, cudaStream_t stream) {
  return launch_pass<GradCamPlusPlus<false>, float, float>(plan.passes[0], stream);
}

}  // namespace gradcampp
