// Checks of what XLA hands to the kernels: nothing is read or written before they have passed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
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

// Asks for no product of the sizes: that of the others may overflow where one is zero.
inline bool is_empty(Dimensions dimensions) {
  return std::find(dimensions.begin(), dimensions.end(), 0) != dimensions.end();
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
  const int64_t count = indices.dimensions()[0];
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
  require(has_shape(weights.dimensions(), indices.dimensions()),
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

inline ffi::Future done(const ffi::Error& error = ffi::Error::Success()) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (error.success()) {
    promise.SetAvailable();
  } else {
    promise.SetError(error);
  }
  return future;
}

// The results where there is nothing to compute from: what is empty stays so, sums are zero. Kernels
// are not made for it: sizes of what is empty have no bound.
template <typename... Results>
ffi::Future zeros(Results&... results) {
  (std::memset(results->untyped_data(), 0, results->size_bytes()), ...);
  return done();
}

// Runs what a check or an allocation may leave by an exception; XLA must see an error instead.
template <typename F>
ffi::Future guarded(F run) {
  try {
    return run();
  } catch (const Invalid& invalid) {
    return done(ffi::Error::InvalidArgument("fqt_jax native kernel: " + invalid.message));
  } catch (const std::exception& e) {
    return done(ffi::Error(ffi::ErrorCode::kResourceExhausted,
                           std::string("fqt_jax native kernel: ") + e.what()));
  }
}

}  // namespace fqt
