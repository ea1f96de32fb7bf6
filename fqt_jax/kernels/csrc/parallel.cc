#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <utility>

#include "denormals.h"
#include "kernel.h"

namespace fqt {
namespace {

struct Shared {
  Shared(std::unique_ptr<Job> j, int64_t workers)
      : job(std::move(j)), tasks(job->tasks()), done(workers) {}

  // Takes tasks until none is left. The worker that ends last completes the future.
  void work() {
    ffi::Error error;
    try {
      const FlushDenormals flush;
      for (int64_t task = next++; task < tasks; task = next++) job->run(task);
    } catch (const std::exception& e) {
      next = tasks;
      error = error_of(e);
    }
    done.CountDown(error);
  }

  const std::unique_ptr<Job> job;
  const int64_t tasks;
  std::atomic<int64_t> next{0};
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
  const int64_t workers = std::max<int64_t>(1, std::min(threads, job->tasks()));
  auto shared = std::make_shared<Shared>(std::move(job), workers);
  ffi::Future future(shared->done);
  for (int64_t i = 1; i < workers; ++i) {
    pool.Schedule([shared] { shared->work(); });
  }
  shared->work();
  return future;
}

}  // namespace fqt
