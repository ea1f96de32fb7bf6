// Arguments of what stands between two products; see moments.inc, transform.inc,
// transform_grad.inc and normed.inc.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "kept.h"

namespace fqt {

// [n, h, w, c]
struct Shape {
  int64_t n, h, w, c;
};

// Positions that are summed as floats before doubles take over.
constexpr int64_t kStrip = 16;

// Samples that one task sums, so that it has more than a few positions.
inline int64_t samples_at_once(const Shape& shape) {
  return std::max<int64_t>(1, 64 / (shape.h * shape.w));
}

enum class SourceType { kInt16, kInt32, kFloat32 };

// What stands between two products; see transform.inc. `coefficients` are rows of c floats: S, T, P1,
// Q1, P0, Q0, and for the backward pass G1, H1, K1, G0, H0, K0. Windows of `pool` x `pool` are
// pooled; rows and columns beyond the last whole window are left out.
struct TransformArgs {
  Shape shape;
  const void* s;
  SourceType type;
  const float* coefficients;
  int64_t pool;
};

struct MomentsArgs {
  Shape shape;
  const void* s;
  SourceType type;
  const float* thresholds;  // [2, c]: S and T of a kink
  const float* weights;     // [n]: how much each sample counts; null where all count one
  float* moments;           // [6, c]
};
FQT_JOB(MomentsArgs)

struct EncodeArgs {
  TransformArgs transform;
  uint32_t *signs, *clip;  // [n, row_words]
  int64_t row_words;
  float* nan;  // [n]: NaN where the source has one, else zero
};
FQT_JOB(EncodeArgs)

struct ActivateArgs {
  TransformArgs transform;
  const float* offsets;  // [n], or null: added to all of a sample
  const float* added;    // of t's shape, or null
  float* t;              // [n, h / pool, w / pool, c]
};
FQT_JOB(ActivateArgs)

struct GradientSumsArgs {
  TransformArgs transform;
  const float* d;  // [samples.count, h / pool, w / pool, c]
  Kept samples;
  float* sums;  // [4, c]
};
FQT_JOB(GradientSumsArgs)

struct GradientArgs {
  TransformArgs transform;
  const float* d;
  Kept samples;
  const float* weights;  // of the moments
  float* g;              // [n, h, w, c]
  float *lo, *hi;        // [n, c]; null where there is one position: they are g
};
FQT_JOB(GradientArgs)

// A norm over channels between two functions of the form above; see normed.inc. `before` and `after`
// are rows of c floats: S, T, P1, Q1, P0, Q0.
struct NormedArgs {
  Shape shape;
  const void* s;
  SourceType type;
  const float *before, *after;
  float epsilon;
};

struct EncodeNormedArgs {
  NormedArgs normed;
  uint32_t *signs, *clip;  // [n, row_words]
  int64_t row_words;
  float* nan;  // [n]
};
FQT_JOB(EncodeNormedArgs)

struct GradientNormedArgs {
  NormedArgs normed;
  const float* d;  // [samples.count, h, w, c]
  Kept samples;
  float* g;        // [n, h, w, c]
  float *lo, *hi;  // [n, c]; null where there is one position: they are g
  float* sums;     // [8, c]
};
FQT_JOB(GradientNormedArgs)

}  // namespace fqt
