// From the tensors and options of the op to the plain arguments of the kernels; every torch
// binding starts here. gradcampp_ext/ops.py checks with fuller messages; what stands here is the
// backstop for callers of torch.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/options.h"
#include "cam.h"

namespace gradcampp {

using torch::stable::Tensor;

inline ScalarType parse_dtype(torch::headeronly::ScalarType dtype) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Double:
      return ScalarType::kDouble;
    case torch::headeronly::ScalarType::Float:
      return ScalarType::kFloat;
    case torch::headeronly::ScalarType::Half:
      return ScalarType::kHalf;
    case torch::headeronly::ScalarType::BFloat16:
      return ScalarType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "activations must be floating point");
  }
}

inline torch::headeronly::ScalarType map_dtype(const Tensor& activations) {
  return activations.scalar_type() == torch::headeronly::ScalarType::Double
             ? torch::headeronly::ScalarType::Double
             : torch::headeronly::ScalarType::Float;
}

// [N, C, *S] and [N, K, C, *S]; the output's pointers are the caller's to set.
inline CamArguments make_arguments(const Tensor& activations, const Tensor& gradients) {
  const int64_t dims = activations.dim() - 2;
  STD_TORCH_CHECK(dims >= 1 && dims <= kSpaceDims,
                  "activations must be [N, C, *S] with one to three spatial sizes");
  STD_TORCH_CHECK(gradients.dim() == activations.dim() + 1, "gradients must be [N, K, C, *S]");
  STD_TORCH_CHECK(gradients.scalar_type() == activations.scalar_type(),
                  "gradients must have the dtype of activations");
  CamArguments args{};
  args.dtype = parse_dtype(activations.scalar_type());
  args.samples = activations.size(0);
  args.channels = activations.size(1);
  args.targets = gradients.size(1);
  STD_TORCH_CHECK(gradients.size(0) == args.samples && gradients.size(2) == args.channels,
                  "gradients must have the samples and channels of activations");
  args.activations = activations.const_data_ptr();
  args.activation_sample = activations.stride(0);
  args.activation_channel = activations.stride(1);
  args.gradients = gradients.const_data_ptr();
  args.gradient_sample = gradients.stride(0);
  args.gradient_target = gradients.stride(1);
  args.gradient_channel = gradients.stride(2);
  for (int64_t d = 0; d < kSpaceDims; ++d) {
    const int64_t from = d - (kSpaceDims - dims);
    args.space[d] = from < 0 ? 1 : activations.size(2 + from);
    args.activation_space[d] = from < 0 ? 0 : activations.stride(2 + from);
    args.gradient_space[d] = from < 0 ? 0 : gradients.stride(3 + from);
    args.size[d] = args.space[d];
    STD_TORCH_CHECK(from < 0 || gradients.size(3 + from) == args.space[d],
                    "gradients must have the spatial sizes of activations");
  }
  STD_TORCH_CHECK(args.channels > 0 && args.positions() > 0,
                  "activations must have at least one channel and one position");
  return args;
}

// The output of the op, [N, K, *size], whose sizes go into args.size.
inline std::vector<int64_t> output_shape(CamArguments& args, int64_t dims,
                                         const std::optional<std::vector<int64_t>>& size) {
  std::vector<int64_t> shape{args.samples, args.targets};
  STD_TORCH_CHECK(!size || static_cast<int64_t>(size->size()) == dims,
                  "size must have one entry for each spatial dimension");
  for (int64_t d = 0; d < dims; ++d) {
    int64_t& length = args.size[kSpaceDims - dims + d];
    if (size) length = (*size)[static_cast<size_t>(d)];
    STD_TORCH_CHECK(length > 0, "size must be positive");
    shape.push_back(length);
  }
  return shape;
}

struct CamGradients {
  CamGradientArguments args;
  Tensor by_activations, by_gradients;  // like activations and gradients; empty if not wanted
};

// The backward pass, from the gradients of a loss by the raw maps, [N, K, *S].
inline CamGradients make_gradient_arguments(const Tensor& map_gradients, const Tensor& activations,
                                            const Tensor& gradients, bool by_activations,
                                            bool by_gradients) {
  CamGradientArguments args{};
  args.forward = make_arguments(activations, gradients);
  const int64_t dims = activations.dim() - 2;
  bool fits = map_gradients.scalar_type() == map_dtype(activations) &&
              map_gradients.is_contiguous() && map_gradients.dim() == dims + 2 &&
              map_gradients.size(0) == args.forward.samples &&
              map_gradients.size(1) == args.forward.targets;
  for (int64_t d = 0; fits && d < dims; ++d) {
    fits = map_gradients.size(2 + d) == activations.size(2 + d);
  }
  STD_TORCH_CHECK(fits, "map_gradients must be a contiguous [N, K, *S] of the maps' dtype");
  args.map_gradients = map_gradients.const_data_ptr();
  CamGradients made{args,
                    by_activations ? torch::stable::empty_like(activations)
                                   : torch::stable::new_empty(activations, {0}),
                    by_gradients ? torch::stable::empty_like(gradients)
                                 : torch::stable::new_empty(gradients, {0})};
  auto strides = [&](const Tensor& tensor, int64_t first, int64_t (&to)[kSpaceDims]) {
    for (int64_t d = 0; d < dims; ++d) to[kSpaceDims - dims + d] = tensor.stride(first + d);
  };
  if (by_activations) {
    made.args.by_activations = made.by_activations.mutable_data_ptr();
    made.args.by_activation_sample = made.by_activations.stride(0);
    made.args.by_activation_channel = made.by_activations.stride(1);
    strides(made.by_activations, 2, made.args.by_activation_space);
  }
  if (by_gradients) {
    made.args.by_gradients = made.by_gradients.mutable_data_ptr();
    made.args.by_gradient_sample = made.by_gradients.stride(0);
    made.args.by_gradient_target = made.by_gradients.stride(1);
    made.args.by_gradient_channel = made.by_gradients.stride(2);
    strides(made.by_gradients, 3, made.args.by_gradient_space);
  }
  return made;
}

// uint8 [N, H, W, 3] over images [N, H, W, 3] of any strides and float maps [N, H, W].
inline OverlayArguments make_overlay_arguments(const Tensor& images, const Tensor& maps,
                                               const Tensor& table, double image_weight,
                                               double heatmap_weight) {
  const auto dtype = images.scalar_type();
  STD_TORCH_CHECK(
      dtype == torch::headeronly::ScalarType::Byte || dtype == torch::headeronly::ScalarType::Float,
      "images must be uint8 or float32");
  STD_TORCH_CHECK(maps.scalar_type() == torch::headeronly::ScalarType::Float,
                  "maps must be float32");
  STD_TORCH_CHECK(table.scalar_type() == torch::headeronly::ScalarType::Byte && table.dim() == 2 &&
                      table.size(0) == 256 && table.size(1) == 3 && table.is_contiguous(),
                  "table must be a contiguous uint8 [256, 3]");
  STD_TORCH_CHECK(images.dim() == 4 && maps.dim() == 3 && images.size(3) == 3 &&
                      images.size(0) == maps.size(0) && images.size(1) == maps.size(1) &&
                      images.size(2) == maps.size(2),
                  "images must be [N, H, W, 3] and maps [N, H, W]");
  OverlayArguments args{};
  args.samples = maps.size(0);
  args.height = maps.size(1);
  args.width = maps.size(2);
  args.images = images.const_data_ptr();
  args.images_are_bytes = dtype == torch::headeronly::ScalarType::Byte;
  args.image_sample = images.stride(0);
  args.image_row = images.stride(1);
  args.image_column = images.stride(2);
  args.image_channel = images.stride(3);
  args.maps = static_cast<const float*>(maps.const_data_ptr());
  args.map_sample = maps.stride(0);
  args.map_row = maps.stride(1);
  args.map_column = maps.stride(2);
  args.table = static_cast<const uint8_t*>(table.const_data_ptr());
  args.image_weight = static_cast<float>(image_weight);
  args.heatmap_weight = static_cast<float>(heatmap_weight);
  return args;
}

}  // namespace gradcampp
