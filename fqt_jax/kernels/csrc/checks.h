// Checks of what XLA hands to the kernels: nothing is read or written before they have passed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "geometry.h"
#include "kept.h"
#include "kernel.h"
#include "operands.h"
#include "pages.h"
#include "products.h"

namespace fqt {

inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t total = 1;
  for (int64_t factor : factors) {
    require(factor >= 0 && !__builtin_mul_overflow(total, factor, &total), "sizes overflow");
  }
  return total;
}

inline Axis make_axis(int64_t in, int64_t window, int64_t stride, int64_t before, int64_t after) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  require(in >= 0 && in < kLimit, "the image's size is out of range");
  require(window >= 1 && window < kLimit, "the window's size is out of range");
  require(stride >= 1 && stride < kLimit, "the stride is out of range");
  require(before >= 0 && before < kLimit && after >= 0 && after < kLimit,
          "the padding is out of range");
  const int64_t padded = in + before + after;
  require(padded >= window, "the window is larger than the padded image");
  return {in, (padded - window) / stride + 1, window, stride, before};
}

// Every offset in bytes that follows fits with room to spare. An axis of length zero counts as one,
// so that the product of any of the factors is bounded as well.
inline void require_small(std::initializer_list<int64_t> shape, const char* message) {
  int64_t total = 1;
  for (int64_t size : shape) {
    require(!__builtin_mul_overflow(total, std::max<int64_t>(1, size), &total) &&
                total < (int64_t{1} << 48),
            message);
  }
}

// `sizes`: h, w, c, o, window (2), strides (2), padding (top, bottom, left, right).
inline Geometry make_geometry(int64_t n, ffi::Span<const int64_t> sizes) {
  require(sizes.size() == 12, "sizes must be 12 numbers");
  const int64_t* s = sizes.begin();
  const Geometry g{n, s[2], s[3], make_axis(s[0], s[4], s[6], s[8], s[9]),
                   make_axis(s[1], s[5], s[7], s[10], s[11])};
  const int64_t limit = int64_t{1} << 31;
  require(g.c >= 0 && g.c < limit && g.o >= 0 && g.o < limit,
          "the number of channels is out of range");
  require_small({n, g.y.in, g.x.in, g.c}, "the input is too large");
  require_small({n, g.y.out, g.x.out, g.o}, "the output is too large");
  require_small({g.y.window, g.x.window, g.c, g.o}, "the weights are too large");
  require(g.taps() * std::max<int64_t>(1, g.c) < (1 << 24), "a sum has too many products");
  return g;
}

inline int64_t words_for(int64_t bits) { return (bits + 31) / 32; }

inline Bits sample_bits(const Words& words, const Geometry& g) {
  const int64_t row = words_for(g.y.in * g.x.in * g.c);
  require(has_shape(words.shape, {g.n, row}), "x has not the words of its shape");
  return {words.data, row};
}

inline Bits weight_bits(const Words& words, const Geometry& g) {
  const int64_t row = words_for(g.taps() * g.c * g.o);
  require(has_shape(words.shape, {row}), "w has not the words of its shape");
  return {words.data, row};
}

// No selection keeps everything; `indices` are then empty.
inline Kept make_indices(bool is_selected, const Ints& indices, int64_t size) {
  require(indices.shape.size() == 1, "indices must be a vector");
  const int64_t count = indices.shape[0];
  if (!is_selected) {
    require(count == 0, "indices without a selection");
    return {size, nullptr, nullptr};
  }
  const int32_t* index = indices.data;
  for (int64_t i = 0; i < count; ++i) {
    require(index[i] >= 0 && index[i] < size, "an index of a selection is out of range");
    require(i == 0 || index[i] > index[i - 1], "the indices of a selection must increase");
  }
  return {count, index, nullptr};
}

inline Kept make_kept(bool is_selected, const Ints& indices, const Floats& weights, int64_t size) {
  require(has_shape(weights.shape, indices.shape),
          "indices and weights must be vectors of one length");
  Kept kept = make_indices(is_selected, indices, size);
  if (is_selected) kept.weights = weights.data;
  return kept;
}

inline Rounding make_rounding(int64_t bits, const Words& seed, const Floats& lo,
                              const Floats& range, int64_t groups) {
  require(bits >= 1 && bits <= 8, "bits must be from 1 to 8");
  require(has_shape(seed.shape, {2}), "seed must be two words");
  require(has_shape(lo.shape, {groups}) && has_shape(range.shape, {groups}),
          "lo and value_range must have one entry for each kept group");
  const uint32_t* s = seed.data;
  return {static_cast<int>(bits), {s[0], s[1]}, lo.data, range.data};
}

inline void require_int32_sums(int64_t terms, int bits) {
  require(product({terms, (1 << bits) - 1}) < (int64_t{1} << 31), "sums of codes exceed int32");
}

// The result that XLA has laid over the operand: what is computed replaces what was there.
inline float* in_place(const Floats& operand, const FloatsOut& result) {
  require(result.data == operand.data, "a result is not that of its operand");
  return result.data;
}

template <typename T>
size_t bytes_of(const Array<T>& result) {
  return static_cast<size_t>(entries(result.shape)) * sizeof(T);
}

// The memory of a large result that is about to be written.
template <typename T>
T* to_write(const Array<T>& result) {
  ask_for_huge_pages(result.data, bytes_of(result));
  return result.data;
}

// The results where there is nothing to compute from: what is empty stays so, sums are zero. Kernels
// are not made for it: sizes of what is empty have no bound.
template <typename... T>
ffi::Future zeros(const Array<T>&... results) {
  (std::memset(results.data, 0, bytes_of(results)), ...);
  return done();
}

}  // namespace fqt
