// What is kept of an axis.
#pragma once

#include <cstdint>
#include <vector>

namespace fqt {

// The kept groups of an axis, in increasing order of index; see fqt_jax.pruning.Selection.
// `indices` is null where everything is kept; `weights` is null where all weights are one.
struct Kept {
  int64_t count;
  const int32_t* indices;
  const float* weights;

  int64_t index(int64_t slot) const { return indices ? indices[slot] : slot; }
  float weight(int64_t slot) const { return weights ? weights[slot] : 1.0f; }

  // The slots whose weight is not zero: those of the rest are as good as not kept.
  std::vector<int64_t> used() const {
    std::vector<int64_t> slots;
    for (int64_t slot = 0; slot < count; ++slot) {
      if (weight(slot) != 0.0f) slots.push_back(slot);
    }
    return slots;
  }
};

}  // namespace fqt
