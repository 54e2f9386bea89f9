// From tensors to the plain arguments of the ops of Smooth Grad-CAM++, as arguments.h does for cam.
#pragma once

#include <algorithm>

#include "bindings/arguments.h"
#include "power_sums.h"

namespace gradcampp {

// Sums [3, N, K, C, *S] in float64 and gradients [M, N, K, C, *S] of M noisy copies. Dimensions are
// put in the order of the sums' memory and folded, so that kernels meet few and long rows.
inline AddPowersArguments make_add_powers_arguments(const Tensor& sums, const Tensor& gradients) {
  STD_TORCH_CHECK(sums.scalar_type() == torch::headeronly::ScalarType::Double,
                  "sums must be float64");
  STD_TORCH_CHECK(sums.dim() == gradients.dim() && sums.dim() >= 5 && sums.dim() <= 7 &&
                      sums.size(0) == kPowers,
                  "sums must be [3, N, K, C, *S] and gradients [M, N, K, C, *S]");
  AddPowersArguments args{};
  args.dtype = parse_dtype(gradients.scalar_type());
  args.copies = gradients.size(0);
  args.gradients = gradients.const_data_ptr();
  args.gradient_copy = gradients.stride(0);
  args.sums = static_cast<double*>(sums.mutable_data_ptr());
  args.sum_power = sums.stride(0);
  struct Dimension {
    int64_t size, gradient, sum;
  };
  std::vector<Dimension> dims;
  for (int64_t d = 1; d < sums.dim(); ++d) {
    STD_TORCH_CHECK(sums.size(d) == gradients.size(d), "gradients must have the sizes of sums");
    if (sums.size(d) != 1) dims.push_back({sums.size(d), gradients.stride(d), sums.stride(d)});
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dimension& a, const Dimension& b) { return a.sum > b.sum; });
  int at = AddPowersArguments::kDims;
  std::fill_n(args.size, at, 1);
  for (; !dims.empty(); dims.pop_back()) {
    const Dimension& outer = dims.back();
    if (at < AddPowersArguments::kDims && outer.sum == args.sum[at] * args.size[at] &&
        outer.gradient == args.gradient[at] * args.size[at]) {
      args.size[at] *= outer.size;
      continue;
    }
    --at;
    args.size[at] = outer.size;
    args.gradient[at] = outer.gradient;
    args.sum[at] = outer.sum;
  }
  return args;
}

// Activations [N, C, *S] and sums [3, N, K, C, *S]; the output's pointer is the caller's to set.
inline PowerWeightsArguments make_power_weights_arguments(const Tensor& activations,
                                                          const Tensor& sums, int64_t copies,
                                                          bool rectify, double eps) {
  const int64_t dims = activations.dim() - 2;
  STD_TORCH_CHECK(dims >= 1 && dims <= kSpaceDims,
                  "activations must be [N, C, *S] with one to three spatial sizes");
  STD_TORCH_CHECK(sums.scalar_type() == torch::headeronly::ScalarType::Double &&
                      sums.dim() == activations.dim() + 2 && sums.size(0) == kPowers &&
                      sums.size(1) == activations.size(0) && sums.size(3) == activations.size(1),
                  "sums must be float64 [3, N, K, C, *S] of the activations' sizes");
  STD_TORCH_CHECK(copies > 0, "copies must be positive");
  PowerWeightsArguments args{};
  args.dtype = parse_dtype(activations.scalar_type());
  args.samples = activations.size(0);
  args.channels = activations.size(1);
  args.targets = sums.size(2);
  args.activations = activations.const_data_ptr();
  args.activation_sample = activations.stride(0);
  args.activation_channel = activations.stride(1);
  args.sums = static_cast<const double*>(sums.const_data_ptr());
  args.sum_power = sums.stride(0);
  args.sum_sample = sums.stride(1);
  args.sum_target = sums.stride(2);
  args.sum_channel = sums.stride(3);
  for (int64_t d = 0; d < kSpaceDims; ++d) {
    const int64_t from = d - (kSpaceDims - dims);
    args.space[d] = from < 0 ? 1 : activations.size(2 + from);
    args.activation_space[d] = from < 0 ? 0 : activations.stride(2 + from);
    args.sum_space[d] = from < 0 ? 0 : sums.stride(4 + from);
    STD_TORCH_CHECK(from < 0 || sums.size(4 + from) == args.space[d],
                    "sums must have the spatial sizes of activations");
  }
  args.copies = static_cast<double>(copies);
  args.rectify = rectify;
  args.eps = eps;
  return args;
}

}  // namespace gradcampp
