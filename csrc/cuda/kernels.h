// The op on CUDA, for bindings: raw pointers, strides and a stream. Nothing here waits for the
// device or allocates; every launch may be captured in a CUDA graph. Pointers in the arguments are
// device pointers of the current device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cam.h"
#include "power_sums.h"

namespace gradcampp {

// Bytes of device memory, aligned to 16, that cam() may write to until the stream has run it.
// cudaErrorInvalidValue for more than 2^30 positions or channels, or a grid of more than 2^31 - 1
// blocks.
cudaError_t workspace_bytes(const CamArguments& arguments, int64_t* bytes);

cudaError_t cam(const CamArguments& arguments, void* workspace, cudaStream_t stream);

// The backward pass; the workspace is cam()'s in all but size.
int64_t gradient_workspace_bytes(const CamGradientArguments& arguments);
cudaError_t cam_gradient(const CamGradientArguments& arguments, void* workspace,
                         cudaStream_t stream);

cudaError_t overlay(const OverlayArguments& arguments, cudaStream_t stream);

cudaError_t add_powers(const AddPowersArguments& arguments, cudaStream_t stream);
cudaError_t power_weights(const PowerWeightsArguments& arguments, cudaStream_t stream);

}  // namespace gradcampp
