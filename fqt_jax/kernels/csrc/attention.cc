// Handlers of self-attention.

#include "attention.h"

#include <algorithm>

#include "checks.h"
#include "kernel.h"
#include "parallel.h"

namespace fqt {
namespace {

AttentionShape attention_shape(const Floats& qkv) {
  const Dimensions s = qkv.shape;
  require(s.size() == 5 && s[2] == 3, "qkv must have the axes n, length, 3, heads, d");
  require_small({s[0], s[1], s[2], s[3], s[4]}, "qkv is too large");
  // What a head needs is held in memory: a few arrays of these sizes.
  require(product({s[1], std::max<int64_t>(s[4], 64)}) < (int64_t{1} << 28),
          "the sequence is too long");
  return {s[0], s[1], s[3], s[4]};
}

int64_t attention_threads(const ffi::ThreadPool& pool, const AttentionShape& s, double products) {
  // A product of floats costs about as much as this many one-bit products.
  constexpr double kProductsOfFloat = 10;
  const double pairs = static_cast<double>(s.n * s.heads) * static_cast<double>(s.length) *
                       static_cast<double>(s.length);
  return useful_threads(pool, kProductsOfFloat * products * pairs * static_cast<double>(s.d));
}

ffi::Future attention(ffi::ThreadPool pool, Floats qkv, FloatsOut y, Scale scale,
                      IsCausal is_causal) {
  const AttentionShape s = attention_shape(qkv);
  require(has_shape(y.shape, {s.n, s.length, s.heads, s.d}), "y has the wrong shape");
  if (is_empty(qkv.shape)) return done();
  const AttentionArgs args{s, is_causal, scale, qkv.data, to_write(y)};
  return run_job(make_job(current_isa(), args), pool, attention_threads(pool, s, 2));
}
FQT_KERNEL(attention)

ffi::Future attention_grad(ffi::ThreadPool pool, Floats qkv, Floats dy, FloatsOut dqkv, Scale scale,
                           IsCausal is_causal) {
  const AttentionShape s = attention_shape(qkv);
  require(has_shape(dy.shape, {s.n, s.length, s.heads, s.d}), "dy has the wrong shape");
  require(has_shape(dqkv.shape, qkv.shape), "dqkv has the wrong shape");
  if (is_empty(qkv.shape)) return done();
  const AttentionGradArgs args{s, is_causal, scale, qkv.data, dy.data, to_write(dqkv)};
  return run_job(make_job(current_isa(), args), pool, attention_threads(pool, s, 5));
}
FQT_KERNEL(attention_grad)

}  // namespace
}  // namespace fqt
