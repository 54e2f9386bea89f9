// The block's dynamic shared memory, 16-byte aligned. The only shared memory that the kernels use.
#pragma once

#include <cuda_runtime.h>

namespace gradcampp {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ uint4 gradcampp_shared_memory[];
  return reinterpret_cast<unsigned char*>(gradcampp_shared_memory);
}

}  // namespace gradcampp
