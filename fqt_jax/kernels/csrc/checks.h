// Checks of what XLA hands to the kernels: nothing is read or written before they have passed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "isa.h"
#include "pages.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace fqt {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Words = ffi::Buffer<ffi::U32>;
using Ints = ffi::Buffer<ffi::S32>;
using Dimensions = ffi::AnyBuffer::Dimensions;

// Thrown by the checks below, caught by `guarded`.
struct Invalid {
  std::string message;
};

inline void require(bool condition, const char* message) {
  if (!condition) throw Invalid{message};
}

inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t total = 1;
  for (int64_t factor : factors) {
    require(factor >= 0 && !__builtin_mul_overflow(total, factor, &total), "sizes overflow");
  }
  return total;
}

inline bool has_shape(Dimensions dimensions, std::initializer_list<int64_t> shape) {
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

inline bool has_shape(Dimensions dimensions, Dimensions shape) {
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
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

// `sizes`: h, w, c, o, window (2), strides (2), padding (top, bottom, left, right).
inline Geometry make_geometry(int64_t n, ffi::Span<const int64_t> sizes) {
  require(sizes.size() == 12, "sizes must be 12 numbers");
  const int64_t* s = sizes.begin();
  const Geometry geometry{n, s[2], s[3], make_axis(s[0], s[4], s[6], s[8], s[9]),
                          make_axis(s[1], s[5], s[7], s[10], s[11])};
  const int64_t limit = int64_t{1} << 31;
  require(n >= 0 && geometry.c >= 0 && geometry.c < limit && geometry.o >= 0 && geometry.o < limit,
          "the number of channels is out of range");
  require(product({geometry.y.window, geometry.x.window, geometry.c}) < (1 << 24),
          "a sum has too many products");
  // Every offset in bytes that follows fits with room to spare.
  require(product({n, geometry.y.in, geometry.x.in, geometry.c}) < (int64_t{1} << 48) &&
              product({n, geometry.y.out, geometry.x.out, geometry.o}) < (int64_t{1} << 48) &&
              product({geometry.taps(), geometry.c, geometry.o}) < (int64_t{1} << 48),
          "an operand is too large");
  return geometry;
}

inline int64_t words_for(int64_t bits) { return (bits + 31) / 32; }

inline Bits sample_bits(const Words& words, const Geometry& g) {
  const int64_t row = words_for(g.y.in * g.x.in * g.c);
  require(has_shape(words.dimensions(), {g.n, row}), "x has not the words of its shape");
  return {words.typed_data(), row};
}

inline Bits weight_bits(const Words& words, const Geometry& g) {
  const int64_t row = words_for(g.taps() * g.c * g.o);
  require(has_shape(words.dimensions(), {row}), "w has not the words of its shape");
  return {words.typed_data(), row};
}

// No selection keeps everything; `indices` are then empty.
inline Kept make_indices(bool is_selected, const Ints& indices, int64_t size) {
  require(indices.dimensions().size() == 1, "indices must be a vector");
  const auto count = static_cast<int64_t>(indices.element_count());
  if (!is_selected) {
    require(count == 0, "indices without a selection");
    return {size, nullptr, nullptr};
  }
  const int32_t* index = indices.typed_data();
  for (int64_t i = 0; i < count; ++i) {
    require(index[i] >= 0 && index[i] < size, "an index of a selection is out of range");
    require(i == 0 || index[i] > index[i - 1], "the indices of a selection must increase");
  }
  return {count, index, nullptr};
}

inline Kept make_kept(bool is_selected, const Ints& indices, const Floats& weights, int64_t size) {
  require(weights.dimensions().size() == 1 && indices.element_count() == weights.element_count(),
          "indices and weights must be vectors of one length");
  Kept kept = make_indices(is_selected, indices, size);
  if (is_selected) kept.weights = weights.typed_data();
  return kept;
}

inline Rounding make_rounding(int64_t bits, const Words& seed, const Floats& lo, const Floats& range,
                       int64_t groups) {
  require(bits >= 1 && bits <= 8, "bits must be from 1 to 8");
  require(has_shape(seed.dimensions(), {2}), "seed must be two words");
  require(has_shape(lo.dimensions(), {groups}) && has_shape(range.dimensions(), {groups}),
          "lo and value_range must have one entry for each kept group");
  const uint32_t* s = seed.typed_data();
  return {static_cast<int>(bits), {s[0], s[1]}, lo.typed_data(), range.typed_data()};
}

inline void require_int32_sums(int64_t terms, int bits) {
  require(product({terms, (1 << bits) - 1}) < (int64_t{1} << 31), "sums of codes exceed int32");
}

// How many threads a pass over that many entries is worth: one costs about as much as 100 one-bit
// products.
inline int64_t pass_threads(const ffi::ThreadPool& pool, int64_t entries) {
  return useful_threads(pool, 100.0 * static_cast<double>(entries));
}

// The result that XLA has laid over the operand: what is computed replaces what was there.
inline float* in_place(const Floats& operand, ffi::Result<Floats>& result) {
  require(result->untyped_data() == operand.untyped_data(), "a result is not that of its operand");
  return result->typed_data();
}

// Runs what a check or an allocation may leave by an exception; XLA must see an error instead.
template <typename F>
ffi::Future guarded(F run) {
  ffi::Error error;
  try {
    return run();
  } catch (const Invalid& invalid) {
    error = ffi::Error::InvalidArgument("fqt_jax native kernel: " + invalid.message);
  } catch (const std::exception& e) {
    error = ffi::Error(ffi::ErrorCode::kResourceExhausted, e.what());
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(error);
  return future;
}

}  // namespace fqt
