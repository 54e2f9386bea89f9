// The op for CPU tensors, over the LibTorch stable ABI. gradcampp_ext/ops.py holds the schemas.
#include "bindings/arguments.h"
#include "bindings/powers.h"
#include "cpu/kernels.h"

namespace gradcampp {
namespace {

using torch::headeronly::ScalarType;

const CpuKernels& kernels() {
  const CpuKernels* chosen = cpu_kernels();
  STD_TORCH_CHECK(chosen != nullptr, cpu_kernels_error());
  return *chosen;
}

Parallel torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t workers, void (*task)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) task(context, worker);
            });
          }};
}

void run(const CamArguments& args) {
  STD_TORCH_CHECK(kernels().cam(args, torch_threads()), "out of memory for the workspace");
}

Tensor cam(const Tensor& activations, const Tensor& gradients, const std::string& method,
           const std::optional<std::vector<int64_t>>& size, const std::string& normalize,
           const std::string& interpolation, bool relu, bool rectify, double eps,
           double temperature) {
  CamArguments args = make_arguments(activations, gradients);
  const auto shape = output_shape(args, activations.dim() - 2, size);
  Tensor maps = torch::stable::new_empty(activations, shape, map_dtype(activations));
  if (maps.numel() == 0) return maps;
  args.method = parse_method(method);
  args.normalize = parse_normalize(normalize);
  args.interpolation = parse_interpolation(interpolation);
  args.relu = relu;
  args.rectify = rectify;
  args.eps = eps;
  args.temperature = temperature;
  args.maps = maps.mutable_data_ptr();
  run(args);
  return maps;
}

Tensor channel_weights(const Tensor& activations, const Tensor& gradients,
                       const std::string& method, bool rectify, double eps, double temperature) {
  CamArguments args = make_arguments(activations, gradients);
  Tensor weights = torch::stable::new_empty(
      activations, {args.samples, args.targets, args.channels}, map_dtype(activations));
  if (weights.numel() == 0) return weights;
  args.method = parse_method(method);
  args.rectify = rectify;
  args.eps = eps;
  args.temperature = temperature;
  args.weights = weights.mutable_data_ptr();
  run(args);
  return weights;
}

std::tuple<Tensor, Tensor> cam_backward(const Tensor& map_gradients, const Tensor& activations,
                                        const Tensor& gradients, const std::string& method,
                                        bool rectify, double eps, bool by_activations,
                                        bool by_gradients) {
  CamGradients made =
      make_gradient_arguments(map_gradients, activations, gradients, by_activations, by_gradients);
  CamArguments& forward = made.args.forward;
  forward.method = parse_method(method);
  STD_TORCH_CHECK(forward.method != Method::kAttention, "attention has no pass of its own");
  forward.rectify = rectify;
  forward.eps = eps;
  if (gradients.numel() > 0) {
    STD_TORCH_CHECK(kernels().cam_gradient(made.args, torch_threads()),
                    "out of memory for the workspace");
  }
  return {made.by_activations, made.by_gradients};
}

Tensor overlay(const Tensor& images, const Tensor& maps, const Tensor& table, double image_weight,
               double heatmap_weight) {
  OverlayArguments args = make_overlay_arguments(images, maps, table, image_weight, heatmap_weight);
  Tensor output = torch::stable::new_empty(images, {args.samples, args.height, args.width, 3},
                                           ScalarType::Byte);
  if (output.numel() == 0) return output;
  args.output = static_cast<uint8_t*>(output.mutable_data_ptr());
  kernels().overlay(args, torch_threads());
  return output;
}

void add_powers(const Tensor& sums, const Tensor& gradients) {
  const AddPowersArguments args = make_add_powers_arguments(sums, gradients);
  if (gradients.numel() != 0) kernels().add_powers(args, torch_threads());
}

Tensor power_weights(const Tensor& activations, const Tensor& sums, int64_t copies, bool rectify,
                     double eps) {
  PowerWeightsArguments args =
      make_power_weights_arguments(activations, sums, copies, rectify, eps);
  Tensor weights = torch::stable::new_empty(
      activations, {args.samples, args.targets, args.channels}, map_dtype(activations));
  if (weights.numel() == 0) return weights;
  args.weights = weights.mutable_data_ptr();
  kernels().power_weights(args, torch_threads());
  return weights;
}

std::string cpu_capability() { return kernels().name; }
std::string cpu_capabilities() { return cpu_kernels_available(); }

}  // namespace
}  // namespace gradcampp

STABLE_TORCH_LIBRARY_IMPL(gradcampp_ext, CPU, m) {
  m.impl("cam", TORCH_BOX(&gradcampp::cam));
  m.impl("channel_weights", TORCH_BOX(&gradcampp::channel_weights));
  m.impl("cam_backward", TORCH_BOX(&gradcampp::cam_backward));
  m.impl("overlay", TORCH_BOX(&gradcampp::overlay));
  m.impl("add_powers", TORCH_BOX(&gradcampp::add_powers));
  m.impl("power_weights", TORCH_BOX(&gradcampp::power_weights));
}

STABLE_TORCH_LIBRARY_IMPL(gradcampp_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&gradcampp::cpu_capability));
  m.impl("cpu_capabilities", TORCH_BOX(&gradcampp::cpu_capabilities));
}
