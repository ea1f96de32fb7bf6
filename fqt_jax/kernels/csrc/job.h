// A job that runs in parallel pieces, free of XLA: plain buffers in, tasks out.
#pragma once

#include <cstdint>

namespace fqt {

// Work that is cut into tasks, which may run in any order and on any threads. The result does not
// depend on the cut: integer sums do not, and floats are computed entry by entry or summed in one
// order.
class Job {
 public:
  virtual ~Job() = default;
  virtual int64_t tasks() const = 0;
  virtual void run(int64_t task) = 0;  // may throw std::bad_alloc
};

}  // namespace fqt
