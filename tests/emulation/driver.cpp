// Reads cases from standard input, runs them on the emulator, writes the results to standard
// output; tests/test_cuda_emulation.py is the other end. All numbers are little-endian and 8 bytes
// wide unless said otherwise.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/kernels.h"

namespace {

// Not buffered: a failed case must leave nothing behind for the next process.
bool read_all(void* to, size_t bytes) {
  char* at = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t n = read(STDIN_FILENO, at, bytes);
    if (n <= 0) return false;
    at += n;
    bytes -= static_cast<size_t>(n);
  }
  return true;
}

void write_all(const void* from, size_t bytes) {
  const char* at = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t n = write(STDOUT_FILENO, at, bytes);
    if (n <= 0) std::abort();
    at += n;
    bytes -= static_cast<size_t>(n);
  }
}

int64_t number() {
  int64_t value;
  if (!read_all(&value, sizeof value)) std::exit(0);
  return value;
}
double real() {
  double value;
  if (!read_all(&value, sizeof value)) std::exit(0);
  return value;
}
void put(int64_t value) { write_all(&value, sizeof value); }

// A tensor's memory, to the byte: its size, then pieces (offset, size, bytes). Sizes beyond what
// the machine has become a sparse mapping.
class Storage {
 public:
  Storage() : bytes_(static_cast<size_t>(number())), sparse_(bytes_ > size_t{1} << 30) {
    if (sparse_) {
      data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (data_ == MAP_FAILED) std::abort();
    } else {
      data_ = ::operator new(bytes_, std::align_val_t(16));
    }
    for (int64_t pieces = number(); pieces > 0; --pieces) {
      const int64_t offset = number(), size = number();
      if (!read_all(static_cast<char*>(data_) + offset, static_cast<size_t>(size))) std::exit(0);
    }
  }
  ~Storage() {
    if (sparse_) {
      munmap(data_, bytes_);
    } else {
      ::operator delete(data_, std::align_val_t(16));
    }
  }
  Storage(const Storage&) = delete;

  template <class T>
  T* at(int64_t byte) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte);
  }

 private:
  size_t bytes_;
  bool sparse_;
  void* data_;
};

// Memory for a result: begins as 0xff.
class Result {
 public:
  explicit Result(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)), data_(::operator new(bytes_, std::align_val_t(16))) {
    std::memset(data_, 0xff, bytes_);
  }
  ~Result() { ::operator delete(data_, std::align_val_t(16)); }
  Result(const Result&) = delete;

  void* data() const { return data_; }
  void send() const { write_all(data_, bytes_); }

 private:
  size_t bytes_;
  void* data_;
};

void strides(int64_t (&to)[gradcampp::kSpaceDims]) {
  for (int64_t& stride : to) stride = number();
}

gradcampp::CamArguments cam_tensors() {
  gradcampp::CamArguments args{};
  args.dtype = static_cast<gradcampp::ScalarType>(number());
  args.samples = number();
  args.targets = number();
  args.channels = number();
  strides(args.space);
  args.activation_sample = number();
  args.activation_channel = number();
  strides(args.activation_space);
  args.gradient_sample = number();
  args.gradient_target = number();
  args.gradient_channel = number();
  strides(args.gradient_space);
  return args;
}

void run_cam() {
  gradcampp::CamArguments args = cam_tensors();
  args.method = static_cast<gradcampp::Method>(number());
  args.rectify = number() != 0;
  args.eps = real();
  args.temperature = real();
  const bool weights = number() != 0;
  strides(args.size);
  args.relu = number() != 0;
  args.normalize = static_cast<gradcampp::Normalize>(number());
  args.interpolation = static_cast<gradcampp::Interpolation>(number());
  const int64_t activation_offset = number(), gradient_offset = number();  // bytes
  const Storage activations, gradients;
  args.activations = activations.at<void>(activation_offset);
  args.gradients = gradients.at<void>(gradient_offset);
  const int64_t cells = weights ? args.channels : args.pixels();
  const Result output(args.samples * args.targets * cells *
                      (args.dtype == gradcampp::ScalarType::kDouble ? 8 : 4));
  (weights ? args.weights : args.maps) = output.data();
  int64_t bytes = 0;
  cudaError_t error = gradcampp::workspace_bytes(args, &bytes);
  if (error == cudaSuccess) {
    const Result workspace(bytes);
    error = gradcampp::cam(args, workspace.data(), nullptr);
  }
  put(error);
  put(bytes);
  put(emulation::launches);
  output.send();
}

void run_overlay() {
  gradcampp::OverlayArguments args{};
  args.samples = number();
  args.height = number();
  args.width = number();
  args.images_are_bytes = number() != 0;
  args.image_sample = number();
  args.image_channel = number();
  args.image_row = number();
  args.image_column = number();
  args.map_sample = number();
  args.map_row = number();
  args.map_column = number();
  args.image_weight = static_cast<float>(real());
  args.heatmap_weight = static_cast<float>(real());
  const int64_t image_offset = number(), map_offset = number();
  const Storage images, maps, table;
  args.images = images.at<void>(image_offset);
  args.maps = maps.at<float>(map_offset);
  args.table = table.at<uint8_t>(0);
  const Result output(args.samples * args.height * args.width * 3);
  args.output = static_cast<uint8_t*>(output.data());
  put(gradcampp::overlay(args, nullptr));
  put(0);
  put(emulation::launches);
  output.send();
}

void many(int64_t* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = number();
}

// The sums come in, and go out added to, as one piece of memory.
void run_add_powers() {
  gradcampp::AddPowersArguments args{};
  args.dtype = static_cast<gradcampp::ScalarType>(number());
  args.copies = number();
  many(args.size, args.kDims);
  args.gradient_copy = number();
  many(args.gradient, args.kDims);
  args.sum_power = number();
  many(args.sum, args.kDims);
  const int64_t gradient_offset = number();
  const Storage sums, gradients;
  args.gradients = gradients.at<void>(gradient_offset);
  const int64_t bytes = gradcampp::kPowers * args.elements() * 8;
  const Result output(bytes);
  std::memcpy(output.data(), sums.at<void>(0), static_cast<size_t>(bytes));
  args.sums = static_cast<double*>(output.data());
  put(gradcampp::add_powers(args, nullptr));
  put(0);
  put(emulation::launches);
  output.send();
}

void run_power_weights() {
  gradcampp::PowerWeightsArguments args{};
  args.dtype = static_cast<gradcampp::ScalarType>(number());
  args.samples = number();
  args.targets = number();
  args.channels = number();
  strides(args.space);
  args.activation_sample = number();
  args.activation_channel = number();
  strides(args.activation_space);
  args.sum_power = number();
  args.sum_sample = number();
  args.sum_target = number();
  args.sum_channel = number();
  strides(args.sum_space);
  args.copies = real();
  args.rectify = number() != 0;
  args.eps = real();
  const int64_t activation_offset = number(), sum_offset = number();
  const Storage activations, sums;
  args.activations = activations.at<void>(activation_offset);
  args.sums = sums.at<double>(sum_offset);
  const Result output(args.samples * args.targets * args.channels *
                      (args.dtype == gradcampp::ScalarType::kDouble ? 8 : 4));
  args.weights = output.data();
  put(gradcampp::power_weights(args, nullptr));
  put(0);
  put(emulation::launches);
  output.send();
}

// Both derivatives come back as one piece of memory.
void run_cam_gradient() {
  gradcampp::CamGradientArguments args{};
  args.forward = cam_tensors();
  args.forward.method = static_cast<gradcampp::Method>(number());
  args.forward.rectify = number() != 0;
  args.forward.eps = real();
  args.by_activation_sample = number();
  args.by_activation_channel = number();
  strides(args.by_activation_space);
  args.by_gradient_sample = number();
  args.by_gradient_target = number();
  args.by_gradient_channel = number();
  strides(args.by_gradient_space);
  const int64_t activation_bytes = number(), gradient_bytes = number();
  const int64_t map_offset = number(), activation_offset = number(), gradient_offset = number();
  const Storage maps, activations, gradients;
  args.map_gradients = maps.at<void>(map_offset);
  args.forward.activations = activations.at<void>(activation_offset);
  args.forward.gradients = gradients.at<void>(gradient_offset);
  const Result by_activations(activation_bytes), by_gradients(gradient_bytes);
  args.by_activations = activation_bytes > 0 ? by_activations.data() : nullptr;
  args.by_gradients = gradient_bytes > 0 ? by_gradients.data() : nullptr;
  const int64_t bytes = gradcampp::gradient_workspace_bytes(args);
  const Result workspace(bytes);
  put(gradcampp::cam_gradient(args, workspace.data(), nullptr));
  put(bytes);
  put(emulation::launches);
  by_activations.send();
  by_gradients.send();
}

}  // namespace

int main() {
  void (*const run[])() = {run_cam, run_overlay, run_add_powers, run_power_weights,
                           run_cam_gradient};
  for (;;) {
    const int64_t op = number();
    emulation::seed = static_cast<uint64_t>(number());
    emulation::device.processors = static_cast<int>(number());
    emulation::device.shared_per_block = static_cast<int>(number());
    emulation::device.shared_per_processor = static_cast<int>(number());
    emulation::device.clusters = number() != 0;
    ++emulation::device_index;
    emulation::launches = 0;
    run[op]();
  }
}
