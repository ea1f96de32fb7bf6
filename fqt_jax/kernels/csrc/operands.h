// What a handler is called with: operands and results by element type, and named attributes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace fqt {

namespace ffi = xla::ffi;

using Dimensions = ffi::AnyBuffer::Dimensions;

// Thrown where an operand is not what it must be; XLA sees an error, see kernel.h.
struct Invalid {
  std::string message;
};

inline void require(bool condition, const char* message) {
  if (!condition) throw Invalid{message};
}

// An operand (T is const) or a result.
template <typename T>
struct Array {
  Dimensions shape;
  T* data;
};

using Floats = Array<const float>;
using Words = Array<const uint32_t>;
using Ints = Array<const int32_t>;
using FloatsOut = Array<float>;
using IntsOut = Array<int32_t>;
using WordsOut = Array<uint32_t>;

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

// Number of entries, of an array whose shape has been checked.
inline int64_t entries(Dimensions dimensions) {
  int64_t total = 1;
  for (int64_t size : dimensions) total *= size;
  return total;
}

// An attribute. Its type says its name as well, so that a handler's signature is all there is to bind.
template <typename T, const char* name>
struct Attribute {
  T value;
  operator T() const { return value; }
};

#define FQT_ATTRIBUTE(Type, T, name)            \
  inline constexpr char k##Type##Name[] = name; \
  using Type = Attribute<T, k##Type##Name>;

FQT_ATTRIBUTE(Sizes, ffi::Span<const int64_t>, "sizes")
FQT_ATTRIBUTE(CodeBits, int64_t, "bits")
FQT_ATTRIBUTE(Pool, int64_t, "pool")
FQT_ATTRIBUTE(Epsilon, float, "epsilon")
FQT_ATTRIBUTE(Scale, float, "scale")
FQT_ATTRIBUTE(IsCausal, bool, "is_causal")
FQT_ATTRIBUTE(SelectsSamples, bool, "selects_samples")
FQT_ATTRIBUTE(SelectsChannels, bool, "selects_channels")
FQT_ATTRIBUTE(HasMask, bool, "has_mask")
FQT_ATTRIBUTE(Scatters, bool, "scatters")
FQT_ATTRIBUTE(Clips, bool, "clips")
#undef FQT_ATTRIBUTE

}  // namespace fqt
