// The part of CUDA that the kernels use, on the emulator.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <source_location>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())

struct uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- Device code ----

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  ::emulation::barrier(where);
}
inline void __threadfence() { ::emulation::fence(); }

inline void __cluster_barrier_arrive() { ::emulation::cluster_arrive(); }
inline void __cluster_barrier_wait() { ::emulation::cluster_wait(); }
inline const void* __cluster_map_shared_rank(const void* shared, unsigned rank) {
  return ::emulation::in_cluster(shared, rank);
}

template <class T>
T emulated_shuffle(unsigned mask, T value, unsigned source, std::source_location where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = ::emulation::exchange(mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source,
              std::source_location where = std::source_location::current()) {
  return emulated_shuffle(mask, value, static_cast<unsigned>(source), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes,
                  std::source_location where = std::source_location::current()) {
  return emulated_shuffle(mask, value, ::emulation::lane() ^ static_cast<unsigned>(lanes), where);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  ::emulation::maybe_yield();
  const unsigned before = *address;
  *address += value;
  ::emulation::maybe_yield();
  return before;
}
template <class T>
T __ldcg(const T* address) {
  T value;
  ::emulation::load(&value, address, sizeof value);
  return value;
}
template <class T>
void __stcg(T* address, T value) {
  ::emulation::store(address, &value, sizeof value);
}
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }

// ---- Host code ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct EmulatedStream*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrClusterLaunch,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = ::emulation::device_index;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ::emulation::Device& device = ::emulation::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.processors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_per_processor;
      break;
    case cudaDevAttrClusterLaunch:
      *value = device.clusters;
      break;
  }
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

inline std::map<void*, int>& emulated_shared_limits() {
  static std::map<void*, int> limits;
  return limits;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > ::emulation::device.shared_per_block) return cudaErrorInvalidValue;
  emulated_shared_limits()[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    ::emulation::Index clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto found = emulated_shared_limits().find(reinterpret_cast<void*>(kernel));
  const size_t limit = found == emulated_shared_limits().end() ? 48 * 1024 : found->second;
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.z == 0 ||
      block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024 ||
      config->dynamicSmemBytes > limit) {
    return cudaErrorInvalidConfiguration;
  }
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const ::emulation::Index& wanted = config->attrs[i].val.clusterDim;
    cluster = wanted.x;
    if (cluster == 0 || cluster > 8 || grid.x % cluster != 0 || wanted.y != 1 || wanted.z != 1 ||
        !::emulation::device.clusters) {
      return cudaErrorInvalidConfiguration;
    }
  }
  ::emulation::run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster,
                   config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
