// Handlers of what stands between two products.

#include "transforms.h"

#include "checks.h"
#include "kernel.h"
#include "parallel.h"

namespace fqt {
namespace {

constexpr int64_t kForwardRows = 6, kBackwardRows = 12;  // of coefficients; see transforms.h

int64_t size_of(const Shape& s) { return s.n * s.h * s.w * s.c; }

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
  require(has_shape(coefficients.shape, {rows, shape.c}),
          "the coefficients have the wrong shape");
  require(pool >= 1 && pool <= shape.h && pool <= shape.w, "pool is out of range");
  return {shape, s.untyped_data(), source_type(s), coefficients.data, pool};
}

bool is_pooled(Dimensions dimensions, const TransformArgs& t, int64_t samples) {
  return has_shape(dimensions, {samples, t.shape.h / t.pool, t.shape.w / t.pool, t.shape.c});
}

// A number for each sample, or null for none.
const float* of_samples(const Floats& values, const Shape& shape, const char* message) {
  if (has_shape(values.shape, {0})) return nullptr;
  require(has_shape(values.shape, {shape.n}), message);
  return values.data;
}

const float* sample_weights(const Floats& weights, const Shape& shape) {
  return of_samples(weights, shape, "weights must have one for each sample");
}

// The bounds of a gradient: null where there is one position, whose bounds it is itself.
struct Bounds {
  float *lo, *hi;
};

Bounds make_bounds(const FloatsOut& lo, const FloatsOut& hi, const Shape& shape) {
  const bool has_one = shape.h == 1 && shape.w == 1;
  const int64_t rows = has_one ? 0 : shape.n;
  require(has_shape(lo.shape, {rows, shape.c}) && has_shape(hi.shape, {rows, shape.c}),
          "the bounds have the wrong shape");
  return has_one ? Bounds{nullptr, nullptr} : Bounds{lo.data, hi.data};
}

ffi::Future moments(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats thresholds, Floats weights,
                    FloatsOut out) {
  const Shape shape = source_shape(s);
  const MomentsArgs args{shape,           s.untyped_data(),               source_type(s),
                         thresholds.data, sample_weights(weights, shape), out.data};
  require(has_shape(thresholds.shape, {2, shape.c}), "thresholds have the wrong shape");
  require(has_shape(out.shape, {6, shape.c}), "moments have the wrong shape");
  if (is_empty(s.dimensions())) return zeros(out);
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size_of(shape)));
}
FQT_KERNEL(moments)

ffi::Future encode(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients, WordsOut signs,
                   WordsOut clip, FloatsOut nan, Pool window) {
  const TransformArgs t = make_transform(s, coefficients, kForwardRows, window);
  const Shape& shape = t.shape;
  const int64_t words = words_for((shape.h / t.pool) * (shape.w / t.pool) * shape.c);
  require(has_shape(signs.shape, {shape.n, words}) && has_shape(clip.shape, {shape.n, words}),
          "the words have the wrong shape");
  require(has_shape(nan.shape, {shape.n}), "nan has the wrong shape");
  if (is_empty(s.dimensions())) return zeros(nan);
  const EncodeArgs args{t, to_write(signs), to_write(clip), words, nan.data};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size_of(shape)));
}
FQT_KERNEL(encode)

ffi::Future activate(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients, Floats offsets,
                     Floats added, FloatsOut out, Pool window) {
  const TransformArgs t = make_transform(s, coefficients, kForwardRows, window);
  const int64_t n = t.shape.n;
  require(is_pooled(out.shape, t, n), "the output has the wrong shape");
  const float* of_sample = of_samples(offsets, t.shape, "offsets must have one for each sample");
  const bool adds = !has_shape(added.shape, {0});
  require(!adds || is_pooled(added.shape, t, n), "what is added has the wrong shape");
  if (is_empty(s.dimensions())) return done();
  const ActivateArgs args{t, of_sample, adds ? added.data : nullptr, to_write(out)};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size_of(t.shape)));
}
FQT_KERNEL(activate)

ffi::Future gradient_sums(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients, Floats d,
                          Ints indices, FloatsOut sums, Pool window,
                          SelectsSamples selects_samples) {
  const TransformArgs t = make_transform(s, coefficients, kForwardRows, window);
  const Kept samples = make_indices(selects_samples, indices, t.shape.n);
  require(is_pooled(d.shape, t, samples.count), "the gradient has the wrong shape");
  require(has_shape(sums.shape, {4, t.shape.c}), "the sums have the wrong shape");
  if (is_empty(d.shape)) return zeros(sums);
  const GradientSumsArgs args{t, d.data, samples, sums.data};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size_of(t.shape)));
}
FQT_KERNEL(gradient_sums)

ffi::Future gradient(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats coefficients, Floats d,
                     Ints indices, Floats weights, FloatsOut g, FloatsOut lo, FloatsOut hi,
                     Pool window, SelectsSamples selects_samples) {
  const TransformArgs t = make_transform(s, coefficients, kBackwardRows, window);
  const Shape& shape = t.shape;
  const Kept samples = make_indices(selects_samples, indices, shape.n);
  require(is_pooled(d.shape, t, samples.count), "the gradient has the wrong shape");
  require(has_shape(g.shape, s.dimensions()), "g has the wrong shape");
  const auto [least, most] = make_bounds(lo, hi, shape);
  const float* of_sample = sample_weights(weights, shape);
  if (is_empty(s.dimensions())) return done();
  const GradientArgs args{t, d.data, samples, of_sample, to_write(g), least, most};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size_of(shape)));
}
FQT_KERNEL(gradient)

NormedArgs make_normed(const ffi::AnyBuffer& s, const Floats& before, const Floats& after,
                       float epsilon) {
  const Shape shape = source_shape(s);
  require(has_shape(before.shape, {kForwardRows, shape.c}) &&
              has_shape(after.shape, {kForwardRows, shape.c}),
          "the coefficients have the wrong shape");
  require(epsilon >= 0.0f, "epsilon must not be negative");
  return {shape, s.untyped_data(), source_type(s), before.data, after.data, epsilon};
}

ffi::Future encode_normed(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats before, Floats after,
                          WordsOut signs, WordsOut clip, FloatsOut nan, Epsilon epsilon) {
  const NormedArgs normed = make_normed(s, before, after, epsilon);
  const Shape& shape = normed.shape;
  const int64_t words = words_for(shape.h * shape.w * shape.c);
  require(has_shape(signs.shape, {shape.n, words}) && has_shape(clip.shape, {shape.n, words}),
          "the words have the wrong shape");
  require(has_shape(nan.shape, {shape.n}), "nan has the wrong shape");
  if (is_empty(s.dimensions())) return zeros(nan);
  const EncodeNormedArgs args{normed, to_write(signs), to_write(clip), words, nan.data};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size_of(shape)));
}
FQT_KERNEL(encode_normed)

ffi::Future gradient_normed(ffi::ThreadPool pool, ffi::AnyBuffer s, Floats before, Floats after,
                            Floats d, Ints indices, FloatsOut g, FloatsOut lo, FloatsOut hi,
                            FloatsOut sums, Epsilon epsilon, SelectsSamples selects_samples) {
  const NormedArgs normed = make_normed(s, before, after, epsilon);
  const Shape& shape = normed.shape;
  const Kept samples = make_indices(selects_samples, indices, shape.n);
  require(has_shape(d.shape, {samples.count, shape.h, shape.w, shape.c}),
          "the gradient has the wrong shape");
  require(has_shape(g.shape, s.dimensions()), "g has the wrong shape");
  require(has_shape(sums.shape, {8, shape.c}), "the sums have the wrong shape");
  const auto [least, most] = make_bounds(lo, hi, shape);
  if (is_empty(s.dimensions())) return zeros(sums);
  const GradientNormedArgs args{normed, d.data, samples, to_write(g), least, most, sums.data};
  return run_job(make_job(current_isa(), args), pool, pass_threads(pool, size_of(shape)));
}
FQT_KERNEL(gradient_normed)

}  // namespace
}  // namespace fqt
