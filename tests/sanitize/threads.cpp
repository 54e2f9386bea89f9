// Every CPU kernel on many threads, for ThreadSanitizer: it sees all memory accesses of the kernels
// and all that std::thread orders. Torch's threads are OpenMP's, whose barriers it cannot see; the
// kernels are the same. Also run by several callers at once, as Python threads do.
//
// Prints how many calls were made; a report of the sanitizer, a result that differs from run to
// run, one that is far from that of a single thread, or a call that kept to one thread, ends it
// with an error.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace gradcampp;

namespace {

std::atomic<int64_t> calls{0};
thread_local int64_t workers_used = 0;  // by the last call of this thread

// As csrc/bindings/numpy.cpp has it.
Parallel threads(int64_t count) {
  return {count, [](int64_t workers, void (*task)(void*, int64_t), void* context) {
            workers_used = std::max(workers_used, workers);
            std::vector<std::thread> others;
            for (int64_t worker = 1; worker < workers; ++worker) {
              others.emplace_back(task, context, worker);
            }
            task(context, 0);
            for (std::thread& other : others) other.join();
          }};
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// Counts a call, which must have been shared: small ones keep to one thread, where nothing can
// race.
void called(const char* kernel, bool shared) {
  ++calls;
  if (shared && workers_used < 2) fail(kernel);
  workers_used = 0;
}

struct Shape {
  int64_t samples, targets, channels, space[kSpaceDims];
  int64_t positions() const { return space[0] * space[1] * space[2]; }
};

enum class Layout { kContiguous, kChannelsLast, kSliced, kExpanded };

size_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::kDouble ? 8 : dtype == ScalarType::kFloat ? 4 : 2;
}

// Memory of exactly the size that a tensor reaches, with values between 1/8 and 2.
struct Tensor {
  std::vector<unsigned char> data;
  int64_t outer, channel, space[kSpaceDims];  // strides; outer: of samples, or samples x targets

  Tensor(const Shape& shape, int64_t outers, ScalarType dtype, Layout layout, bool is_signed,
         std::mt19937& random) {
    const int64_t gap = layout == Layout::kSliced ? 3 : 1;
    const int64_t width = shape.space[2], height = shape.space[1];
    const bool last = layout == Layout::kChannelsLast, flat = layout == Layout::kExpanded;
    const int64_t step = flat ? 0 : (last ? shape.channels : gap);
    space[2] = step;
    space[1] = step * width;
    space[0] = step * width * height;
    channel = last || flat ? 1 : gap * shape.positions();
    outer = flat ? shape.channels : gap * shape.channels * shape.positions();
    data.resize(static_cast<size_t>(outers * outer) * bytes_of(dtype));
    const size_t count = data.size() / bytes_of(dtype);
    for (size_t i = 0; i < count; ++i) {
      const uint32_t bits = random();
      const bool negative = is_signed && (bits >> 31);
      const double value = (0.125 + (bits & 0xffff) / 40000.0) * (negative ? -1 : 1);
      if (dtype == ScalarType::kDouble) put(i, value);
      if (dtype == ScalarType::kFloat) put(i, static_cast<float>(value));
      const uint16_t sign = negative ? 0x8000 : 0;  // halves: random digits, exponents near zero
      if (dtype == ScalarType::kHalf)
        put(i, static_cast<uint16_t>(sign | (0x3000 + bits % 0x0fff)));
      if (dtype == ScalarType::kBFloat16) {
        put(i, static_cast<uint16_t>(sign | (0x3e00 + bits % 0x01ff)));
      }
    }
  }

  template <class T>
  void put(size_t i, T value) {
    std::memcpy(&data[i * sizeof(T)], &value, sizeof(T));
  }
};

struct Case {
  Shape shape;
  ScalarType dtype;
  Method method;
  Layout a, g;
};

std::vector<double> widened(const std::vector<unsigned char>& bytes, ScalarType dtype) {
  std::vector<double> values;
  if (dtype == ScalarType::kDouble) {
    values.resize(bytes.size() / 8);
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  std::vector<float> floats(bytes.size() / 4);
  std::memcpy(floats.data(), bytes.data(), bytes.size());
  return {floats.begin(), floats.end()};
}

void expect_near(const std::vector<double>& found, const std::vector<double>& wanted) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    difference += (found[i] - wanted[i]) * (found[i] - wanted[i]);
    norm += wanted[i] * wanted[i];
  }
  if (!(std::sqrt(difference) <= 1e-3 * std::sqrt(norm) + 1e-6)) fail("threads change the result");
}

CamArguments arguments(const Case& c, const Tensor& a, const Tensor& g) {
  CamArguments args{};
  args.dtype = c.dtype;
  args.samples = c.shape.samples;
  args.targets = c.shape.targets;
  args.channels = c.shape.channels;
  args.activations = a.data.data();
  args.activation_sample = a.outer;
  args.activation_channel = a.channel;
  args.gradients = g.data.data();
  args.gradient_sample = g.outer * c.shape.targets;
  args.gradient_target = g.outer;
  args.gradient_channel = g.channel;
  for (int d = 0; d < kSpaceDims; ++d) {
    args.space[d] = c.shape.space[d];
    args.activation_space[d] = a.space[d];
    args.gradient_space[d] = g.space[d];
    args.size[d] = c.shape.space[d] == 1 ? 1 : 2 * c.shape.space[d] + 1;
  }
  args.method = c.method;
  args.rectify = c.method == Method::kGradCamPlusPlus;
  args.eps = c.method == Method::kAttention ? 1e-8 : 0;
  args.temperature = 1;
  args.relu = true;
  args.normalize = Normalize::kNone;
  args.interpolation = Interpolation::kLinear;
  return args;
}

// Maps, weights and derivatives by so many threads, one after the other in one vector.
std::vector<double> run(const Case& c, const Tensor& a, const Tensor& g, int64_t count) {
  const CpuKernels& kernels = *cpu_kernels();
  const size_t item = c.dtype == ScalarType::kDouble ? 8 : 4;
  const int64_t outers = c.shape.samples * c.shape.targets;
  CamArguments args = arguments(c, a, g);
  std::vector<unsigned char> maps(static_cast<size_t>(outers * args.pixels()) * item);
  args.maps = maps.data();
  if (!kernels.cam(args, threads(count))) fail("no memory");
  called("cam by one thread", count > 1);
  std::vector<double> results = widened(maps, c.dtype);
  auto add = [&](const std::vector<double>& more) {
    results.insert(results.end(), more.begin(), more.end());
  };
  const bool channelwise = c.method != Method::kLayerCam && c.method != Method::kHiResCam &&
                           c.method != Method::kGradCamElementwise;
  if (channelwise) {
    CamArguments only = arguments(c, a, g);
    std::vector<unsigned char> weights(static_cast<size_t>(outers * c.shape.channels) * item);
    only.weights = weights.data();
    if (!kernels.cam(only, threads(count))) fail("no memory");
    called("channel weights by one thread", count > 1);
    add(widened(weights, c.dtype));
  }
  if (c.method != Method::kAttention && item == bytes_of(c.dtype)) {
    CamGradientArguments back{};
    back.forward = arguments(c, a, g);
    std::mt19937 random(7);
    const Tensor by_maps({outers, 1, 1, {c.shape.space[0], c.shape.space[1], c.shape.space[2]}},
                         outers, c.dtype, Layout::kContiguous, true, random);
    back.map_gradients = by_maps.data.data();
    const size_t cells = static_cast<size_t>(c.shape.channels * c.shape.positions());
    std::vector<unsigned char> by_a(static_cast<size_t>(c.shape.samples) * cells * item);
    std::vector<unsigned char> by_g(static_cast<size_t>(outers) * cells * item);
    back.by_activations = by_a.data();
    back.by_gradients = by_g.data();
    back.by_activation_channel = back.by_gradient_channel = c.shape.positions();
    back.by_activation_sample = back.by_gradient_target = static_cast<int64_t>(cells);
    back.by_gradient_sample = static_cast<int64_t>(cells) * c.shape.targets;
    int64_t stride = 1;
    for (int d = kSpaceDims - 1; d >= 0; stride *= c.shape.space[d--]) {
      back.by_activation_space[d] = back.by_gradient_space[d] = stride;
    }
    if (!kernels.cam_gradient(back, threads(count))) fail("no memory");
    called("derivatives by one thread", count > 1 && c.shape.samples > 1);
    add(widened(by_a, c.dtype));
    add(widened(by_g, c.dtype));
  }
  return results;
}

void overlays(std::mt19937& random) {
  const int64_t n = 3, height = 101, width = 121;
  std::vector<uint8_t> images(static_cast<size_t>(n * height * width * 3)), table(256 * 3);
  std::vector<float> maps(static_cast<size_t>(n * height * width));
  for (uint8_t& byte : images) byte = static_cast<uint8_t>(random());
  for (uint8_t& byte : table) byte = static_cast<uint8_t>(random());
  for (float& value : maps) value = static_cast<float>(random() % 1001) / 1000;
  std::vector<uint8_t> first;
  for (int64_t count : {1, 2, 5, 8}) {
    std::vector<uint8_t> output(images.size());
    OverlayArguments args{};
    args.samples = n;
    args.height = height;
    args.width = width;
    args.images = images.data();
    args.images_are_bytes = true;
    args.image_sample = height * width * 3;
    args.image_row = width * 3;
    args.image_column = 3;
    args.image_channel = 1;
    args.maps = maps.data();
    args.map_sample = height * width;
    args.map_row = width;
    args.map_column = 1;
    args.table = table.data();
    args.image_weight = args.heatmap_weight = 0.5f;
    args.output = output.data();
    cpu_kernels()->overlay(args, threads(count));
    called("overlay by one thread", count > 1);
    if (first.empty()) first = output;
    if (output != first) fail("threads change an overlay");
  }
}

void powers(std::mt19937& random) {
  const Shape shape{2, 2, 40, {1, 15, 15}};
  const int64_t cells = shape.channels * shape.positions(), copies = 3;
  const int64_t all = shape.samples * shape.targets * cells;
  for (ScalarType dtype : {ScalarType::kDouble, ScalarType::kFloat, ScalarType::kBFloat16}) {
    const Tensor a(shape, shape.samples, dtype, Layout::kContiguous, false, random);
    const Tensor g(shape, copies * shape.samples * shape.targets, dtype, Layout::kContiguous, true,
                   random);
    std::vector<double> first;
    for (int64_t count : {1, 2, 5, 8}) {
      std::vector<double> sums(static_cast<size_t>(kPowers * all));
      AddPowersArguments add{};
      add.dtype = dtype;
      add.copies = copies;
      std::fill_n(add.size, AddPowersArguments::kDims, 1);
      add.size[AddPowersArguments::kDims - 1] = all;
      add.gradient[AddPowersArguments::kDims - 1] = add.sum[AddPowersArguments::kDims - 1] = 1;
      add.gradients = g.data.data();
      add.gradient_copy = add.sum_power = all;
      add.sums = sums.data();
      cpu_kernels()->add_powers(add, threads(count));
      called("powers by one thread", count > 1);
      PowerWeightsArguments weigh{};
      weigh.dtype = dtype;
      weigh.samples = shape.samples;
      weigh.targets = shape.targets;
      weigh.channels = shape.channels;
      weigh.activations = a.data.data();
      weigh.activation_sample = weigh.sum_target = cells;
      weigh.activation_channel = weigh.sum_channel = shape.positions();
      weigh.sums = sums.data();
      weigh.sum_power = all;
      weigh.sum_sample = cells * shape.targets;
      int64_t stride = 1;
      for (int d = kSpaceDims - 1; d >= 0; stride *= shape.space[d--]) {
        weigh.space[d] = shape.space[d];
        weigh.activation_space[d] = weigh.sum_space[d] = stride;
      }
      weigh.copies = static_cast<double>(copies);
      weigh.rectify = true;
      std::vector<unsigned char> weights(
          static_cast<size_t>(shape.samples * shape.targets * shape.channels) *
          (dtype == ScalarType::kDouble ? 8 : 4));
      weigh.weights = weights.data();
      cpu_kernels()->power_weights(weigh, threads(count));
      called("weights of powers by one thread", count > 1);
      const std::vector<double> found = widened(weights, dtype);
      if (first.empty()) first = found;
      expect_near(found, first);
    }
  }
}

void all(unsigned seed) {
  std::mt19937 random(seed);
  const Shape shapes[] = {
      {1, 1, 96, {1, 14, 14}}, {3, 2, 64, {1, 9, 10}}, {4, 1, 30, {5, 6, 7}},
      {1, 3, 90, {1, 1, 120}}, {9, 1, 40, {1, 8, 8}},  {1, 1, 12, {1, 40, 40}},
  };
  for (const Shape& shape : shapes) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      for (int method = 0; method < 8; ++method) {
        const Case c{shape, static_cast<ScalarType>(dtype), static_cast<Method>(method),
                     static_cast<Layout>(random() % 3), static_cast<Layout>(random() % 4)};
        const Tensor a(shape, shape.samples, c.dtype, c.a, false, random);
        const Tensor g(shape, shape.samples * shape.targets, c.dtype, c.g, true, random);
        const std::vector<double> single = run(c, a, g, 1);
        for (int64_t count : {2, 5, 8}) {
          const std::vector<double> found = run(c, a, g, count);
          if (run(c, a, g, count) != found) fail("the same call gives other bits");
          expect_near(found, single);
        }
      }
    }
  }
  overlays(random);
  powers(random);
}

}  // namespace

int main() {
  if (cpu_kernels() == nullptr) fail(cpu_kernels_error());
  all(1);
  std::vector<std::thread> callers;
  for (unsigned seed = 2; seed < 6; ++seed) callers.emplace_back(all, seed);
  for (std::thread& caller : callers) caller.join();
  std::printf("%s: %lld calls\n", cpu_kernels()->name, static_cast<long long>(calls));
  return 0;
}
