// Colour map, blend and rounding in one pass over the picture.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace gradcampp::GCPP_TARGET {

// 0 to 255 from a map's value; NaN and everything below 0 is 0.
GCPP_HOST_DEVICE int colour_index(float value) {
  const float scaled = value * 255.0f + 0.5f;
  return scaled >= 0.0f ? (scaled < 255.0f ? static_cast<int>(scaled) : 255) : 0;
}

GCPP_HOST_DEVICE uint8_t colour_byte(float value) {
  return static_cast<uint8_t>(value >= 0.0f ? (value < 255.0f ? value + 0.5f : 255.0f) : 0.0f);
}

template <class Pixel>
void overlay_row(const OverlayArguments& args, int64_t n, int64_t y, const float* table) {
  const Pixel* image =
      static_cast<const Pixel*>(args.images) + n * args.image_sample + y * args.image_row;
  const float* map = args.maps + n * args.map_sample + y * args.map_row;
  uint8_t* output = args.output + (n * args.height + y) * args.width * 3;
  const float weight = args.image_weight * (sizeof(Pixel) == 1 ? 1.0f : 255.0f);
  for (int64_t x = 0; x < args.width; ++x) {
    const float* colour = table + 4 * colour_index(map[x * args.map_column]);
    const Pixel* pixel = image + x * args.image_column;
    for (int channel = 0; channel < 3; ++channel) {
      output[3 * x + channel] = colour_byte(
          weight * static_cast<float>(pixel[channel * args.image_channel]) + colour[channel]);
    }
  }
}

inline void overlay(const OverlayArguments& args, const Parallel& parallel) {
  struct Job {
    const OverlayArguments& args;
    int64_t workers;
    float table[256 * 4];  // the heat map's share of each colour
  } job{args, 1, {}};
  for (int i = 0; i < 256; ++i) {
    for (int channel = 0; channel < 3; ++channel) {
      job.table[4 * i + channel] =
          args.heatmap_weight * static_cast<float>(args.table[3 * i + channel]);
    }
  }
  const int64_t rows = args.samples * args.height;
  job.workers = larger(1, smaller(parallel.threads, rows * args.width / (16 * 1024)));
  parallel.run(
      job.workers,
      [](void* context, int64_t worker) {
        const Job& job = *static_cast<Job*>(context);
        const OverlayArguments& args = job.args;
        const int64_t rows = args.samples * args.height;
        const int64_t end = rows * (worker + 1) / job.workers;
        for (int64_t row = rows * worker / job.workers; row < end; ++row) {
          if (args.images_are_bytes) {
            overlay_row<uint8_t>(args, row / args.height, row % args.height, job.table);
          } else {
            overlay_row<float>(args, row / args.height, row % args.height, job.table);
          }
        }
      },
      &job);
}

}  // namespace gradcampp::GCPP_TARGET
