// Runs a product's tasks on XLA's intra-op pool without ever waiting for one of them.
#pragma once

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace fqt {

// Schedules helpers on the pool and works on the tasks itself; the future becomes available when
// the last of them ends. A handler that waited for scheduled tasks would deadlock as soon as
// there are as many such handlers in flight as threads. The pool must not be used once the handler
// has returned, so all that is ever scheduled is scheduled here.
xla::ffi::Future run_tasks(std::unique_ptr<Product> product, xla::ffi::ThreadPool pool,
                           int64_t threads);

// How many threads are worth having for that many multiply-adds.
int64_t useful_threads(const xla::ffi::ThreadPool& pool, double work);

}  // namespace fqt
