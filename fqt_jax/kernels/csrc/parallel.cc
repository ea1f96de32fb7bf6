#include "parallel.h"

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "denormals.h"

namespace fqt {
namespace ffi = xla::ffi;

namespace {

struct Shared {
  Shared(std::unique_ptr<Product> p, int64_t workers)
      : product(std::move(p)), tasks(product->tasks()), done(workers) {}

  // Takes tasks until none is left. The worker that ends last completes the future.
  void work() {
    ffi::Error error;
    try {
      const FlushDenormals flush;
      for (int64_t task = next++; task < tasks; task = next++) product->run(task);
    } catch (const std::exception& e) {
      next = tasks;
      error = ffi::Error(ffi::ErrorCode::kResourceExhausted, e.what());
    }
    done.CountDown(error);
  }

  const std::unique_ptr<Product> product;
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

ffi::Future run_tasks(std::unique_ptr<Product> product, ffi::ThreadPool pool, int64_t threads) {
  const int64_t workers = std::max<int64_t>(1, std::min(threads, product->tasks()));
  auto shared = std::make_shared<Shared>(std::move(product), workers);
  ffi::Future future(shared->done);
  for (int64_t i = 1; i < workers; ++i) {
    pool.Schedule([shared] { shared->work(); });
  }
  shared->work();
  return future;
}

}  // namespace fqt
