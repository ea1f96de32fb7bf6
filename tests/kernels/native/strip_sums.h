// Sums over positions in the order of the kernels; see sums.inc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "transforms.h"

namespace fqt {

// Sums over strips of positions as floats, then over all as doubles, in the order of the kernels.
// A task whose sums are not finite takes doubles throughout.
struct StripSums {
  std::vector<float> strip;
  std::vector<double> exact_strip, task, exact_task, all;
  int64_t positions = 0;

  explicit StripSums(int64_t size)
      : strip(static_cast<size_t>(size)), exact_strip(strip.size()), task(strip.size()),
        exact_task(strip.size()), all(strip.size()) {}
  void add(size_t i, float part, double exact) {
    strip[i] += part;
    exact_strip[i] += exact;
  }
  void flush(float weight) {
    for (size_t i = 0; i < strip.size(); ++i) {
      task[i] += static_cast<double>(weight) * static_cast<double>(strip[i]);
      exact_task[i] += static_cast<double>(weight) * exact_strip[i];
    }
    std::fill(strip.begin(), strip.end(), 0.0f);
    std::fill(exact_strip.begin(), exact_strip.end(), 0.0);
    positions = 0;
  }
  void end_row(int64_t count) {
    positions += count;
    if (positions >= kStrip) flush(1.0f);
  }
  void end_task() {
    flush(1.0f);
    bool is_finite = true;
    for (double sum : task) is_finite = is_finite && std::isfinite(sum);
    for (size_t i = 0; i < all.size(); ++i) all[i] += is_finite ? task[i] : exact_task[i];
    std::fill(task.begin(), task.end(), 0.0);
    std::fill(exact_task.begin(), exact_task.end(), 0.0);
  }
};

}  // namespace fqt
