// Stands in for element types that a test leaves out to compile faster.
#include "cuda/plan.h"
#include "cuda/scalar.cuh"

namespace gradcampp {

template <class T>
cudaError_t launch_plan(const Plan& plan, Method method, bool eps, cudaStream_t stream);

#define EMULATE_MISSING(T)                                              \
  template <>                                                           \
  cudaError_t launch_plan<T>(const Plan&, Method, bool, cudaStream_t) { \
    return cudaErrorInvalidValue;                                       \
  }

#ifdef EMULATE_WITHOUT_DOUBLE
EMULATE_MISSING(double)
#endif
#ifdef EMULATE_WITHOUT_FLOAT
EMULATE_MISSING(float)
#endif
#ifdef EMULATE_WITHOUT_HALF
EMULATE_MISSING(__half)
#endif
#ifdef EMULATE_WITHOUT_BFLOAT16
EMULATE_MISSING(__nv_bfloat16)
#endif

}  // namespace gradcampp
