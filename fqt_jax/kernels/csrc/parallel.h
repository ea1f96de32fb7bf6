// Runs a job's tasks on XLA's intra-op pool without ever waiting for one of them.
#pragma once

#include <cstdint>
#include <memory>

#include "job.h"
#include "xla/ffi/api/ffi.h"

namespace fqt {

// Schedules helpers on the pool and works on the tasks itself; the future becomes available when
// the last of them ends. A handler that waited for scheduled tasks would deadlock as soon as
// there are as many such handlers in flight as threads. The pool must not be used once the handler
// has returned, so all that is ever scheduled is scheduled here.
xla::ffi::Future run_job(std::unique_ptr<Job> job, xla::ffi::ThreadPool pool, int64_t threads);

// How many threads are worth having for that many multiply-adds.
int64_t useful_threads(const xla::ffi::ThreadPool& pool, double work);

// The same for a pass over that many entries.
int64_t pass_threads(const xla::ffi::ThreadPool& pool, int64_t entries);

}  // namespace fqt
