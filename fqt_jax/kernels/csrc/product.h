// The integer products, free of XLA: plain buffers in, tasks out.
#pragma once

#include <cstdint>
#include <memory>

#include "geometry.h"

namespace fqt {

// Bits of PackedBits: for each row (a sample, or the weights as the only row), `row_words` words.
struct Bits {
  const uint32_t* words;
  int64_t row_words;
};

// The kept groups of an axis, in increasing order of index; see fqt_jax.pruning.Selection.
// `indices` is null where everything is kept; `weights` is null where all weights are one.
struct Kept {
  int64_t count;
  const int32_t* indices;
  const float* weights;

  int64_t index(int64_t slot) const { return indices ? indices[slot] : slot; }
  float weight(int64_t slot) const { return weights ? weights[slot] : 1.0f; }
};

// fqt_jax.kernels.contract.Rounding. `lo` and `range` have one entry for each kept group.
struct Rounding {
  int bits;
  uint32_t seed[2];
  const float* lo;
  const float* range;
};

// A product cut into tasks that may run in any order and on any threads. Integer sums do not
// depend on the cut, and floats are computed entry by entry, so neither does the result.
class Product {
 public:
  virtual ~Product() = default;
  virtual int64_t tasks() const = 0;
  virtual void run(int64_t task) = 0;  // may throw std::bad_alloc
};

// `threads` is how many may work on the tasks: it decides the cut, never the result.
struct ForwardArgs {
  Geometry geometry;
  Bits x, w;
  void* z;       // [n, oh, ow, o]
  bool is_wide;  // z is int32 rather than int16
  int64_t threads;
};

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

struct WeightGradArgs {
  Geometry geometry;
  const float* g;  // [n, oh, ow, o]
  Bits x;
  Kept samples, channels;
  Rounding rounding;  // groups are the kept channels
  float* dw;          // [kh, kw, c, o]
  int64_t threads;
};

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

// What stands between two products; see transform.h. `coefficients` are rows of c floats: S, T, P1,
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

struct EncodeArgs {
  TransformArgs transform;
  uint32_t *signs, *clip;  // [n, row_words]
  int64_t row_words;
  float* nan;  // [n]: NaN where the source has one, else zero
};

struct ActivateArgs {
  TransformArgs transform;
  const float* offsets;  // [n], or null: added to all of a sample
  const float* added;    // of t's shape, or null
  float* t;              // [n, h / pool, w / pool, c]
};

struct GradientSumsArgs {
  TransformArgs transform;
  const float* d;  // [samples.count, h / pool, w / pool, c]
  Kept samples;
  float* sums;  // [4, c]
};

struct GradientArgs {
  TransformArgs transform;
  const float* d;
  Kept samples;
  const float* weights;  // of the moments
  float* g;              // [n, h, w, c]
  float *lo, *hi;        // [n, c]
};

// What all entries have in common; see adam.h.
struct AdamFactors {
  float new1, old1, new2, old2, inverse1, inverse2, epsilon;
};

struct AdamArgs {
  int64_t size;
  float* g;  // in, the gradient; out, the direction
  float *m, *v;
  AdamFactors factors;
};

struct EncodeWeightsArgs {
  const float* w;  // [rows, o]
  int64_t rows, o;
  uint32_t* signs;  // one row of words
  float* scale;     // [o]
};

// dw becomes [|w| <= 1] dw + sign(w) d_scale, or without the first factor.
struct FinishWeightGradArgs {
  const float* w;        // [rows, o]
  const float* d_scale;  // [o]
  int64_t rows, o;
  bool clips;
  float* dw;  // [rows, o]
};

struct FloatConvArgs {
  Geometry geometry;
  const float* x;  // [n, h, w, c]
  const float* w;  // [kh, kw, c, o]
  float* y;        // [n, oh, ow, o]
};

struct FloatConvWeightGradArgs {
  Geometry geometry;
  const float* x;  // [n, h, w, c]
  const float* g;  // [n, oh, ow, o]
  float* dw;       // [kh, kw, c, o]
};

// One set of kernels, compiled for one instruction set.
struct Kernels {
  const char* isa;
  std::unique_ptr<Product> (*forward)(const ForwardArgs&);
  std::unique_ptr<Product> (*input_grad)(const InputGradArgs&);
  std::unique_ptr<Product> (*weight_grad)(const WeightGradArgs&);
  std::unique_ptr<Product> (*moments)(const MomentsArgs&);
  std::unique_ptr<Product> (*encode)(const EncodeArgs&);
  std::unique_ptr<Product> (*activate)(const ActivateArgs&);
  std::unique_ptr<Product> (*gradient_sums)(const GradientSumsArgs&);
  std::unique_ptr<Product> (*gradient)(const GradientArgs&);
  std::unique_ptr<Product> (*encode_weights)(const EncodeWeightsArgs&);
  std::unique_ptr<Product> (*finish_weight_grad)(const FinishWeightGradArgs&);
  std::unique_ptr<Product> (*float_conv)(const FloatConvArgs&);
  std::unique_ptr<Product> (*float_conv_weight_grad)(const FloatConvWeightGradArgs&);
  std::unique_ptr<Product> (*adam)(const AdamArgs&);
};

// Multiply-adds of the whole convolution, the measure of how much work there is.
inline double work(const Geometry& g) {
  return 1.0 * g.n * g.y.out * g.x.out * g.taps() * g.c * g.o;
}

}  // namespace fqt
