// XLA's handlers of the integer products.

#include "checks.h"
#include "handlers.h"

namespace fqt {
namespace {

ffi::Future forward(ffi::ThreadPool pool, Words x, Words w, ffi::Result<ffi::AnyBuffer> z,
                    ffi::Span<const int64_t> sizes) {
  return guarded([&] {
    require(x.dimensions().size() == 2, "x must be words of samples");
    const Geometry g = make_geometry(x.dimensions()[0], sizes);
    const bool is_wide = g.taps() * g.c > 32767;
    require(z->element_type() == (is_wide ? ffi::S32 : ffi::S16), "z has the wrong type");
    require(has_shape(z->dimensions(), {g.n, g.y.out, g.x.out, g.o}), "z has the wrong shape");
    const Bits x_bits = sample_bits(x, g), w_bits = weight_bits(w, g);
    if (is_empty(z->dimensions()) || g.c == 0) return zeros(z);
    ask_for_huge_pages(z->untyped_data(), z->size_bytes());
    const int64_t threads = useful_threads(pool, work(g));
    return run_tasks(current_kernels().forward({g, x_bits, w_bits, z->untyped_data(), is_wide,
                                                threads}),
                     pool, threads);
  });
}

Geometry gradient_geometry(const Floats& g, ffi::Span<const int64_t> sizes) {
  require(g.dimensions().size() == 4, "g must have four axes");
  const Geometry geometry = make_geometry(g.dimensions()[0], sizes);
  require(has_shape(g.dimensions(), {geometry.n, geometry.y.out, geometry.x.out, geometry.o}),
          "g has the wrong shape");
  return geometry;
}

ffi::Future input_grad(ffi::ThreadPool pool, Floats g, Words w, Floats lo, Floats range, Words seed,
                       Ints sample_indices, Floats sample_weights, Words mask,
                       ffi::Result<Floats> dx, ffi::Span<const int64_t> sizes, int64_t bits,
                       bool selects_samples, bool has_mask, bool scatters) {
  return guarded([&] {
    const Geometry geometry = gradient_geometry(g, sizes);
    const Kept samples =
        make_kept(selects_samples, sample_indices, sample_weights, geometry.n);
    require(has_shape(dx->dimensions(), {scatters ? geometry.n : samples.count, geometry.y.in,
                                         geometry.x.in, geometry.c}),
            "dx has the wrong shape");
    const Bits w_bits = weight_bits(w, geometry);
    require(has_mask || has_shape(mask.dimensions(), {0, 0}), "a mask without has_mask");
    const Bits mask_bits = has_mask ? sample_bits(mask, geometry) : Bits{nullptr, 0};
    const Rounding rounding = make_rounding(bits, seed, lo, range, samples.count);
    require_int32_sums(product({geometry.taps(), geometry.o}), rounding.bits);
    if (is_empty(dx->dimensions()) || geometry.o == 0) return zeros(dx);
    const int64_t threads = useful_threads(pool, work(geometry));
    return run_tasks(current_kernels().input_grad({geometry, g.typed_data(), w_bits, samples,
                                                   rounding, mask_bits, scatters, to_write(dx),
                                                   threads}),
                     pool, threads);
  });
}

ffi::Future weight_grad(ffi::ThreadPool pool, Floats g, Words x, Floats lo, Floats range,
                        Words seed, Ints sample_indices, Floats sample_weights,
                        Ints channel_indices, Floats channel_weights, ffi::Result<Floats> dw,
                        ffi::Span<const int64_t> sizes, int64_t bits, bool selects_samples,
                        bool selects_channels) {
  return guarded([&] {
    const Geometry geometry = gradient_geometry(g, sizes);
    require(has_shape(dw->dimensions(),
                      {geometry.y.window, geometry.x.window, geometry.c, geometry.o}),
            "dw has the wrong shape");
    const Kept samples =
        make_kept(selects_samples, sample_indices, sample_weights, geometry.n);
    const Kept channels =
        make_kept(selects_channels, channel_indices, channel_weights, geometry.o);
    const Rounding rounding = make_rounding(bits, seed, lo, range, channels.count);
    require_int32_sums(product({samples.count, geometry.y.out, geometry.x.out}), rounding.bits);
    const Bits x_bits = sample_bits(x, geometry);
    if (is_empty(dw->dimensions())) return zeros(dw);
    const int64_t threads = useful_threads(pool, work(geometry));
    return run_tasks(current_kernels().weight_grad({geometry, g.typed_data(), x_bits, samples,
                                                    channels, rounding, to_write(dw), threads}),
                     pool, threads);
  });
}

}  // namespace
}  // namespace fqt

using namespace fqt;

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtForward, forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Words>()
                           .Arg<Words>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<ffi::Span<const int64_t>>("sizes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtInputGrad, input_grad,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Floats>()
                           .Arg<Words>()
                           .Arg<Floats>()
                           .Arg<Floats>()
                           .Arg<Words>()
                           .Arg<Ints>()
                           .Arg<Floats>()
                           .Arg<Words>()
                           .Ret<Floats>()
                           .Attr<ffi::Span<const int64_t>>("sizes")
                           .Attr<int64_t>("bits")
                           .Attr<bool>("selects_samples")
                           .Attr<bool>("has_mask")
                           .Attr<bool>("scatters"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtWeightGrad, weight_grad,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Floats>()
                           .Arg<Words>()
                           .Arg<Floats>()
                           .Arg<Floats>()
                           .Arg<Words>()
                           .Arg<Ints>()
                           .Arg<Floats>()
                           .Arg<Ints>()
                           .Arg<Floats>()
                           .Ret<Floats>()
                           .Attr<ffi::Span<const int64_t>>("sizes")
                           .Attr<int64_t>("bits")
                           .Attr<bool>("selects_samples")
                           .Attr<bool>("selects_channels"));
