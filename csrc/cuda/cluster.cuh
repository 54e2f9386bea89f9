// Clusters of thread blocks (compute capability 9.0 and later): blocks that run at the same time
// and read each other's shared memory. Code for older devices has clusters of one block.
#pragma once

#include <cuda_runtime.h>

namespace gradcampp {

constexpr int kMostClusterBlocks = 8;  // what every device with clusters can run

// Waits for all threads of a cluster of `blocks`; each sees what the others wrote before.
__device__ __forceinline__ void meet(int blocks) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    return;
  }
#endif
  __syncthreads();
}

// Where the block of that rank in the cluster has what this block has at `shared`. To be read only
// between two meetings: before the first that block may not have begun, after the second it may
// have ended.
template <class T>
__device__ __forceinline__ const T* in_block(const T* shared, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return static_cast<const T*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
#else
  return shared;
#endif
}

}  // namespace gradcampp
