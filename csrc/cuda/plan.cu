#include "cuda/plan.h"

#include <algorithm>
#include <limits>

namespace gradcampp {
namespace {

constexpr int64_t kMostPositions = int64_t{1} << 30;
constexpr int64_t kMostChannels = int64_t{1} << 30;
constexpr int64_t kLargestGrid = std::numeric_limits<int32_t>::max();
// A processor's shared memory is cut into this many tiles: four blocks with two tiles of A and two
// of G each. Half of it is then on its way from memory at any time, several times the bytes that
// the latency of memory asks for.
constexpr int kTilesPerProcessor = 16;
constexpr int64_t kSector = 32;       // bytes: what memory delivers at least
constexpr int64_t kGoodSegment = 64;  // bytes of neighbouring channels
constexpr int64_t kSmallTile = 4096;  // bytes: not worth cutting further to occupy more processors
constexpr int64_t kMostSlices = 64;   // the last block reads that many maps
constexpr int64_t kFewRounds = 4;     // of a cluster: cost no more than a second step of gathering
constexpr int64_t kReservedShared = 1024;  // bytes that a block takes beside its own

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int floor_log2(int64_t v) { return v <= 1 ? 0 : 1 + floor_log2(v / 2); }
int ceil_log2(int64_t v) { return v <= 1 ? 0 : floor_log2(v - 1) + 1; }

// Hands out aligned pieces of the workspace; with a null base it only measures.
class Arena {
 public:
  Arena(void* base, int64_t used) : base_(reinterpret_cast<uintptr_t>(base)), used_(used) {}

  void* take(int64_t bytes) {
    void* piece = reinterpret_cast<void*>(base_ + static_cast<uintptr_t>(used_));
    used_ += round_up(bytes, kVectorBytes);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_;
};

struct Sizes {
  int64_t element, gradient_element, accumulator;
};

Operand make_operand(const void* data, int64_t sample, int64_t target, int64_t channel,
                     const int64_t (&space)[kSpaceDims], const CamArguments& args, int64_t targets,
                     int64_t element) {
  Operand x{};
  x.data = data;
  x.sample = sample;
  x.target = target;
  x.channel = channel;
  bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  const int64_t vector = kVectorBytes / element;
  auto check = [&](int64_t stride, int64_t extent) {
    aligned = aligned && (extent == 1 || stride % vector == 0);
  };
  check(sample, args.samples);
  check(target, targets);
  x.even = true;
  int64_t walked = 1;
  for (int d = kSpaceDims - 1; d >= 0; --d) {
    x.space[d] = space[d];
    check(space[d], args.space[d]);
    if (args.space[d] == 1) continue;
    if (walked == 1) {
      x.position = space[d];
    } else {
      x.even = x.even && space[d] == x.position * walked;
    }
    walked *= args.space[d];
  }
  const int64_t positions = args.positions();
  const bool neighbours = x.even && (positions == 1 || x.position == 1);
  x.adjacent = channel == 1 && !neighbours && positions > 1;
  if (neighbours && (args.channels == 1 || channel == positions)) {
    x.layout = Layout::kRows;
  } else if (x.adjacent && aligned && args.channels % vector == 0) {
    x.layout = Layout::kChannelsLast;
  } else {
    x.layout = Layout::kStrided;
  }
  return x;
}

TileShape tile_shape(const Operand& x, int channels, int64_t positions, int64_t all_channels,
                     int64_t element) {
  TileShape tile{};
  tile.rows = channels;
  tile.columns = static_cast<int>(positions);
  if (x.layout == Layout::kChannelsLast) {
    tile.channel = 1;
    tile.position = channels;
  } else {
    if (x.layout == Layout::kStrided) {
      if (x.channel == 0 || all_channels == 1) tile.rows = 1;
      if (positions == 1 || (x.even && x.position == 0)) tile.columns = 1;
    }
    tile.channel = tile.rows == 1 && channels > 1 ? 0 : tile.columns;
    tile.position = tile.columns == 1 ? 0 : 1;
  }
  const int64_t slack = x.layout == Layout::kRows ? kVectorBytes : 0;
  tile.bytes = static_cast<int>(
      round_up(static_cast<int64_t>(tile.rows) * tile.columns * element + slack, kVectorBytes));
  return tile;
}

SharedLayout shared_layout(const TileShape& a, const TileShape& g, int channels, int64_t positions,
                           int64_t targets, int64_t accumulator) {
  const int64_t groups = std::max<int64_t>(1, kThreads / positions);
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    const int64_t at = used;
    used += round_up(bytes, kVectorBytes);
    return static_cast<int>(at);
  };
  SharedLayout shared{};
  shared.activations = take(2 * a.bytes);
  shared.gradients = take(2 * g.bytes);
  shared.maps = take(groups * targets * positions * accumulator);
  shared.totals = take(channels * accumulator);
  shared.weights = take(channels * accumulator);
  shared.scratch = take(2 * kThreads * accumulator);
  shared.flag = take(sizeof(int));
  shared.bytes = static_cast<int>(used);
  return shared;
}

// The launch shape of the fused kernel; false where no tile fits.
//
// Channels of a tile: a power of two, as many as make a tile of a sixteenth of a processor's shared
// memory, and where channels are neighbours in memory at least 64 bytes of them (32 if that is what
// lets two blocks share a processor). Targets of a block: as many as leave room for three blocks
// on a processor. Slices: so many blocks as all processors hold at once, at most one a tile, at
// most 64; with few samples the tiles are halved until every processor has one.
//
// With clusters the slices are whole clusters, each as large as slices and device allow, a power of
// two. There is only one of them for each sample, so that neither workspace nor counter is needed,
// where it is through in a few rounds or where the clusters of all samples give the processors one
// and a half blocks each.
bool plan_fused(const CamArguments& args, const Sizes& sizes, const Device& device,
                FusedArguments* fused) {
  const int64_t positions = args.positions();
  const int64_t element = std::max(sizes.element, sizes.gradient_element);
  const int64_t tile_bytes = device.shared_per_processor / kTilesPerProcessor;
  // A tile of one channel, twice, and a map: also keeps every product below in 32 bits.
  if (positions > device.shared_per_block / (2 * sizes.element + sizes.accumulator)) return false;

  auto shape = [&](int log2, int64_t targets) {
    const int channels = 1 << log2;
    fused->channels_log2 = log2;
    fused->activation_tile =
        tile_shape(fused->activations, channels, positions, args.channels, sizes.element);
    fused->gradient_tile =
        tile_shape(fused->gradients, channels, positions, args.channels, sizes.gradient_element);
    fused->shared = shared_layout(fused->activation_tile, fused->gradient_tile, channels, positions,
                                  targets, sizes.accumulator);
    return fused->shared.bytes + kReservedShared;
  };

  const bool segments = fused->activations.layout == Layout::kChannelsLast ||
                        fused->gradients.layout == Layout::kChannelsLast;
  int smallest = segments ? ceil_log2(kSector / sizes.element) : 0;
  int log2 = std::max(smallest, floor_log2(tile_bytes / (positions * element)));
  log2 = std::min({log2, std::max(smallest, ceil_log2(args.channels)), floor_log2(kThreads)});
  if (segments) {
    const int good = ceil_log2(kGoodSegment / sizes.element);
    if (log2 < good && 2 * shape(good, 1) <= device.shared_per_processor) log2 = good;
    if (log2 >= good) smallest = good;
  }
  const auto tiles = [&] { return ceil_div(args.channels, int64_t{1} << log2); };
  const int64_t round_bytes = 2 * tile_bytes * device.cluster_blocks;
  const int64_t sample_bytes = args.channels * positions * (sizes.element + sizes.gradient_element);
  const bool quick = device.cluster_blocks > 1 && sample_bytes <= kFewRounds * round_bytes;
  const int64_t occupied =
      quick ? std::min<int64_t>(device.processors, args.samples * device.cluster_blocks)
            : device.processors;
  while (log2 > smallest && args.samples * tiles() < occupied &&
         (positions * element << (log2 - 1)) >= kSmallTile) {
    --log2;
  }

  const int64_t budget = device.shared_per_processor / 3;
  int64_t targets = 1;
  while (targets < args.targets && shape(log2, targets + 1) <= budget) ++targets;
  fused->target_blocks = static_cast<int>(ceil_div(args.targets, targets));
  targets = ceil_div(args.targets, fused->target_blocks);
  fused->targets_per_block = static_cast<int>(targets);
  const int64_t bytes = shape(log2, targets);
  if (fused->shared.bytes > device.shared_per_block) return false;

  const int64_t resident =
      device.processors * std::clamp<int64_t>(device.shared_per_processor / bytes, 1, 8);
  const int64_t units = args.samples * fused->target_blocks;
  const int64_t slices = std::clamp<int64_t>(resident / units, 1, std::min(tiles(), kMostSlices));
  const int64_t blocks = int64_t{1} << floor_log2(std::min<int64_t>(slices, device.cluster_blocks));
  const bool single = blocks > 1 && (quick || 2 * units * blocks >= 3 * device.processors);
  fused->cluster_blocks = static_cast<int>(blocks);
  fused->channels_per_slice = ceil_div(tiles(), single ? blocks : slices / blocks * blocks) << log2;
  fused->clusters = static_cast<int>(ceil_div(args.channels, fused->channels_per_slice * blocks));
  return true;
}

// The launch shape of the channel weights alone: neighbouring threads read neighbouring channels
// where those are neighbours in memory (32 of them), else neighbouring positions (so many threads a
// channel that each has about eight positions).
void plan_weights(const CamArguments& args, Pass* pass) {
  WeightsArguments& weights = pass->weights;
  const bool adjacent = weights.activations.adjacent || weights.gradients.adjacent;
  const int lanes_log2 = std::min(ceil_log2(ceil_div(args.positions(), 8)), floor_log2(kThreads));
  weights.channels_log2 = adjacent ? floor_log2(kWarp) : floor_log2(kThreads) - lanes_log2;
  pass->weights_grid = args.samples * ceil_div(args.channels, int64_t{1} << weights.channels_log2);
}

// The launch shape of the second path's map: a thread (a warp where channels are neighbours) has a
// position of a slice of the channels; as many slices as give every processor eight blocks.
void plan_sum(const CamArguments& args, const Device& device, Pass* pass) {
  SumArguments& sum = pass->sum;
  const int64_t positions = args.positions();
  sum.lanes_over_channels = sum.activations.adjacent;
  const int64_t blocks = ceil_div(positions, sum.lanes_over_channels ? kWarps : kThreads);
  sum.position_blocks = static_cast<int>(blocks);
  const int64_t groups = args.samples * ceil_div(args.targets, kSumTargets);
  const int64_t slices =
      std::clamp<int64_t>(8 * device.processors / (groups * blocks), 1,
                          std::min<int64_t>(kMostSlices, ceil_div(args.channels, kWarp)));
  sum.channels_per_slice = ceil_div(args.channels, slices);
  sum.slices = static_cast<int>(ceil_div(args.channels, sum.channels_per_slice));
  pass->sum_grid = groups * blocks * sum.slices;
}

void copy(const int64_t (&from)[kSpaceDims], int64_t (&to)[kSpaceDims]) {
  std::copy(from, from + kSpaceDims, to);
}

bool has_weights(Method method) {
  return method != Method::kLayerCam && method != Method::kHiResCam &&
         method != Method::kGradCamElementwise;
}

// output: maps, attention or channel weights, by what else is set.
Pass plan_pass(const CamArguments& args, const Sizes& sizes, const Device& device, bool softmax,
               void* output, Arena& arena) {
  Pass planned{};
  Pass* const pass = &planned;
  const int64_t positions = args.positions(), maps = args.samples * args.targets;
  const Operand a =
      make_operand(args.activations, args.activation_sample, 0, args.activation_channel,
                   args.activation_space, args, 1, sizes.element);
  const Operand g = make_operand(args.gradients, args.gradient_sample, args.gradient_target,
                                 args.gradient_channel, args.gradient_space, args, args.targets,
                                 sizes.gradient_element);
  const Extent extent{static_cast<int>(args.space[1]), static_cast<int>(args.space[2])};
  const double floor = args.rectify ? 0 : -std::numeric_limits<double>::infinity();
  const bool weights_only = args.weights != nullptr && !softmax;

  FinishArguments finish{};
  copy(args.space, finish.space);
  copy(args.size, finish.size);
  finish.relu = args.relu && !softmax;
  finish.resized = args.resized();
  finish.softmax = softmax;
  finish.normalize = args.normalize;
  finish.interpolation = args.interpolation;
  finish.temperature = args.temperature;
  finish.eps = args.eps;

  FusedArguments& fused = pass->fused_args;
  fused.activations = a;
  fused.gradients = g;
  if (!weights_only && plan_fused(args, sizes, device, &fused)) {
    pass->fused = true;
    fused.channels = args.channels;
    fused.extent = extent;
    fused.targets = args.targets;
    fused.positions = static_cast<int>(positions);
    fused.floor = floor;
    fused.eps = args.eps;
    fused.output = output;
    fused.output_map = softmax ? positions : args.pixels();
    fused.finish = finish;
    const int64_t units = args.samples * fused.target_blocks;
    pass->fused_grid = units * fused.clusters * fused.cluster_blocks;
    if (fused.clusters > 1) {
      pass->counter_bytes = units * static_cast<int64_t>(sizeof(unsigned));
      fused.finished = static_cast<unsigned*>(arena.take(pass->counter_bytes));
      fused.partial = arena.take(units * fused.clusters * fused.targets_per_block * positions *
                                 sizes.accumulator);
    }
    return planned;
  }

  WeightsArguments& weights = pass->weights;
  if (has_weights(args.method)) {
    weights.activations = a;
    weights.gradients = g;
    weights.channels = args.channels;
    weights.targets = args.targets;
    weights.positions = static_cast<int>(positions);
    weights.extent = extent;
    weights.floor = floor;
    weights.eps = args.eps;
    weights.weights = weights_only ? output : arena.take(maps * args.channels * sizes.accumulator);
    plan_weights(args, pass);
  }
  if (weights_only) return planned;

  SumArguments& sum = pass->sum;
  sum.activations = a;
  sum.gradients = g;
  sum.samples = args.samples;
  sum.channels = args.channels;
  sum.targets = args.targets;
  sum.positions = static_cast<int>(positions);
  sum.extent = extent;
  sum.floor = floor;
  sum.weights = weights.weights;
  plan_sum(args, device, pass);
  sum.partial = arena.take(maps * sum.slices * positions * sizes.accumulator);

  CellsArguments& cells = pass->cells;
  cells.positions = static_cast<int>(positions);
  cells.slices = sum.slices;
  cells.blocks = static_cast<int>(ceil_div(positions, kCellsPerBlock));
  cells.partial = sum.partial;
  cells.cells = sum.slices == 1 ? sum.partial : arena.take(maps * positions * sizes.accumulator);
  cells.extremes = arena.take(maps * cells.blocks * 3 * sizes.accumulator);
  cells.relu = finish.relu;
  pass->cells_grid = maps * cells.blocks;

  ResizeArguments& resize = pass->resize;
  resize.positions = static_cast<int>(positions);
  resize.pixels = args.pixels();
  resize.map_blocks = cells.blocks;
  resize.cells = cells.cells;
  resize.extremes = cells.extremes;
  resize.output = output;
  resize.finish = finish;
  if (softmax) {
    pass->softmax_grid = maps;
  } else {
    const int64_t warps =
        args.size[0] * ceil_div(args.size[1], kWarp) * ceil_div(args.size[2], kWarp);
    resize.blocks =
        static_cast<int>(std::min<int64_t>(ceil_div(warps, kWarps), 8 * device.processors));
    pass->resize_grid = maps * resize.blocks;
  }
  return planned;
}

}  // namespace

cudaError_t make_plan(const CamArguments& args, const Device& device, void* workspace, Plan* plan) {
  if (args.positions() > kMostPositions || args.channels > kMostChannels) {
    return cudaErrorInvalidValue;
  }
  Sizes sizes{};
  sizes.element = args.dtype == ScalarType::kDouble ? 8 : args.dtype == ScalarType::kFloat ? 4 : 2;
  sizes.gradient_element = sizes.element;
  sizes.accumulator = std::max<int64_t>(sizes.element, 4);
  void* const output = args.weights != nullptr ? args.weights : args.maps;

  plan->count = 1;
  Arena arena(workspace, 0);
  if (args.method != Method::kAttention) {
    plan->passes[0] = plan_pass(args, sizes, device, false, output, arena);
    plan->workspace_bytes = arena.used();
  } else {
    plan->count = 2;
    const int64_t positions = args.positions();
    void* const attention = arena.take(args.samples * args.targets * positions * sizes.accumulator);
    Arena second_arena = arena;  // the first pass is over by then
    plan->passes[0] = plan_pass(args, sizes, device, true, attention, arena);

    CamArguments second = args;
    second.gradients = attention;
    second.gradient_sample = args.targets * positions;
    second.gradient_target = positions;
    second.gradient_channel = 0;
    second.gradient_space[2] = 1;
    second.gradient_space[1] = args.space[2];
    second.gradient_space[0] = args.space[1] * args.space[2];
    sizes.gradient_element = sizes.accumulator;
    plan->passes[1] = plan_pass(second, sizes, device, false, output, second_arena);
    plan->passes[1].pooling = true;
    plan->workspace_bytes = std::max(arena.used(), second_arena.used());
  }
  for (int i = 0; i < plan->count; ++i) {
    const Pass& pass = plan->passes[i];
    if (std::max({pass.fused_grid, pass.weights_grid, pass.sum_grid, pass.cells_grid,
                  pass.softmax_grid, pass.resize_grid}) > kLargestGrid) {
      return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

}  // namespace gradcampp
