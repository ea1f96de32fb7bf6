#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "denormals.h"
#include "kernel.h"

namespace fqt {
namespace {

// Tasks side by side, which are taken from the front, and by those who help out from the back.
class Tasks {
 public:
  void assign(uint32_t first, uint32_t last) { ends_ = pack(first, last); }

  // The next task of one end, or -1 where none is left.
  int64_t take(bool is_front) {
    uint64_t ends = ends_.load(std::memory_order_relaxed);
    for (;;) {
      const uint32_t first = static_cast<uint32_t>(ends >> 32), last = static_cast<uint32_t>(ends);
      if (first >= last) return -1;
      const uint64_t rest = is_front ? pack(first + 1, last) : pack(first, last - 1);
      if (ends_.compare_exchange_weak(ends, rest)) return is_front ? first : last - 1;
    }
  }

 private:
  static uint64_t pack(uint32_t first, uint32_t last) { return uint64_t{first} << 32 | last; }

  alignas(64) std::atomic<uint64_t> ends_{0};
};

// Where a thread runs: which processor, if the system says so.
int64_t processor() {
#if defined(__linux__)
  return std::max(0, sched_getcpu());
#else
  return 0;
#endif
}

// Most jobs have one task after the other in memory, as samples are. So the processors that share
// a job begin with the same part of it every time: what one has written it also reads, from caches
// of its own.
struct Shared {
  Shared(std::unique_ptr<Job> j, int64_t tasks, int64_t workers)
      : job(std::move(j)), parts(static_cast<size_t>(workers)), done(workers) {
    for (int64_t i = 0; i < workers; ++i) {
      parts[static_cast<size_t>(i)].assign(static_cast<uint32_t>(i * tasks / workers),
                                           static_cast<uint32_t>((i + 1) * tasks / workers));
    }
  }

  // Takes tasks until none is left. The worker that ends last completes the future.
  void work() {
    ffi::Error error;
    try {
      const FlushDenormals flush;
      const size_t own = static_cast<size_t>(processor()) % parts.size();
      for (size_t i = 0; i < parts.size() && !is_over; ++i) {
        Tasks& part = parts[(own + i) % parts.size()];
        for (int64_t task; !is_over && (task = part.take(i == 0)) >= 0;) job->run(task);
      }
    } catch (const std::exception& e) {
      is_over = true;
      error = error_of(e);
    }
    done.CountDown(error);
  }

  const std::unique_ptr<Job> job;
  std::vector<Tasks> parts;
  std::atomic<bool> is_over{false};  // after an error
  ffi::CountDownPromise done;
};

}  // namespace

int64_t useful_threads(const ffi::ThreadPool& pool, double work) {
  // A thread does some 10^11 a second, and waking one takes some 10 microseconds.
  constexpr double kWorkOfThread = 4e6;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  return std::max<int64_t>(1, static_cast<int64_t>(std::min<double>(
                                  static_cast<double>(threads), work / kWorkOfThread)));
}

int64_t pass_threads(const ffi::ThreadPool& pool, int64_t entries) {
  // An entry costs about as much as 100 one-bit products.
  return useful_threads(pool, 100.0 * static_cast<double>(entries));
}

ffi::Future run_job(std::unique_ptr<Job> job, ffi::ThreadPool pool, int64_t threads) {
  const int64_t tasks = job->tasks();
  if (tasks > std::numeric_limits<uint32_t>::max()) throw std::length_error("too many tasks");
  const int64_t workers = std::max<int64_t>(1, std::min(threads, tasks));
  auto shared = std::make_shared<Shared>(std::move(job), tasks, workers);
  ffi::Future future(shared->done);
  for (int64_t i = 1; i < workers; ++i) {
    pool.Schedule([shared] { shared->work(); });
  }
  shared->work();
  return future;
}

}  // namespace fqt
