// Arguments of what becomes of weights; see weights.inc and adam.inc.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fqt {

struct EncodeWeightsArgs {
  const float* w;  // [rows, o]
  int64_t rows, o;
  uint32_t* signs;  // one row of words
  float* scale;     // [o]
};
FQT_JOB(EncodeWeightsArgs)

// dw becomes [|w| <= 1] dw + sign(w) d_scale, or without the first factor.
struct FinishWeightGradArgs {
  const float* w;        // [rows, o]
  const float* d_scale;  // [o]
  int64_t rows, o;
  bool clips;
  float* dw;  // [rows, o]
};
FQT_JOB(FinishWeightGradArgs)

// What all entries have in common; see adam.inc.
struct AdamFactors {
  float new1, old1, new2, old2, inverse1, inverse2, epsilon;
};

struct AdamArgs {
  int64_t size;
  float* g;  // in, the gradient; out, the direction
  float *m, *v;
  AdamFactors factors;
};
FQT_JOB(AdamArgs)

}  // namespace fqt
