// What is kept of an axis.
#pragma once

#include <cstdint>

namespace fqt {

// The kept groups of an axis, in increasing order of index; see fqt_jax.pruning.Selection.
// `indices` is null where everything is kept; `weights` is null where all weights are one.
struct Kept {
  int64_t count;
  const int32_t* indices;
  const float* weights;

  int64_t index(int64_t slot) const { return indices ? indices[slot] : slot; }
  float weight(int64_t slot) const { return weights ? weights[slot] : 1.0f; }
};

}  // namespace fqt
