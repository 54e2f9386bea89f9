// The CPU kernels. This file is compiled once for each instruction set, in a namespace of its own
// (GCPP_TARGET); dispatch.cpp chooses among the tables at its end. It uses no inline code of the
// standard library: the linker could keep one instruction set's copy of it for all of them.
#include "cpu/kernels.h"

#include <math.h>

#include "cpu/finish.h"
#include "cpu/gradients.h"
#include "cpu/overlay.h"
#include "cpu/powers.h"
#include "cpu/steps.h"
#include "cpu/view.h"

namespace gradcampp::GCPP_TARGET {
namespace {

// Channels of a tile, whose activations are read twice. Where positions are neighbours: a few rows,
// so that L2 holds this tile and the next one, which is asked for meanwhile. Where channels are:
// all of them, so that memory is read in order, as long as the tile stays in a core's share of L3.
constexpr int64_t kMostRowChannels = 64;
constexpr int64_t kRowTileBytes = 32 * 1024;
constexpr int64_t kLineChannels = 64;
constexpr int64_t kTileBytes = 4 * 1024 * 1024;
// A slice of fewer channels is not worth a map of its own.
constexpr int64_t kSliceChannels = 16;
// Under this many bytes a second thread costs more than it saves.
constexpr int64_t kBytesPerWorker = 32 * 1024;

// Hands out aligned pieces of one allocation; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += rounded_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

// The element behind the last one that the strides reach.
template <class S>
const S* tensor_end(const void* data, int64_t channels, int64_t channel, const int64_t* space,
                    const int64_t* strides, int64_t outer) {
  int64_t last = outer + (channels - 1) * larger(channel, 0);
  for (int d = 0; d < kSpaceDims; ++d) last += (space[d] - 1) * larger(strides[d], 0);
  return static_cast<const S*>(data) + last + 1;
}

// Softmax over the cells of map / temperature, in place; NaN throughout where a cell is not finite.
// The padding becomes zero: it is multiplied with masked activations.
template <class T>
void softmax(T* map, int64_t cells, double temperature) {
  double high = -__builtin_inf(), poison = 0, sum = 0;
  for (int64_t x = 0; x < cells; ++x) {
    const double logit = static_cast<double>(map[x]) / temperature;
    poison += logit * 0;
    high = logit > high ? logit : high;
  }
  for (int64_t x = 0; x < cells; ++x)
    sum += ::exp(static_cast<double>(map[x]) / temperature - high);
  for (int64_t x = 0; x < cells; ++x) {
    const double value = ::exp(static_cast<double>(map[x]) / temperature - high) / sum;
    map[x] = static_cast<T>(value + poison);
  }
  for (int64_t x = cells; x < padded<T>(cells); ++x) map[x] = 0;
}

// One call of the op.
//
// Work is cut into units: a sample, or a slice of its channels where there are fewer samples than
// threads. A unit goes through its channels tile by tile and adds to a map of its own; maps of
// slices are added in the order of the channels. Which worker does which unit depends on nothing
// but the shapes and the number of threads, and so do the bits of the result.
template <class S>
class Cam {
 public:
  Cam(const CamArguments& args, const Parallel& parallel) : args_(args), parallel_(parallel) {
    choose_rule();
    choose_layout();
    choose_units();
  }

  bool run() {
    Arena measure(nullptr);
    lay_out(measure);
    void* workspace = allocate_workspace(measure.used());
    if (workspace == nullptr) return false;
    Arena arena(workspace);
    lay_out(arena);
    if (resizes()) resize_.prepare();
    if (slices_ == 1) {
      each_worker<&Cam::do_samples>();
    } else {
      each_worker<&Cam::weigh_slices>();
      if (attention_) {
        each_worker<&Cam::respond_maps>();
        each_worker<&Cam::attend_slices>();
      }
      if (args_.maps != nullptr) {
        each_worker<&Cam::finish_maps>();
        if (resizes()) each_worker<&Cam::resize_rows>();
      }
    }
    free_workspace(workspace);
    return true;
  }

 private:
  using T = Accumulator<S>;

  struct Scratch {  // of one worker
    T* totals;      // [tile_stride]
    T* second;      // [tile_stride]
    T* weights;     // [targets, tile_stride]
    T* staged_a;    // [tile, positions]
    T* staged_g;    // [tile, positions]
    T* maps;        // [targets, map_stride]: where a worker has whole samples
    T* attention;   // likewise
    T* stretched;   // four rows of the output, padded
  };

  // ---- choices ----

  template <class Rule>
  void use() {
    if constexpr (Rule::kElementwise) {
      pair_ = elementwise_ = true;
      elements_ = add_elements<Rule, S>;
      staged_elements_ = add_elements<Rule, T>;
    } else {
      pair_ = Rule::kPair;
      total_ = Rule::kTotal;
      weights_ = channel_weights<Rule, S>;
      staged_weights_ = channel_weights<Rule, T>;
    }
  }

  void choose_rule() {
    const bool eps = args_.eps != 0;
    if (args_.method == Method::kGradCamPlusPlus && args_.rectify && !eps) {
      positive_weights_ = positive_weights<GradCamPlusPlus<false>, S>;
    }
    attention_ = args_.method == Method::kAttention;
    floor_ = args_.rectify ? T(0) : -static_cast<T>(__builtin_inf());
    switch (args_.method) {
      case Method::kGradCamPlusPlus:
        return eps ? use<GradCamPlusPlus<true>>() : use<GradCamPlusPlus<false>>();
      case Method::kGradCamPlusPlusNormalized:
        return eps ? use<GradCamPlusPlusNormalized<true>>()
                   : use<GradCamPlusPlusNormalized<false>>();
      case Method::kGradCam:
      case Method::kAttention:
        return use<GradCam>();
      case Method::kXGradCam:
        return use<XGradCam>();
      case Method::kLayerCam:
        return use<LayerCam>();
      case Method::kHiResCam:
        return use<HiResCam>();
      case Method::kGradCamElementwise:
        return use<GradCamElementwise>();
    }
  }

  void choose_layout() {
    a_walk_ =
        make_walk(args_.space, args_.activation_space, args_.channels, args_.activation_channel);
    g_walk_ = make_walk(args_.space, args_.gradient_space, args_.channels, args_.gradient_channel);
    a_end_ = tensor_end<S>(args_.activations, args_.channels, args_.activation_channel, args_.space,
                           args_.activation_space,
                           (args_.samples - 1) * larger(args_.activation_sample, 0));
    g_end_ = tensor_end<S>(args_.gradients, args_.channels, args_.gradient_channel, args_.space,
                           args_.gradient_space,
                           (args_.samples - 1) * larger(args_.gradient_sample, 0) +
                               (args_.targets - 1) * larger(args_.gradient_target, 0));
    // Rules that read A beside G want both in one order.
    const bool clash = pair_ && (a_walk_.order != g_walk_.order);
    stage_a_ = clash || a_walk_.order == Order::kOther || a_walk_.order == Order::kUniform;
    stage_g_ = clash || g_walk_.order == Order::kOther || (pair_ && stage_a_);
    positions_ = args_.positions();
    map_stride_ = padded<T>(positions_);
    const int64_t row_bytes = positions_ * static_cast<int64_t>(sizeof(S));
    tile_ = smaller(larger(kRowTileBytes / row_bytes / 4, 1) * 4, kMostRowChannels);
    if (!stage_a_ && a_walk_.order == Order::kChannelInner) {
      tile_ = larger(kTileBytes / row_bytes / kLineChannels, 1) * kLineChannels;
    }
    tile_ = smaller(tile_, args_.channels);
    tile_stride_ = padded<T>(tile_);
  }

  void choose_units() {
    const int64_t bytes = args_.samples * args_.channels * (1 + args_.targets) * positions_ *
                          static_cast<int64_t>(sizeof(S));
    workers_ = larger(1, smaller(parallel_.threads, bytes / kBytesPerWorker));
    slices_ = 1;
    if (args_.samples < 4 * workers_) {  // whole samples would leave a worker waiting
      slices_ = workers_ / common_divisor(args_.samples, workers_);
      slices_ = larger(1, smaller(slices_, args_.channels / kSliceChannels));
    }
  }

  // ---- memory ----

  Scratch carve(Arena& arena) const {
    const int64_t whole_maps = slices_ == 1 ? args_.targets * map_stride_ : 0;
    const int64_t staged = tile_ * positions_ + kLanes<T>;
    const int64_t width = Resize<T>::packs(args_.size[2]) * kLanes<T>;
    Scratch scratch;
    scratch.totals = arena.take<T>(tile_stride_);
    scratch.second = arena.take<T>(tile_stride_);
    scratch.weights = arena.take<T>(args_.targets * tile_stride_);
    scratch.staged_a = arena.take<T>(stage_a_ ? staged : 0);
    scratch.staged_g = arena.take<T>(stage_g_ ? staged : 0);
    scratch.maps = arena.take<T>(whole_maps);
    scratch.attention = arena.take<T>(attention_ ? whole_maps : 0);
    scratch.stretched = arena.take<T>(resizes() ? 4 * width : 0);
    return scratch;
  }

  Scratch scratch(int64_t worker) const {
    Arena arena(scratch_ + worker * scratch_bytes_);
    return carve(arena);
  }

  void lay_out(Arena& arena) {
    Arena one(nullptr);
    carve(one);
    scratch_bytes_ = static_cast<int64_t>(one.used());
    scratch_ = arena.take<char>(workers_ * scratch_bytes_);
    const int64_t cells = slices_ == 1 ? 0 : args_.samples * args_.targets * map_stride_;
    slice_maps_ = arena.take<T>(slices_ * cells);
    attention_maps_ = arena.take<T>(attention_ ? cells : 0);
    if (!resizes()) return;
    const int64_t packs = Resize<T>::packs(args_.size[2]), width = packs * kLanes<T>;
    resize_ = {args_.space,
               args_.size,
               args_.interpolation,
               arena.take<Source<T>>(args_.size[0]),
               arena.take<Source<T>>(args_.size[1]),
               arena.take<int64_t>(packs),
               arena.take<Integer<T>>(width),
               arena.take<Integer<T>>(width),
               arena.take<T>(width),
               false};
  }

  // ---- workers ----

  template <void (Cam::*kStep)(int64_t) const>
  void each_worker() const {
    parallel_.run(
        workers_, [](void* cam, int64_t worker) { (static_cast<const Cam*>(cam)->*kStep)(worker); },
        const_cast<Cam*>(this));
  }

  // The part of [0, count) that a worker does.
  template <class F>
  void share(int64_t count, int64_t worker, F f) const {
    const int64_t end = count * (worker + 1) / workers_;
    for (int64_t i = count * worker / workers_; i < end; ++i) f(i);
  }

  void do_samples(int64_t worker) const {
    const Scratch own = scratch(worker);
    share(args_.samples, worker, [&](int64_t n) {
      weigh(n, 0, args_.channels, own, own.maps);
      if (attention_) {
        for (int64_t k = 0; k < args_.targets; ++k) {
          memcpy(own.attention + k * map_stride_, own.maps + k * map_stride_, map_bytes());
          softmax(own.attention + k * map_stride_, positions_, args_.temperature);
        }
        attend(n, 0, args_.channels, own, own.attention, own.maps);
      }
      if (args_.maps == nullptr) return;
      for (int64_t k = 0; k < args_.targets; ++k) {
        T* map = own.maps + k * map_stride_;
        finish_map(map, positions_, args_.relu, args_.normalize);
        T* output = static_cast<T*>(args_.maps) + (n * args_.targets + k) * args_.pixels();
        if (resizes()) {
          resize_.resize(map, 0, args_.size[0] * args_.size[1], own.stretched, output);
        } else {
          memcpy(output, map, map_bytes());
        }
      }
    });
  }

  void weigh_slices(int64_t worker) const {
    const Scratch own = scratch(worker);
    share(args_.samples * slices_, worker, [&](int64_t unit) {
      weigh(unit / slices_, slice_begin(unit % slices_), slice_begin(unit % slices_ + 1), own,
            slice_map(unit, 0));
    });
  }

  void attend_slices(int64_t worker) const {
    const Scratch own = scratch(worker);
    share(args_.samples * slices_, worker, [&](int64_t unit) {
      const int64_t n = unit / slices_;
      attend(n, slice_begin(unit % slices_), slice_begin(unit % slices_ + 1), own,
             attention_maps_ + n * args_.targets * map_stride_, slice_map(unit, 0));
    });
  }

  void respond_maps(int64_t worker) const {
    share(args_.samples * args_.targets, worker, [&](int64_t i) {
      T* attention = attention_maps_ + i * map_stride_;
      memcpy(attention, combined(i), map_bytes());
      softmax(attention, positions_, args_.temperature);
    });
  }

  void finish_maps(int64_t worker) const {
    share(args_.samples * args_.targets, worker, [&](int64_t i) {
      T* map = combined(i);
      finish_map(map, positions_, args_.relu, args_.normalize);
      if (!resizes()) {
        memcpy(static_cast<T*>(args_.maps) + i * positions_, map, map_bytes());
      }
    });
  }

  void resize_rows(int64_t worker) const {
    const Scratch own = scratch(worker);
    const int64_t rows = args_.size[0] * args_.size[1];
    const int64_t maps = args_.samples * args_.targets;
    const int64_t end = maps * rows * (worker + 1) / workers_;
    for (int64_t row = maps * rows * worker / workers_; row < end;) {
      const int64_t i = row / rows;
      const int64_t last = smaller(end, (i + 1) * rows);
      resize_.resize(slice_map(i / args_.targets * slices_, i % args_.targets), row - i * rows,
                     last - i * rows, own.stretched,
                     static_cast<T*>(args_.maps) + i * args_.pixels());
      row = last;
    }
  }

  // ---- pieces ----

  size_t map_bytes() const { return static_cast<size_t>(positions_) * sizeof(T); }
  int64_t slice_begin(int64_t slice) const { return args_.channels * slice / slices_; }
  T* slice_map(int64_t unit, int64_t k) const {
    return slice_maps_ + (unit * args_.targets + k) * map_stride_;
  }
  bool resizes() const { return args_.maps != nullptr && args_.resized(); }

  // The maps of the slices of map i, added up in the first of them.
  T* combined(int64_t i) const {
    const int64_t first = i / args_.targets * slices_, k = i % args_.targets;
    T* map = slice_map(first, k);
    for (int64_t slice = 1; slice < slices_; ++slice) {
      const T* other = slice_map(first + slice, k);
      for (int64_t x = 0; x < positions_; ++x) map[x] += other[x];
    }
    return map;
  }

  // Walks the channels [begin, end) of sample n in tiles; f(channel, width).
  template <class F>
  void each_tile(int64_t begin, int64_t end, F f) const {
    for (int64_t c = begin; c < end; c += tile_) f(c, smaller(tile_, end - c));
  }

  const S* activations(int64_t n, int64_t c) const {
    return static_cast<const S*>(args_.activations) + n * args_.activation_sample +
           c * args_.activation_channel;
  }
  const S* gradients(int64_t n, int64_t k, int64_t c) const {
    return static_cast<const S*>(args_.gradients) + n * args_.gradient_sample +
           k * args_.gradient_target + c * args_.gradient_channel;
  }
  Tile<S> direct(const S* data, const S* end, const Walk& walk, int64_t width) const {
    return {data, end, walk.order, walk.channel, walk.position, width, positions_};
  }

  // f(tile of A), of whichever type it has: as it lies in memory, or staged.
  template <class F>
  void with_activations(int64_t n, int64_t c, int64_t width, const Scratch& own, F f) const {
    const S* data = activations(n, c);
    if (stage_a_) {
      f(stage(data, a_walk_, width, own.staged_a));
    } else {
      f(direct(data, a_end_, a_walk_, width));
    }
  }

  T* weights_output(int64_t n, int64_t k, int64_t c) const {
    return static_cast<T*>(args_.weights) + (n * args_.targets + k) * args_.channels + c;
  }

  void put_weights(int64_t n, int64_t c, int64_t width, const T* weights) const {
    for (int64_t k = 0; k < args_.targets; ++k) {
      memcpy(weights_output(n, k, c), weights + k * tile_stride_,
             static_cast<size_t>(width) * sizeof(T));
    }
  }

  // Channel weights and the weighted sum (or the sum of elements) of channels [begin, end).
  void weigh(int64_t n, int64_t begin, int64_t end, const Scratch& own, T* maps) const {
    clear(maps);
    each_tile(begin, end, [&](int64_t c, int64_t width) {
      with_activations(n, c, width, own, [&](auto a) {
        const Ahead rest(gradients(n, 0, c) + width * positions_ / 2);
        if (total_ && activation_totals<false>(a, floor_, rest, own.totals)) {
          activation_totals<true>(a, floor_, rest, own.totals);
        }
        for (int64_t k = 0; k < args_.targets; ++k) {
          weigh_target(n, k, c, width, a, own, maps + k * map_stride_);
        }
        if (elementwise_) return;
        if (args_.weights != nullptr && !attention_) {
          put_weights(n, c, width, own.weights);
        } else {
          add(a, Ahead(gradients(n, 0, c + width)), own, maps);
        }
      });
    });
  }

  template <class A>
  void add(const Tile<A>& a, Ahead ahead, const Scratch& own, T* maps) const {
    // Totals have shown what rectifying hides; without it nothing is hidden.
    auto step = total_ || !args_.rectify ? add_weighted<false, A> : add_weighted<true, A>;
    step(a, floor_, own.weights, tile_stride_, args_.targets, ahead, maps, map_stride_);
  }

  template <class A>
  void weigh_target(int64_t n, int64_t k, int64_t c, int64_t width, const Tile<A>& a,
                    const Scratch& own, T* map) const {
    const S* data = gradients(n, k, c);
    T* weights = own.weights + k * tile_stride_;
    const Ahead ahead(k + 1 < args_.targets ? gradients(n, k + 1, c) : activations(n, c + width));
    if (stage_g_) {
      const Tile<T> g = stage(data, g_walk_, width, own.staged_g);
      // A rule that reads A too has it staged as well; for the others any tile will do.
      Tile<T> beside = g;
      if constexpr (__is_same(A, T)) beside = a;
      if (elementwise_) {
        staged_elements_(g, beside, floor_, map);
      } else {
        staged_weights_(g, beside, own.totals, floor_, T(args_.eps), ahead, own.second, weights);
      }
    } else {
      const Tile<S> g = direct(data, g_end_, g_walk_, width);
      Tile<S> beside = g;
      if constexpr (__is_same(A, S)) beside = a;
      if (elementwise_) {
        elements_(g, beside, floor_, map);
      } else if (positive_weights_ == nullptr || g.order == Order::kUniform ||
                 positive_weights_(g, own.totals, ahead, weights)) {
        weights_(g, beside, own.totals, floor_, T(args_.eps), ahead, own.second, weights);
      }
    }
  }

  // The second pass of the attention method.
  void attend(int64_t n, int64_t begin, int64_t end, const Scratch& own, const T* attention,
              T* maps) const {
    clear(maps);
    each_tile(begin, end, [&](int64_t c, int64_t width) {
      with_activations(n, c, width, own, [&](auto a) {
        for (int64_t k = 0; k < args_.targets; ++k) {
          attended_means(a, attention + k * map_stride_, floor_, T(args_.eps),
                         own.weights + k * tile_stride_);
        }
        if (args_.weights != nullptr) {
          put_weights(n, c, width, own.weights);
        } else {
          add(a, Ahead(activations(n, c + width)), own, maps);
        }
      });
    });
  }

  void clear(T* maps) const {
    memset(maps, 0, static_cast<size_t>(args_.targets * map_stride_) * sizeof(T));
  }

  const CamArguments& args_;
  const Parallel& parallel_;
  int64_t positions_, map_stride_, tile_, tile_stride_;
  int64_t workers_, slices_;
  T floor_;
  bool attention_ = false, elementwise_ = false, total_ = false, pair_ = false;
  bool stage_a_, stage_g_;
  Walk a_walk_, g_walk_;
  const S* a_end_;
  const S* g_end_;
  void (*weights_)(const Tile<S>&, const Tile<S>&, const T*, T, T, Ahead, T*, T*) = nullptr;
  bool (*positive_weights_)(const Tile<S>&, const T*, Ahead, T*) = nullptr;
  void (*staged_weights_)(const Tile<T>&, const Tile<T>&, const T*, T, T, Ahead, T*, T*) = nullptr;
  void (*elements_)(const Tile<S>&, const Tile<S>&, T, T*) = nullptr;
  void (*staged_elements_)(const Tile<T>&, const Tile<T>&, T, T*) = nullptr;
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  T* slice_maps_ = nullptr;
  T* attention_maps_ = nullptr;
  Resize<T> resize_ = {};
};

bool cam(const CamArguments& args, const Parallel& parallel) {
  switch (args.dtype) {
    case ScalarType::kDouble:
      return Cam<double>(args, parallel).run();
    case ScalarType::kFloat:
      return Cam<float>(args, parallel).run();
    case ScalarType::kHalf:
      return Cam<Half>(args, parallel).run();
    case ScalarType::kBFloat16:
      return Cam<BFloat16>(args, parallel).run();
  }
  return false;
}

}  // namespace

extern const CpuKernels kKernels;
#define GCPP_STRING_(x) #x
#define GCPP_STRING(x) GCPP_STRING_(x)
const CpuKernels kKernels = {
    GCPP_STRING(GCPP_TARGET), cam, cam_gradient, overlay, add_powers, power_weights};

}  // namespace gradcampp::GCPP_TARGET
