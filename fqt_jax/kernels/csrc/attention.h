// Arguments of self-attention; see attention.inc.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fqt {

// Queries, keys and values as one array, [n, length, 3, heads, d].
struct AttentionShape {
  int64_t n, length, heads, d;
};

struct AttentionArgs {
  AttentionShape shape;
  bool is_causal;
  float scale;
  const float* qkv;
  float* y;  // [n, length, heads, d]
};
FQT_JOB(AttentionArgs)

struct AttentionGradArgs {
  AttentionShape shape;
  bool is_causal;
  float scale;
  const float *qkv, *dy;
  float* dqkv;
};
FQT_JOB(AttentionGradArgs)

}  // namespace fqt
