// Sizes of a convolution, and which taps of its window meet which entries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fqt {

// One spatial axis of a convolution. Entries outside [0, in) are padding and contribute nothing.
struct Axis {
  int64_t in, out, window, stride, before;
};

struct Geometry {
  int64_t n, c, o;
  Axis y, x;

  int64_t taps() const { return y.window * x.window; }
};

// Multiply-adds of the whole convolution, the measure of how much work there is.
inline double work(const Geometry& g) {
  return 1.0 * g.n * g.y.out * g.x.out * g.taps() * g.c * g.o;
}

// The taps that meet one position, and the positions on the other side that they reach: tap
// `tap + j * tap_step` meets `source + j * source_step`, for j in [0, count).
struct Meeting {
  int64_t tap, tap_step, source, source_step, count;
};

// Taps that meet an output position; the source is the input.
inline Meeting output_meeting(const Axis& axis, int64_t position) {
  const int64_t start = position * axis.stride - axis.before;
  const int64_t first = std::max<int64_t>(0, -start);
  const int64_t last = std::min(axis.window, axis.in - start);
  return {first, 1, start + first, 1, std::max<int64_t>(0, last - first)};
}

// Taps that meet an input position; the source is the output. Only every stride-th tap does.
inline Meeting input_meeting(const Axis& axis, int64_t position) {
  const int64_t tap = (position + axis.before) % axis.stride;
  const int64_t source = (position + axis.before) / axis.stride;
  const int64_t first = std::max<int64_t>(0, source - (axis.out - 1));
  const int64_t last = tap < axis.window ? std::min(source, (axis.window - 1 - tap) / axis.stride)
                                         : -1;
  return {tap + first * axis.stride, axis.stride, source - first, -1,
          std::max<int64_t>(0, last - first + 1)};
}

// The number of a tap in the window, where taps along each axis are `tap + i * tap_step`.
template <typename Row, typename Column>
inline int64_t tap_at(const Row& row, int64_t i, const Column& column, int64_t j,
                      int64_t window_width) {
  return (row.tap + i * row.tap_step) * window_width + column.tap + j * column.tap_step;
}

// The output positions [first, last) for which a tap lies inside the input.
struct Range {
  int64_t first, last;
};

inline Range tap_outputs(const Axis& axis, int64_t tap) {
  const int64_t shift = axis.before - tap;  // input = output * stride - shift
  const int64_t first = shift > 0 ? (shift + axis.stride - 1) / axis.stride : 0;
  const int64_t end = axis.in + shift;  // outputs with output * stride < end
  const int64_t last = end > 0 ? (end + axis.stride - 1) / axis.stride : 0;
  return {std::min(first, axis.out), std::max(std::min(first, axis.out), std::min(last, axis.out))};
}

// Positions along an axis that meet the same taps.
struct PositionClass {
  int64_t tap, tap_step, source_step, count;
  std::vector<int64_t> positions, sources;
};

template <typename Meet>
std::vector<PositionClass> position_classes(const Axis& axis, int64_t size, Meet meet) {
  std::vector<PositionClass> classes;
  for (int64_t i = 0; i < size; ++i) {
    const Meeting m = meet(axis, i);
    auto same = [&](const PositionClass& c) {
      return c.count == m.count && (c.count == 0 || c.tap == m.tap);
    };
    auto found = std::find_if(classes.begin(), classes.end(), same);
    if (found == classes.end()) {
      classes.push_back({m.tap, m.tap_step, m.source_step, m.count, {}, {}});
      found = classes.end() - 1;
    }
    found->positions.push_back(i);
    found->sources.push_back(m.count ? m.source : 0);
  }
  return classes;
}

// Along one axis, positions that meet taps in the same way: the position first + i * step meets, by
// the tap `tap + j * tap_step`, the source start + i * source_step + j, for i in [0, count) and j in
// [0, window). Sources outside the image are zero.
struct Lattice {
  int64_t first, step, count, start, source_step, window, tap, tap_step;

  int64_t first_source() const { return start; }
  int64_t last_source() const { return start + (count - 1) * source_step + window - 1; }
};

inline Lattice output_lattice(const Axis& axis) {
  return {0, 1, axis.out, -axis.before, axis.stride, axis.window, 0, 1};
}

// Input positions with one remainder by the stride: they meet every stride-th tap, in reverse.
inline Lattice input_lattice(const Axis& axis, int64_t remainder) {
  const int64_t tap = (remainder + axis.before) % axis.stride;
  const int64_t source = (remainder + axis.before) / axis.stride;
  const int64_t taps = tap < axis.window ? (axis.window - 1 - tap) / axis.stride + 1 : 0;
  return {remainder, axis.stride, (axis.in - 1 - remainder) / axis.stride + 1,
          source - (taps - 1), 1, taps, tap + (taps - 1) * axis.stride, -axis.stride};
}

// A lattice of rows and one of columns.
struct Lattices {
  Lattice y, x;
};

// Together they are all input positions.
inline std::vector<Lattices> input_lattices(const Geometry& g) {
  std::vector<Lattices> all;
  for (int64_t i = 0; i < std::min(g.y.stride, g.y.in); ++i) {
    for (int64_t j = 0; j < std::min(g.x.stride, g.x.in); ++j) {
      all.push_back({input_lattice(g.y, i), input_lattice(g.x, j)});
    }
  }
  return all;
}

}  // namespace fqt
