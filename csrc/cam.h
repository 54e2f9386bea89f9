// The arguments of the op as plain data: what a binding hands to a kernel, on any device.
#pragma once

#include <cstdint>

namespace gradcampp {

enum class Method : int32_t {
  kGradCamPlusPlus,
  kGradCamPlusPlusNormalized,
  kGradCam,
  kXGradCam,
  kLayerCam,
  kHiResCam,
  kGradCamElementwise,
  kAttention,
};

enum class Normalize : int32_t { kNone, kMinMax, kMax };
enum class Interpolation : int32_t { kLinear, kNearest };
enum class ScalarType : int32_t { kDouble, kFloat, kHalf, kBFloat16 };

// Maps with one or two spatial dimensions have leading sizes of 1 and strides of 0.
constexpr int kSpaceDims = 3;

// Strides are in elements. A map holds float, or double where the input is double.
struct CamArguments {
  ScalarType dtype;  // of activations and gradients
  int64_t samples;   // N
  int64_t targets;   // K
  int64_t channels;  // C
  int64_t space[kSpaceDims];

  const void* activations;  // [N, C, *space]
  int64_t activation_sample, activation_channel, activation_space[kSpaceDims];

  const void* gradients;  // [N, K, C, *space]
  int64_t gradient_sample, gradient_target, gradient_channel, gradient_space[kSpaceDims];

  Method method;
  bool rectify;  // A is replaced by relu(A)
  double eps;
  double temperature;  // of the attention method's softmax

  void* weights;  // [N, K, C] contiguous: where only the channel weights are wanted, else null

  void* maps;  // [N, K, *size] contiguous, else null
  int64_t size[kSpaceDims];
  bool relu;
  Normalize normalize;
  Interpolation interpolation;

  int64_t positions() const { return space[0] * space[1] * space[2]; }
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  bool resized() const { return space[0] != size[0] || space[1] != size[1] || space[2] != size[2]; }
};

// The backward pass of the op at feature resolution. Derivatives of a loss by activations and
// gradients have their dtype and any strides; a null pointer means not wanted.
struct CamGradientArguments {
  CamArguments forward;       // without its outputs; attention is made of other methods' passes
  const void* map_gradients;  // [N, K, *space] contiguous, by the raw maps, of the maps' type

  void* by_activations;  // [N, C, *space]
  int64_t by_activation_sample, by_activation_channel, by_activation_space[kSpaceDims];

  void* by_gradients;  // [N, K, C, *space]
  int64_t by_gradient_sample, by_gradient_target, by_gradient_channel,
      by_gradient_space[kSpaceDims];
};

// Colour maps over images, one byte a channel: image_weight image + heatmap_weight table[map].
struct OverlayArguments {
  int64_t samples, height, width;
  const void* images;  // uint8 or float in [0, 1]
  bool images_are_bytes;
  int64_t image_sample, image_channel, image_row, image_column;
  const float* maps;  // [N, H, W] in [0, 1]
  int64_t map_sample, map_row, map_column;
  const uint8_t* table;  // [256, 3]
  float image_weight, heatmap_weight;
  uint8_t* output;  // [N, H, W, 3] contiguous
};

}  // namespace gradcampp
