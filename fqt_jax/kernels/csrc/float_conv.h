// Arguments of the float convolution of images; see float_conv.inc.
#pragma once

#include "geometry.h"
#include "isa.h"

namespace fqt {

struct FloatConvArgs {
  Geometry geometry;
  const float* x;  // [n, h, w, c]
  const float* w;  // [kh, kw, c, o]
  float* y;        // [n, oh, ow, o]
};
FQT_JOB(FloatConvArgs)

struct FloatConvWeightGradArgs {
  Geometry geometry;
  const float* x;  // [n, h, w, c]
  const float* g;  // [n, oh, ow, o]
  float* dw;       // [kh, kw, c, o]
};
FQT_JOB(FloatConvWeightGradArgs)

}  // namespace fqt
