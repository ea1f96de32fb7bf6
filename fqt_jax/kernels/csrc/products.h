// Arguments of the integer products; see products.inc.
#pragma once

#include <cstdint>

#include "geometry.h"
#include "isa.h"
#include "kept.h"

namespace fqt {

// Bits of PackedBits: for each row (a sample, or the weights as the only row), `row_words` words.
struct Bits {
  const uint32_t* words;
  int64_t row_words;
};

// fqt_jax.kernels.contract.Rounding. `lo` and `range` have one entry for each kept group.
struct Rounding {
  int bits;
  uint32_t seed[2];
  const float* lo;
  const float* range;
};

// `threads` is how many may work on the tasks: it decides the cut, never the result.
struct ForwardArgs {
  Geometry geometry;
  Bits x, w;
  void* z;       // [n, oh, ow, o]
  bool is_wide;  // z is int32 rather than int16
  int64_t threads;
};
FQT_PRODUCT(ForwardArgs)

struct InputGradArgs {
  Geometry geometry;
  const float* g;  // [n, oh, ow, o]
  Bits w;
  Kept samples;
  Rounding rounding;  // groups are the kept samples
  Bits mask;          // entries of x whose bit is clear get zero; no words: none do
  bool scatters;      // to all samples; else dx has rows for the kept ones only
  float* dx;          // [n or samples.count, h, w, c]
  int64_t threads;
};
FQT_PRODUCT(InputGradArgs)

struct WeightGradArgs {
  Geometry geometry;
  const float* g;  // [n, oh, ow, o]
  Bits x;
  Kept samples, channels;
  Rounding rounding;  // groups are the kept channels
  float* dw;          // [kh, kw, c, o]
  int64_t threads;
};
FQT_PRODUCT(WeightGradArgs)

// The gradients of a product of signs where they are not rounded; see float_products.inc.
struct FloatInputGradArgs {
  Geometry geometry;
  const float* g;  // [n, oh, ow, o]
  Bits w;
  Bits mask;  // as in InputGradArgs
  float* dx;  // [n, h, w, c]
};
FQT_JOB(FloatInputGradArgs)

struct FloatWeightGradArgs {
  Geometry geometry;
  const float* g;  // [n, oh, ow, o]
  Bits x;
  Kept samples;
  bool rounds;
  Rounding rounding;  // groups are the kept samples
  float* dw;          // [kh, kw, c, o]
};
FQT_JOB(FloatWeightGradArgs)

}  // namespace fqt
