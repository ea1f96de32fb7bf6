// XLA's handlers of the float convolution of images with few channels.

#include "checks.h"
#include "handlers.h"

namespace fqt {
namespace {

// A product of floats costs about as much as this many one-bit products.
constexpr double kProductsOfFloat = 10;

Geometry image_geometry(const Floats& x, ffi::Span<const int64_t> sizes) {
  const Dimensions d = x.dimensions();
  require(d.size() == 4, "x must have four axes");
  const Geometry g = make_geometry(d[0], sizes);
  require(has_shape(d, {g.n, g.y.in, g.x.in, g.c}), "x has not the shape of its sizes");
  const int64_t rows = (g.y.out - 1) * g.y.stride + g.y.window;
  const int64_t columns = (g.x.out - 1) * g.x.stride + g.x.window;
  // A padded image is held in memory: padding and strides alone make no small operand a large one.
  require(product({rows, columns, std::max<int64_t>(1, g.c)}) < (int64_t{1} << 28),
          "the padded image is too large");
  require(product({g.taps(), g.c, g.o}) < (int64_t{1} << 30), "the weights are too many");
  return g;
}

int64_t conv_threads(const ffi::ThreadPool& pool, const Geometry& g) {
  return useful_threads(pool, kProductsOfFloat * work(g));
}

ffi::Future float_conv(ffi::ThreadPool pool, Floats x, Floats w, ffi::Result<Floats> y,
                       ffi::Span<const int64_t> sizes) {
  return guarded([&] {
    const Geometry g = image_geometry(x, sizes);
    require(has_shape(w.dimensions(), {g.y.window, g.x.window, g.c, g.o}), "w has the wrong shape");
    require(has_shape(y->dimensions(), {g.n, g.y.out, g.x.out, g.o}), "y has the wrong shape");
    if (is_empty(x.dimensions()) || is_empty(w.dimensions())) return zeros(y);
    return run_tasks(current_kernels().float_conv({g, x.typed_data(), w.typed_data(),
                                                   to_write(y)}),
                     pool, conv_threads(pool, g));
  });
}

ffi::Future float_conv_weight_grad(ffi::ThreadPool pool, Floats x, Floats g, ffi::Result<Floats> dw,
                                   ffi::Span<const int64_t> sizes) {
  return guarded([&] {
    const Geometry geometry = image_geometry(x, sizes);
    require(has_shape(g.dimensions(), {geometry.n, geometry.y.out, geometry.x.out, geometry.o}),
            "g has the wrong shape");
    require(has_shape(dw->dimensions(),
                      {geometry.y.window, geometry.x.window, geometry.c, geometry.o}),
            "dw has the wrong shape");
    if (is_empty(x.dimensions()) || is_empty(g.dimensions())) return zeros(dw);
    return run_tasks(current_kernels().float_conv_weight_grad({geometry, x.typed_data(),
                                                               g.typed_data(), dw->typed_data()}),
                     pool, conv_threads(pool, geometry));
  });
}

}  // namespace
}  // namespace fqt

using namespace fqt;

// Two operands, one result, and the sizes.
static auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Ret<Floats>()
      .Attr<ffi::Span<const int64_t>>("sizes");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtFloatConv, float_conv, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtFloatConvWeightGrad, float_conv_weight_grad, binding());
