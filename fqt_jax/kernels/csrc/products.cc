// Handlers of the integer products.

#include "products.h"

#include <cstring>

#include "checks.h"
#include "kernel.h"
#include "parallel.h"

namespace fqt {
namespace {

constexpr double kFloatProduct = 8;  // about so many one-bit products take as long

ffi::Future forward(ffi::ThreadPool pool, Words x, Words w, ffi::Result<ffi::AnyBuffer> z,
                    Sizes sizes) {
  require(x.shape.size() == 2, "x must be words of samples");
  const Geometry g = make_geometry(x.shape[0], sizes);
  const bool is_wide = g.taps() * g.c > 32767;
  require(z->element_type() == (is_wide ? ffi::S32 : ffi::S16), "z has the wrong type");
  require(has_shape(z->dimensions(), {g.n, g.y.out, g.x.out, g.o}), "z has the wrong shape");
  const Bits x_bits = sample_bits(x, g), w_bits = weight_bits(w, g);
  if (is_empty(z->dimensions()) || g.c == 0) {
    std::memset(z->untyped_data(), 0, z->size_bytes());
    return done();
  }
  ask_for_huge_pages(z->untyped_data(), z->size_bytes());
  const int64_t threads = useful_threads(pool, work(g));
  const ForwardArgs args{g, x_bits, w_bits, z->untyped_data(), is_wide, threads};
  return run_job(make_job(current_isa(), args), pool, threads);
}
FQT_KERNEL(forward)

Geometry gradient_geometry(const Floats& g, ffi::Span<const int64_t> sizes) {
  require(g.shape.size() == 4, "g must have four axes");
  const Geometry geometry = make_geometry(g.shape[0], sizes);
  require(has_shape(g.shape, {geometry.n, geometry.y.out, geometry.x.out, geometry.o}),
          "g has the wrong shape");
  return geometry;
}

ffi::Future input_grad(ffi::ThreadPool pool, Floats g, Words w, Floats lo, Floats range, Words seed,
                       Ints sample_indices, Floats sample_weights, Words mask, FloatsOut dx,
                       Sizes sizes, CodeBits bits, SelectsSamples selects_samples, HasMask has_mask,
                       Scatters scatters) {
  const Geometry geometry = gradient_geometry(g, sizes);
  const Kept samples = make_kept(selects_samples, sample_indices, sample_weights, geometry.n);
  const int64_t rows = scatters ? geometry.n : samples.count;
  require(has_shape(dx.shape, {rows, geometry.y.in, geometry.x.in, geometry.c}),
          "dx has the wrong shape");
  const Bits w_bits = weight_bits(w, geometry);
  require(has_mask || has_shape(mask.shape, {0, 0}), "a mask without has_mask");
  const Bits mask_bits = has_mask ? sample_bits(mask, geometry) : Bits{nullptr, 0};
  const Rounding rounding = make_rounding(bits, seed, lo, range, samples.count);
  require_int32_sums(product({geometry.taps(), geometry.o}), rounding.bits);
  if (is_empty(dx.shape) || geometry.o == 0) return zeros(dx);
  const int64_t threads = useful_threads(pool, work(geometry));
  const InputGradArgs args{geometry,  g.data,   w_bits,       samples, rounding,
                           mask_bits, scatters, to_write(dx), threads};
  return run_job(make_job(current_isa(), args), pool, threads);
}
FQT_KERNEL(input_grad)

ffi::Future weight_grad(ffi::ThreadPool pool, Floats g, Words x, Floats lo, Floats range,
                        Words seed, Ints sample_indices, Floats sample_weights,
                        Ints channel_indices, Floats channel_weights, FloatsOut dw, Sizes sizes,
                        CodeBits bits, SelectsSamples selects_samples,
                        SelectsChannels selects_channels) {
  const Geometry geometry = gradient_geometry(g, sizes);
  require(has_shape(dw.shape, {geometry.y.window, geometry.x.window, geometry.c, geometry.o}),
          "dw has the wrong shape");
  const Kept samples = make_kept(selects_samples, sample_indices, sample_weights, geometry.n);
  const Kept channels = make_kept(selects_channels, channel_indices, channel_weights, geometry.o);
  const Rounding rounding = make_rounding(bits, seed, lo, range, channels.count);
  require_int32_sums(product({samples.count, geometry.y.out, geometry.x.out}), rounding.bits);
  const Bits x_bits = sample_bits(x, geometry);
  if (is_empty(dw.shape)) return done();
  const int64_t threads = useful_threads(pool, work(geometry));
  const WeightGradArgs args{geometry, g.data,   x_bits,       samples,
                            channels, rounding, to_write(dw), threads};
  return run_job(make_job(current_isa(), args), pool, threads);
}
FQT_KERNEL(weight_grad)

ffi::Future float_input_grad(ffi::ThreadPool pool, Floats g, Words w, Words mask, FloatsOut dx,
                             Sizes sizes, HasMask has_mask) {
  const Geometry geometry = gradient_geometry(g, sizes);
  require(has_shape(dx.shape, {geometry.n, geometry.y.in, geometry.x.in, geometry.c}),
          "dx has the wrong shape");
  const Bits w_bits = weight_bits(w, geometry);
  require(has_mask || has_shape(mask.shape, {0, 0}), "a mask without has_mask");
  const Bits mask_bits = has_mask ? sample_bits(mask, geometry) : Bits{nullptr, 0};
  if (is_empty(dx.shape) || geometry.o == 0 || is_empty(g.shape)) return zeros(dx);
  require_small({64, geometry.y.out + 2 * geometry.y.window, geometry.x.out + 2 * geometry.x.window,
                 geometry.o},
                "the padded gradient is too large");
  const int64_t threads = useful_threads(pool, kFloatProduct * work(geometry));
  const FloatInputGradArgs args{geometry, g.data, w_bits, mask_bits, to_write(dx)};
  return run_job(make_job(current_isa(), args), pool, threads);
}
FQT_KERNEL(float_input_grad)

ffi::Future float_weight_grad(ffi::ThreadPool pool, Floats g, Words x, Floats lo, Floats range,
                              Words seed, Ints sample_indices, Floats sample_weights, FloatsOut dw,
                              Sizes sizes, CodeBits bits, SelectsSamples selects_samples) {
  const Geometry geometry = gradient_geometry(g, sizes);
  require(has_shape(dw.shape, {geometry.y.window, geometry.x.window, geometry.c, geometry.o}),
          "dw has the wrong shape");
  const Kept samples = make_kept(selects_samples, sample_indices, sample_weights, geometry.n);
  // Bits of zero: g is not rounded.
  require(bits != 0 || (has_shape(lo.shape, {0}) && has_shape(range.shape, {0})),
          "a rounding without bits");
  const Rounding rounding =
      bits == 0 ? Rounding{} : make_rounding(bits, seed, lo, range, samples.count);
  const Bits x_bits = sample_bits(x, geometry);
  if (is_empty(dw.shape) || is_empty(g.shape)) return zeros(dw);
  const int64_t threads = useful_threads(pool, kFloatProduct * work(geometry));
  const FloatWeightGradArgs args{geometry, g.data, x_bits, samples, bits != 0, rounding, to_write(dw)};
  return run_job(make_job(current_isa(), args), pool, threads);
}
FQT_KERNEL(float_weight_grad)

}  // namespace
}  // namespace fqt
