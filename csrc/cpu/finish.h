// From a raw map to the output: non-finite check, ReLU, normalisation, upsampling.
#pragma once

#include "cpu/simd.h"
#include "math/normalize.h"
#include "math/resize.h"

namespace gradcampp::GCPP_TARGET {

// In place; the map is padded. With a non-finite cell it becomes NaN throughout.
template <class T>
void finish_map(T* map, int64_t cells, bool relu, Normalize normalize) {
  constexpr int64_t lanes = kLanes<T>;
  const T infinity = static_cast<T>(__builtin_inf());
  const Pack<T> floor = broadcast<T>(relu ? T(0) : -infinity);
  // The padding repeats the first cell, which changes no extreme.
  for (int64_t x = cells; x < padded<T>(cells); ++x) map[x] = map[0];
  Pack<T> poison{}, least = broadcast<T>(infinity), greatest = -least;
  for (int64_t x = 0; x < cells; x += lanes) {
    const Pack<T> raw = load(map + x);
    poison += raw * 0;
    const Pack<T> cell = select(raw < floor, floor, raw);
    least = select(cell < least, cell, least);
    greatest = select(cell > greatest, cell, greatest);
    store(map + x, cell);
  }
  const T spoilt = lane_sum<T>(poison);
  T lows[lanes], highs[lanes], low = infinity, high = -infinity;
  store(lows, least);
  store(highs, greatest);
  for (int i = 0; i < lanes; ++i) {
    low = lows[i] < low ? lows[i] : low;
    high = highs[i] > high ? highs[i] : high;
  }
  if (spoilt != 0) {
    for (int64_t x = 0; x < cells; ++x) map[x] = spoilt;
    return;
  }
  if (normalize == Normalize::kNone) return;
  for (int64_t x = 0; x < cells; ++x) map[x] = normalized(map[x], low, high, normalize);
}

// Where the pixels of the output lie among the cells of the map: computed once per call.
template <class T>
struct Resize {
  const int64_t* space;
  const int64_t* size;
  Interpolation interpolation;
  Source<T>* planes;  // [size[0]]
  Source<T>* rows;    // [size[1]]
  // Of a pack of columns: the first cell, and for each pixel its cells, counted from there.
  int64_t* first;         // [packs]
  Integer<T>*low, *high;  // [packs, lanes]
  T* weight;              // [packs, lanes]
  bool within_packs;      // each pack of columns has its cells within a pack of the map's row

  static int64_t packs(int64_t width) { return (width + kLanes<T> - 1) / kLanes<T>; }

  void prepare() {
    for (int64_t z = 0; z < size[0]; ++z) {
      planes[z] = source<T>(z, space[0], size[0], interpolation);
    }
    for (int64_t y = 0; y < size[1]; ++y) {
      rows[y] = source<T>(y, space[1], size[1], interpolation);
    }
    within_packs = true;
    for (int64_t x = 0; x < packs(size[2]) * kLanes<T>; ++x) {
      const Source<T> s = source<T>(smaller(x, size[2] - 1), space[2], size[2], interpolation);
      if (x % kLanes<T> == 0) first[x / kLanes<T>] = s.low;
      low[x] = static_cast<Integer<T>>(s.low - first[x / kLanes<T>]);
      high[x] = static_cast<Integer<T>>(s.high - first[x / kLanes<T>]);
      weight[x] = s.weight;
      within_packs = within_packs && high[x] < kLanes<T>;
    }
  }

  // Rows [begin, end) of the output, counted over depth and height.
  //
  // Separable: a row of cells is stretched to the output's width once, and every row of the output
  // is a blend of two of them (four with depth). Neighbouring rows use the same stretched rows, of
  // which `stretched` holds four. Behind the map a pack may be read.
  void resize(const T* map, int64_t begin, int64_t end, T* stretched, T* output) const {
    Slots slots{stretched, packs(size[2]) * kLanes<T>, {-1, -1, -1, -1}};
    for (int64_t row = begin; row < end; ++row) {
      const Source<T>& d = planes[row / size[1]];
      const Source<T>& h = rows[row % size[1]];
      const int64_t near = d.low * space[1], far = d.high * space[1];
      const int64_t wanted[4] = {near + h.low, near + h.high, far + h.low, far + h.high};
      const int lines = d.weight == 0 ? 2 : 4;
      const T* line[4];
      for (int i = 0; i < lines; ++i) line[i] = find(map, wanted, lines, i, slots);
      if (lines == 2) {
        blend<2>(line, d.weight, h.weight, output + row * size[2]);
      } else {
        blend<4>(line, d.weight, h.weight, output + row * size[2]);
      }
    }
  }

 private:
  struct Slots {
    T* stretched;
    int64_t width;
    int64_t held[4];  // which row of the map stands in each
  };

  // The stretched row wanted[i], made in a slot that no other wanted row stands in.
  const T* find(const T* map, const int64_t* wanted, int lines, int i, Slots& slots) const {
    for (int slot = 0; slot < 4; ++slot) {
      if (slots.held[slot] == wanted[i]) return slots.stretched + slot * slots.width;
    }
    int free = 0;
    for (; free < 3; ++free) {
      bool needed = false;
      for (int j = 0; j < lines; ++j) needed = needed || slots.held[free] == wanted[j];
      if (!needed) break;
    }
    slots.held[free] = wanted[i];
    T* line = slots.stretched + free * slots.width;
    stretch(map + wanted[i] * space[2], slots.width, line);
    return line;
  }

  void stretch(const T* cells, int64_t width, T* line) const {
    const Resize own = *this;  // which no store to the line can change
    for (int64_t p = 0, x = 0; x < width; ++p, x += kLanes<T>) {
      const T* from = cells + own.first[p];
      Pack<T> a, b;
      if (own.within_packs) {
        a = permuted<T>(load(from), own.low + x);
        b = permuted<T>(load(from), own.high + x);
      } else {
        for (int i = 0; i < kLanes<T>; ++i) a[i] = from[own.low[x + i]];
        for (int i = 0; i < kLanes<T>; ++i) b[i] = from[own.high[x + i]];
      }
      store(line + x, a + load(own.weight + x) * (b - a));
    }
  }

  template <int kLines>
  void blend(const T* const* line, T depth_weight, T height_weight, T* output) const {
    const Pack<T> wh = broadcast<T>(height_weight), wd = broadcast<T>(depth_weight);
    const T *near0 = line[0], *near1 = line[1], *far0 = line[kLines - 2], *far1 = line[kLines - 1];
    const int64_t width = size[2];  // a store might change it, for all that the compiler knows
    auto value = [&](int64_t x) __attribute__((always_inline)) {
      const Pack<T> near = load(near0 + x) + wh * (load(near1 + x) - load(near0 + x));
      if constexpr (kLines == 2) return near;
      const Pack<T> far = load(far0 + x) + wh * (load(far1 + x) - load(far0 + x));
      return near + wd * (far - near);
    };
    int64_t x = 0;
    for (; x + kLanes<T> <= width; x += kLanes<T>) store(output + x, value(x));
    if (x < width) {
      const Pack<T> last = value(x);
      std::memcpy(output + x, &last, static_cast<size_t>(width - x) * sizeof(T));
    }
  }
};

}  // namespace gradcampp::GCPP_TARGET
