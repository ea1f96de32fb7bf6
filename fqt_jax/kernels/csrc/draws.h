// Arguments of what decides which groups of a gradient are kept; see draws.inc.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fqt {

// p_i = min(1, c r_i), which sum to k.
struct WaterFillingArgs {
  const float* importance;  // [n]
  int64_t n;
  int32_t k;
  float* p;  // [n]
};
FQT_JOB(WaterFillingArgs)

// One systematic draw of k of n groups.
struct SystematicArgs {
  const float* p;  // [n]
  int64_t n, k;
  uint32_t seed;
  int32_t* indices;  // [k]
  float* weights;    // [k]
};
FQT_JOB(SystematicArgs)

}  // namespace fqt
