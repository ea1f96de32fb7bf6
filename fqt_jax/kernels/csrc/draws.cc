// Handlers of what decides which groups of a gradient are kept.

#include "draws.h"

#include "checks.h"
#include "kernel.h"
#include "parallel.h"

namespace fqt {
namespace {

// Indices are int32, and a radix sort counts in 32 bits.
constexpr int64_t kMostGroups = int64_t{1} << 31;

ffi::Future water_filling(ffi::ThreadPool pool, Floats importance, Ints k, FloatsOut p) {
  require(importance.shape.size() == 1, "the importance must be a vector");
  require(has_shape(p.shape, importance.shape), "the probabilities have the wrong shape");
  require(k.shape.size() == 0, "k must be a number");
  if (is_empty(p.shape)) return done();
  const int64_t n = p.shape[0];
  require(n < kMostGroups, "there are too many groups");
  return run_job(make_job(current_isa(), WaterFillingArgs{importance.data, n, *k.data, p.data}),
                 pool, 1);
}
FQT_KERNEL(water_filling)

ffi::Future systematic(ffi::ThreadPool pool, Floats p, Words seed, IntsOut indices,
                       FloatsOut weights) {
  require(p.shape.size() == 1, "the probabilities must be a vector");
  require(has_shape(seed.shape, {2}), "seed must be two words");
  require(indices.shape.size() == 1 && has_shape(weights.shape, indices.shape),
          "indices and weights must be vectors of one length");
  const int64_t n = p.shape[0], k = indices.shape[0];
  require(k <= n, "more groups are kept than there are");
  if (k == 0) return done();
  require(n < kMostGroups, "there are too many groups");
  const SystematicArgs args{p.data, n, k, seed.data[0], indices.data, weights.data};
  return run_job(make_job(current_isa(), args), pool, 1);
}
FQT_KERNEL(systematic)

}  // namespace
}  // namespace fqt
