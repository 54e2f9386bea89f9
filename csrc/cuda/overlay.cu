// Colour map, blend and rounding: a thread has a pixel, neighbours have neighbouring columns.
#include "cuda/kernels.h"
#include "math/colour.h"

namespace gradcampp {

using namespace GCPP_TARGET;

namespace {

constexpr int kOverlayThreads = 256;

template <class Pixel>
__global__ void __launch_bounds__(kOverlayThreads) overlay_kernel(const OverlayArguments args) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kOverlayThreads + threadIdx.x;
  if (pixel >= args.samples * args.height * args.width) return;
  const int64_t x = pixel % args.width, row = pixel / args.width;
  const int64_t y = row % args.height, n = row / args.height;
  const Pixel* const image = static_cast<const Pixel*>(args.images) + n * args.image_sample +
                             y * args.image_row + x * args.image_column;
  const float cell = args.maps[n * args.map_sample + y * args.map_row + x * args.map_column];
  const uint8_t* const colour = args.table + 3 * colour_index(cell);
  const float weight = args.image_weight * (sizeof(Pixel) == 1 ? 1.0f : 255.0f);
#pragma unroll
  for (int channel = 0; channel < 3; ++channel) {
    args.output[3 * pixel + channel] =
        colour_byte(weight * static_cast<float>(image[channel * args.image_channel]) +
                    args.heatmap_weight * static_cast<float>(colour[channel]));
  }
}

}  // namespace

cudaError_t overlay(const OverlayArguments& args, cudaStream_t stream) {
  const int64_t pixels = args.samples * args.height * args.width;
  const int64_t blocks = (pixels + kOverlayThreads - 1) / kOverlayThreads;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kOverlayThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(
      &config, args.images_are_bytes ? overlay_kernel<uint8_t> : overlay_kernel<float>, args);
}

}  // namespace gradcampp
