// The op for CUDA tensors, over the LibTorch stable ABI. gradcampp_ext/ops.py holds the schemas.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "bindings/arguments.h"
#include "bindings/powers.h"
#include "cuda/kernels.h"

namespace gradcampp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

void check_device(const Tensor& tensor, const Tensor& first, const char* message) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(),
                  message);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The caller holds the device guard. The workspace comes from torch's caching allocator, which
// gives it to nobody else before the stream is done with it.
void run(const CamArguments& args, const Tensor& activations) {
  int64_t bytes = 0;
  STD_CUDA_CHECK(workspace_bytes(args, &bytes));
  const Tensor workspace = torch::stable::new_empty(activations, {bytes}, ScalarType::Byte);
  STD_CUDA_CHECK(cam(args, workspace.mutable_data_ptr(), current_stream(activations)));
}

Tensor cam_cuda(const Tensor& activations, const Tensor& gradients, const std::string& method,
                const std::optional<std::vector<int64_t>>& size, const std::string& normalize,
                const std::string& interpolation, bool relu, bool rectify, double eps,
                double temperature) {
  check_device(gradients, activations, "gradients must be on the device of activations");
  CamArguments args = make_arguments(activations, gradients);
  const auto shape = output_shape(args, activations.dim() - 2, size);
  args.method = parse_method(method);
  args.normalize = parse_normalize(normalize);
  args.interpolation = parse_interpolation(interpolation);
  args.relu = relu;
  args.rectify = rectify;
  args.eps = eps;
  args.temperature = temperature;
  const DeviceGuard guard(activations.get_device_index());
  Tensor maps = torch::stable::new_empty(activations, shape, map_dtype(activations));
  if (maps.numel() == 0) return maps;
  args.maps = maps.mutable_data_ptr();
  run(args, activations);
  return maps;
}

Tensor channel_weights_cuda(const Tensor& activations, const Tensor& gradients,
                            const std::string& method, bool rectify, double eps,
                            double temperature) {
  check_device(gradients, activations, "gradients must be on the device of activations");
  CamArguments args = make_arguments(activations, gradients);
  args.method = parse_method(method);
  args.rectify = rectify;
  args.eps = eps;
  args.temperature = temperature;
  const DeviceGuard guard(activations.get_device_index());
  Tensor weights = torch::stable::new_empty(
      activations, {args.samples, args.targets, args.channels}, map_dtype(activations));
  if (weights.numel() == 0) return weights;
  args.weights = weights.mutable_data_ptr();
  run(args, activations);
  return weights;
}

std::tuple<Tensor, Tensor> cam_backward_cuda(const Tensor& map_gradients, const Tensor& activations,
                                             const Tensor& gradients, const std::string& method,
                                             bool rectify, double eps, bool by_activations,
                                             bool by_gradients) {
  check_device(gradients, activations, "gradients must be on the device of activations");
  check_device(map_gradients, activations, "map_gradients must be on the device of activations");
  const DeviceGuard guard(activations.get_device_index());
  CamGradients made =
      make_gradient_arguments(map_gradients, activations, gradients, by_activations, by_gradients);
  CamArguments& forward = made.args.forward;
  forward.method = parse_method(method);
  STD_TORCH_CHECK(forward.method != Method::kAttention, "attention has no pass of its own");
  forward.rectify = rectify;
  forward.eps = eps;
  if (gradients.numel() > 0) {
    const Tensor workspace = torch::stable::new_empty(
        activations, {gradient_workspace_bytes(made.args)}, ScalarType::Byte);
    STD_CUDA_CHECK(
        cam_gradient(made.args, workspace.mutable_data_ptr(), current_stream(activations)));
  }
  return {made.by_activations, made.by_gradients};
}

Tensor overlay_cuda(const Tensor& images, const Tensor& maps, const Tensor& table,
                    double image_weight, double heatmap_weight) {
  check_device(maps, images, "maps must be on the device of images");
  check_device(table, images, "table must be on the device of images");
  OverlayArguments args = make_overlay_arguments(images, maps, table, image_weight, heatmap_weight);
  const DeviceGuard guard(images.get_device_index());
  Tensor output = torch::stable::new_empty(images, {args.samples, args.height, args.width, 3},
                                           ScalarType::Byte);
  if (output.numel() == 0) return output;
  args.output = static_cast<uint8_t*>(output.mutable_data_ptr());
  STD_CUDA_CHECK(overlay(args, current_stream(images)));
  return output;
}

void add_powers_cuda(const Tensor& sums, const Tensor& gradients) {
  check_device(gradients, sums, "gradients must be on the device of sums");
  const AddPowersArguments args = make_add_powers_arguments(sums, gradients);
  const DeviceGuard guard(sums.get_device_index());
  if (gradients.numel() != 0) STD_CUDA_CHECK(add_powers(args, current_stream(sums)));
}

Tensor power_weights_cuda(const Tensor& activations, const Tensor& sums, int64_t copies,
                          bool rectify, double eps) {
  check_device(sums, activations, "sums must be on the device of activations");
  PowerWeightsArguments args =
      make_power_weights_arguments(activations, sums, copies, rectify, eps);
  const DeviceGuard guard(activations.get_device_index());
  Tensor weights = torch::stable::new_empty(
      activations, {args.samples, args.targets, args.channels}, map_dtype(activations));
  if (weights.numel() == 0) return weights;
  args.weights = weights.mutable_data_ptr();
  STD_CUDA_CHECK(power_weights(args, current_stream(activations)));
  return weights;
}

}  // namespace
}  // namespace gradcampp

STABLE_TORCH_LIBRARY_IMPL(gradcampp_ext, CUDA, m) {
  m.impl("cam", TORCH_BOX(&gradcampp::cam_cuda));
  m.impl("channel_weights", TORCH_BOX(&gradcampp::channel_weights_cuda));
  m.impl("cam_backward", TORCH_BOX(&gradcampp::cam_backward_cuda));
  m.impl("overlay", TORCH_BOX(&gradcampp::overlay_cuda));
  m.impl("add_powers", TORCH_BOX(&gradcampp::add_powers_cuda));
  m.impl("power_weights", TORCH_BOX(&gradcampp::power_weights_cuda));
}
