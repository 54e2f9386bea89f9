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

// Rows [begin, end) of the output, counted over depth and height. `columns` says where the pixels
// of a row lie; `lines` holds two resized rows of the map for each of its depth and height.
//
// Separable: a row of cells is stretched to the output's width once, and every row of the output
// is a blend of two of them (four with depth). Neighbouring rows use the same stretched rows.
template <class T>
struct Resize {
  const int64_t* space;
  const int64_t* size;
  Interpolation interpolation;
  const Source<T>* columns;  // [size[2]]

  int64_t stretched_row() const { return rounded_up(size[2], kLanes<T>); }

  void rows(const T* map, int64_t begin, int64_t end, T* stretched, T* output) const {
    const int64_t width = stretched_row();
    // Which row of the map each of the four slots holds.
    int64_t held[4] = {-1, -1, -1, -1};
    for (int64_t row = begin; row < end; ++row) {
      const Source<T> d = source<T>(row / size[1], space[0], size[0], interpolation);
      const Source<T> h = source<T>(row % size[1], space[1], size[1], interpolation);
      const T* line[4];
      const int64_t wanted[4] = {d.low * space[1] + h.low, d.low * space[1] + h.high,
                                 d.high * space[1] + h.low, d.high * space[1] + h.high};
      for (int i = 0; i < 4; ++i) line[i] = find(map, wanted, i, held, stretched, width);
      blend(line, d.weight, h.weight, output + row * size[2]);
    }
  }

 private:
  // The stretched row wanted[i], made in a slot that no other wanted row stands in.
  const T* find(const T* map, const int64_t* wanted, int i, int64_t* held, T* stretched,
                int64_t width) const {
    for (int slot = 0; slot < 4; ++slot) {
      if (held[slot] == wanted[i]) return stretched + slot * width;
    }
    int free = 0;
    for (; free < 3; ++free) {
      bool needed = false;
      for (int j = 0; j < 4; ++j) needed = needed || held[free] == wanted[j];
      if (!needed) break;
    }
    held[free] = wanted[i];
    T* line = stretched + free * width;
    const T* cells = map + wanted[i] * space[2];
    for (int64_t x = 0; x < size[2]; ++x) {
      const Source<T>& s = columns[x];
      line[x] = cells[s.low] + s.weight * (cells[s.high] - cells[s.low]);
    }
    return line;
  }

  void blend(const T* const* line, T depth_weight, T height_weight, T* output) const {
    const Pack<T> wh = broadcast<T>(height_weight), wd = broadcast<T>(depth_weight);
    for (int64_t x = 0; x < size[2]; x += kLanes<T>) {
      const Pack<T> near0 = load(line[0] + x), near1 = load(line[1] + x);
      Pack<T> value = near0 + wh * (near1 - near0);
      if (depth_weight != 0) {
        const Pack<T> far0 = load(line[2] + x), far1 = load(line[3] + x);
        const Pack<T> far = far0 + wh * (far1 - far0);
        value += wd * (far - value);
      }
      const int64_t n = smaller(kLanes<T>, size[2] - x);
      if (n == kLanes<T>) {
        store(output + x, value);
      } else {
        std::memcpy(output + x, &value, static_cast<size_t>(n) * sizeof(T));
      }
    }
  }
};

}  // namespace gradcampp::GCPP_TARGET
