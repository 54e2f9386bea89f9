// The CPU kernels for NumPy arrays, without torch. gradcampp_ext/arrays.py checks the arguments.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bindings/options.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace gradcampp {
namespace {

const CpuKernels& kernels() {
  if (cpu_kernels() == nullptr) throw std::runtime_error(cpu_kernels_error());
  return *cpu_kernels();
}

// Threads of one call's own: no pool that a fork could leave behind.
Parallel own_threads(int64_t threads) {
  return {threads, [](int64_t workers, void (*task)(void*, int64_t), void* context) {
            std::vector<std::thread> others;
            int64_t worker = 1;
            try {
              for (; worker < workers; ++worker) others.emplace_back(task, context, worker);
            } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
              // No more threads to be had: do the rest here.
            }
            for (int64_t rest = worker; rest < workers; ++rest) task(context, rest);
            task(context, 0);
            for (std::thread& other : others) other.join();
          }};
}

ScalarType parse_dtype(const py::dtype& dtype) {
  if (dtype.kind() == 'f' && dtype.itemsize() == 8) return ScalarType::kDouble;
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return ScalarType::kFloat;
  if (dtype.kind() == 'f' && dtype.itemsize() == 2) return ScalarType::kHalf;
  throw std::runtime_error("activations must be float16, float32 or float64");
}

// [N, C, *S] and [N, K, C, *S]; the output's pointers are the caller's to set.
CamArguments make_arguments(const py::array& activations, const py::array& gradients) {
  const int64_t dims = activations.ndim() - 2;
  CamArguments args{};
  args.dtype = parse_dtype(activations.dtype());
  const int64_t item = activations.itemsize();
  args.samples = activations.shape(0);
  args.channels = activations.shape(1);
  args.targets = gradients.shape(1);
  args.activations = activations.data();
  args.activation_sample = activations.strides(0) / item;
  args.activation_channel = activations.strides(1) / item;
  args.gradients = gradients.data();
  args.gradient_sample = gradients.strides(0) / item;
  args.gradient_target = gradients.strides(1) / item;
  args.gradient_channel = gradients.strides(2) / item;
  for (int64_t d = 0; d < kSpaceDims; ++d) {
    const int64_t from = d - (kSpaceDims - dims);
    args.space[d] = from < 0 ? 1 : activations.shape(2 + from);
    args.activation_space[d] = from < 0 ? 0 : activations.strides(2 + from) / item;
    args.gradient_space[d] = from < 0 ? 0 : gradients.strides(3 + from) / item;
    args.size[d] = args.space[d];
  }
  return args;
}

py::array make_output(const CamArguments& args, const std::vector<int64_t>& shape) {
  return py::array(py::dtype(args.dtype == ScalarType::kDouble ? "float64" : "float32"), shape);
}

void run(const CamArguments& args, int64_t threads) {
  const CpuKernels& chosen = kernels();
  const py::gil_scoped_release release;
  if (!chosen.cam(args, own_threads(threads))) throw std::bad_alloc();
}

py::array cam(const py::array& activations, const py::array& gradients, const std::string& method,
              const std::vector<int64_t>& size, const std::string& normalize,
              const std::string& interpolation, bool relu, bool rectify, double eps,
              double temperature, int64_t threads) {
  CamArguments args = make_arguments(activations, gradients);
  const int64_t dims = activations.ndim() - 2;
  std::vector<int64_t> shape{args.samples, args.targets};
  for (int64_t d = 0; d < dims; ++d) {
    args.size[kSpaceDims - dims + d] = size.at(static_cast<size_t>(d));
    shape.push_back(size[static_cast<size_t>(d)]);
  }
  py::array maps = make_output(args, shape);
  if (maps.size() == 0) return maps;
  args.method = parse_method(method);
  args.normalize = parse_normalize(normalize);
  args.interpolation = parse_interpolation(interpolation);
  args.relu = relu;
  args.rectify = rectify;
  args.eps = eps;
  args.temperature = temperature;
  args.maps = maps.mutable_data();
  run(args, threads);
  return maps;
}

py::array channel_weights(const py::array& activations, const py::array& gradients,
                          const std::string& method, bool rectify, double eps, double temperature,
                          int64_t threads) {
  CamArguments args = make_arguments(activations, gradients);
  py::array weights = make_output(args, {args.samples, args.targets, args.channels});
  if (weights.size() == 0) return weights;
  args.method = parse_method(method);
  args.rectify = rectify;
  args.eps = eps;
  args.temperature = temperature;
  args.weights = weights.mutable_data();
  run(args, threads);
  return weights;
}

}  // namespace
}  // namespace gradcampp

PYBIND11_MODULE(_numpy, m) {
  m.doc() = "CPU kernels for NumPy arrays; use gradcampp_ext.arrays.";
  m.def("cam", &gradcampp::cam);
  m.def("channel_weights", &gradcampp::channel_weights);
  m.def("cpu_capability", [] { return std::string(gradcampp::kernels().name); });
}
