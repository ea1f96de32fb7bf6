// Handlers of what becomes of weights: their signs forward, their gradients, and Adam's step.

#include "weights.h"

#include "checks.h"
#include "kernel.h"
#include "parallel.h"

namespace fqt {
namespace {

ffi::Future encode_weights(ffi::ThreadPool pool, Floats w, WordsOut signs, FloatsOut scale) {
  require(w.shape.size() == 2, "w must be a matrix");
  const int64_t rows = w.shape[0], o = w.shape[1];
  require(has_shape(signs.shape, {words_for(product({rows, o}))}),
          "the words have the wrong shape");
  require(has_shape(scale.shape, {o}), "the scale has the wrong shape");
  if (is_empty(w.shape)) return zeros(scale);
  const EncodeWeightsArgs args{w.data, rows, o, signs.data, scale.data};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, rows * o));
}
FQT_KERNEL(encode_weights)

ffi::Future finish_weight_grad(ffi::ThreadPool pool, Floats dw, Floats w, Floats d_scale,
                               FloatsOut out, Clips clips) {
  require(w.shape.size() > 0, "w must have an axis of output channels");
  require(has_shape(dw.shape, w.shape) && has_shape(out.shape, w.shape),
          "the gradient has not the shape of w");
  const int64_t o = w.shape.back();
  require(has_shape(d_scale.shape, {o}), "the scale's gradient has the wrong shape");
  if (is_empty(w.shape)) return done();
  const int64_t size = entries(w.shape);
  const FinishWeightGradArgs args{w.data, d_scale.data, size / o, o, clips, in_place(dw, out)};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size));
}
FQT_KERNEL(finish_weight_grad)

ffi::Future adam(ffi::ThreadPool pool, Floats g, Floats m, Floats v, Floats factors,
                 FloatsOut direction, FloatsOut new_m, FloatsOut new_v) {
  require(has_shape(m.shape, g.shape) && has_shape(v.shape, g.shape) &&
              has_shape(direction.shape, g.shape) && has_shape(new_m.shape, g.shape) &&
              has_shape(new_v.shape, g.shape),
          "gradient, moments and results must have the same shape");
  require(has_shape(factors.shape, {7}), "factors must be 7 numbers");
  if (is_empty(g.shape)) return done();
  const int64_t size = entries(g.shape);
  const float* f = factors.data;
  const AdamArgs args{size, in_place(g, direction), in_place(m, new_m), in_place(v, new_v),
                      {f[0], f[1], f[2], f[3], f[4], f[5], f[6]}};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size));
}
FQT_KERNEL(adam)

}  // namespace
}  // namespace fqt
