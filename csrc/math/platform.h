// What lets one text serve the host, CUDA and every CPU instruction set.
#pragma once

#if defined(__CUDACC__)
#define GCPP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GCPP_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Each CPU instruction set compiles the shared text in a namespace of its own: otherwise the
// linker may keep the AVX-512 copy of an inline function for every machine.
#ifndef GCPP_TARGET
#define GCPP_TARGET baseline
#endif
