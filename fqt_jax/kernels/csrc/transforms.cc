// XLA's handlers of what stands between two products.

#include "checks.h"
#include "handlers.h"

namespace fqt {
namespace {

constexpr int64_t kForwardRows = 6, kBackwardRows = 12;  // of coefficients; see product.h

int64_t entries(const Shape& s) { return s.n * s.h * s.w * s.c; }

Shape source_shape(const ffi::AnyBuffer& s) {
  const Dimensions d = s.dimensions();
  require(d.size() == 4, "the source must have four axes");
  require_small({d[0], d[1], d[2], d[3]}, "the source is too large");
  return {d[0], d[1], d[2], d[3]};
}

SourceType source_type(const ffi::AnyBuffer& s) {
  switch (s.element_type()) {
    case ffi::S16: return SourceType::kInt16;
    case ffi::S32: return SourceType::kInt32;
    case ffi::F32: return SourceType::kFloat32;
    default: throw Invalid{"the source must be int16, int32 or float32"};
  }
}

TransformArgs make_transform(const ffi::AnyBuffer& s, const Floats& coefficients, int64_t rows,
                             int64_t pool) {
  const Shape shape = source_shape(s);
  require(has_shape(coefficients.dimensions(), {rows, shape.c}),
          "the coefficients have the wrong shape");
  require(pool >= 1 && pool <= shape.h && pool <= shape.w, "pool is out of range");
  return {shape, s.untyped_data(), source_type(s), coefficients.typed_data(), pool};
}

void require_pooled(Dimensions dimensions, const TransformArgs& t, int64_t samples,
                    const char* message) {
  require(has_shape(dimensions, {samples, t.shape.h / t.pool, t.shape.w / t.pool, t.shape.c}),
          message);
}

// A number for each sample, or null for none.
const float* of_samples(const Floats& values, const Shape& shape, const char* message) {
  if (has_shape(values.dimensions(), {0})) return nullptr;
  require(has_shape(values.dimensions(), {shape.n}), message);
  return values.typed_data();
}

const float* sample_weights(const Floats& weights, const Shape& shape) {
  return of_samples(weights, shape, "weights must have one for each sample");
}

ffi::Future moments(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats thresholds, Floats weights,
                    ffi::Result<Floats> out) {
  return guarded([&] {
    const Shape shape = source_shape(s);
    const SourceType type = source_type(s);
    const float* of_sample = sample_weights(weights, shape);
    require(has_shape(thresholds.dimensions(), {2, shape.c}), "thresholds have the wrong shape");
    require(has_shape(out->dimensions(), {6, shape.c}), "moments have the wrong shape");
    if (is_empty(s.dimensions())) return zeros(out);
    return run_tasks(current_kernels().moments({shape, s.untyped_data(), type,
                                                thresholds.typed_data(), of_sample,
                                                out->typed_data()}),
                     pool, pass_threads(pool, entries(shape)));
  });
}

ffi::Future encode(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients,
                   ffi::Result<Words> signs, ffi::Result<Words> clip, ffi::Result<Floats> nan,
                   int64_t window) {
  return guarded([&] {
    const TransformArgs t = make_transform(s, coefficients, kForwardRows, window);
    const Shape& shape = t.shape;
    const int64_t words = words_for((shape.h / window) * (shape.w / window) * shape.c);
    require(has_shape(signs->dimensions(), {shape.n, words}) &&
                has_shape(clip->dimensions(), {shape.n, words}),
            "the words have the wrong shape");
    require(has_shape(nan->dimensions(), {shape.n}), "nan has the wrong shape");
    if (is_empty(s.dimensions())) return zeros(nan);
    return run_tasks(current_kernels().encode({t, to_write(signs), to_write(clip), words,
                                               nan->typed_data()}),
                     pool, pass_threads(pool, entries(shape)));
  });
}

constexpr char kOffsets[] = "offsets must have one for each sample";

ffi::Future activate(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients, Floats offsets,
                     Floats added, ffi::Result<Floats> out, int64_t window) {
  return guarded([&] {
    const TransformArgs t = make_transform(s, coefficients, kForwardRows, window);
    require_pooled(out->dimensions(), t, t.shape.n, "the output has the wrong shape");
    const float* of_sample = of_samples(offsets, t.shape, kOffsets);
    const bool adds = !has_shape(added.dimensions(), {0});
    if (adds) require_pooled(added.dimensions(), t, t.shape.n, "what is added has the wrong shape");
    if (is_empty(s.dimensions())) return done();
    return run_tasks(current_kernels().activate({t, of_sample, adds ? added.typed_data() : nullptr,
                                                 to_write(out)}),
                     pool, pass_threads(pool, entries(t.shape)));
  });
}

ffi::Future gradient_sums(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients, Floats d,
                          Ints indices, ffi::Result<Floats> sums, int64_t window,
                          bool selects_samples) {
  return guarded([&] {
    const TransformArgs t = make_transform(s, coefficients, kForwardRows, window);
    const Kept samples = make_indices(selects_samples, indices, t.shape.n);
    require_pooled(d.dimensions(), t, samples.count, "the gradient has the wrong shape");
    require(has_shape(sums->dimensions(), {4, t.shape.c}), "the sums have the wrong shape");
    if (is_empty(d.dimensions())) return zeros(sums);
    return run_tasks(current_kernels().gradient_sums({t, d.typed_data(), samples,
                                                      sums->typed_data()}),
                     pool, pass_threads(pool, entries(t.shape)));
  });
}

ffi::Future gradient(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients, Floats d,
                     Ints indices, Floats weights, ffi::Result<Floats> g, ffi::Result<Floats> lo,
                     ffi::Result<Floats> hi, int64_t window, bool selects_samples) {
  return guarded([&] {
    const TransformArgs t = make_transform(s, coefficients, kBackwardRows, window);
    const Shape& shape = t.shape;
    const Kept samples = make_indices(selects_samples, indices, shape.n);
    require_pooled(d.dimensions(), t, samples.count, "the gradient has the wrong shape");
    require(has_shape(g->dimensions(), {shape.n, shape.h, shape.w, shape.c}),
            "g has the wrong shape");
    require(has_shape(lo->dimensions(), {shape.n, shape.c}) &&
                has_shape(hi->dimensions(), {shape.n, shape.c}),
            "the bounds have the wrong shape");
    const float* of_sample = sample_weights(weights, shape);
    if (is_empty(s.dimensions())) return done();
    return run_tasks(current_kernels().gradient({t, d.typed_data(), samples, of_sample,
                                                 to_write(g), lo->typed_data(),
                                                 hi->typed_data()}),
                     pool, pass_threads(pool, entries(shape)));
  });
}

ffi::Future encode_weights(ffi::ThreadPool pool, Floats w, ffi::Result<Words> signs,
                           ffi::Result<Floats> scale) {
  return guarded([&] {
    const Dimensions d = w.dimensions();
    require(d.size() == 2, "w must be a matrix");
    require(has_shape(signs->dimensions(), {words_for(product({d[0], d[1]}))}),
            "the words have the wrong shape");
    require(has_shape(scale->dimensions(), {d[1]}), "the scale has the wrong shape");
    if (is_empty(d)) return zeros(scale);
    return run_tasks(current_kernels().encode_weights({w.typed_data(), d[0], d[1],
                                                       signs->typed_data(), scale->typed_data()}),
                     pool, pass_threads(pool, d[0] * d[1]));
  });
}

ffi::Future finish_weight_grad(ffi::ThreadPool pool, Floats dw, Floats w, Floats d_scale,
                               ffi::Result<Floats> out, bool clips) {
  return guarded([&] {
    require(w.dimensions().size() > 0, "w must have an axis of output channels");
    require(has_shape(dw.dimensions(), w.dimensions()) &&
                has_shape(out->dimensions(), w.dimensions()),
            "the gradient has not the shape of w");
    const int64_t o = w.dimensions().back();
    require(has_shape(d_scale.dimensions(), {o}), "the scale's gradient has the wrong shape");
    if (is_empty(w.dimensions())) return done();
    const auto size = static_cast<int64_t>(w.element_count());
    return run_tasks(current_kernels().finish_weight_grad({w.typed_data(), d_scale.typed_data(),
                                                           size / o, o, clips, in_place(dw, out)}),
                     pool, pass_threads(pool, size));
  });
}

}  // namespace
}  // namespace fqt

using namespace fqt;

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtMoments, moments,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtEncode, encode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Ret<Words>()
                                  .Ret<Words>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("pool"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtActivate, activate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("pool"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtGradientSums, gradient_sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("pool")
                                  .Attr<bool>("selects_samples"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtGradient, gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("pool")
                                  .Attr<bool>("selects_samples"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtEncodeWeights, encode_weights,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Ret<Words>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtFinishWeightGrad, finish_weight_grad,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<bool>("clips"));
