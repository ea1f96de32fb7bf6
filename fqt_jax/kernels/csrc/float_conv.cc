// Handlers of the float convolution of images with few channels.

#include "float_conv.h"

#include <algorithm>

#include "checks.h"
#include "kernel.h"
#include "parallel.h"

namespace fqt {
namespace {

Geometry image_geometry(const Floats& x, ffi::Span<const int64_t> sizes) {
  require(x.shape.size() == 4, "x must have four axes");
  const Geometry g = make_geometry(x.shape[0], sizes);
  require(has_shape(x.shape, {g.n, g.y.in, g.x.in, g.c}), "x has not the shape of its sizes");
  const int64_t rows = (g.y.out - 1) * g.y.stride + g.y.window;
  const int64_t columns = (g.x.out - 1) * g.x.stride + g.x.window;
  // A padded image is held in memory: padding and strides alone make no small operand a large one.
  require(product({rows, columns, std::max<int64_t>(1, g.c)}) < (int64_t{1} << 28),
          "the padded image is too large");
  require(product({g.taps(), g.c, g.o}) < (int64_t{1} << 30), "the weights are too many");
  return g;
}

int64_t conv_threads(const ffi::ThreadPool& pool, const Geometry& g) {
  // A product of floats costs about as much as this many one-bit products.
  constexpr double kProductsOfFloat = 10;
  return useful_threads(pool, kProductsOfFloat * work(g));
}

ffi::Future float_conv(ffi::ThreadPool pool, Floats x, Floats w, FloatsOut y, Sizes sizes) {
  const Geometry g = image_geometry(x, sizes);
  require(has_shape(w.shape, {g.y.window, g.x.window, g.c, g.o}), "w has the wrong shape");
  require(has_shape(y.shape, {g.n, g.y.out, g.x.out, g.o}), "y has the wrong shape");
  if (is_empty(x.shape) || is_empty(w.shape)) return zeros(y);
  const FloatConvArgs args{g, x.data, w.data, to_write(y)};
  return run_job(make_job(current_isa(), args), pool, conv_threads(pool, g));
}
FQT_KERNEL(float_conv)

ffi::Future float_conv_weight_grad(ffi::ThreadPool pool, Floats x, Floats g, FloatsOut dw,
                                   Sizes sizes) {
  const Geometry geometry = image_geometry(x, sizes);
  require(has_shape(g.shape, {geometry.n, geometry.y.out, geometry.x.out, geometry.o}),
          "g has the wrong shape");
  require(has_shape(dw.shape, {geometry.y.window, geometry.x.window, geometry.c, geometry.o}),
          "dw has the wrong shape");
  if (is_empty(x.shape) || is_empty(g.shape)) return zeros(dw);
  const FloatConvWeightGradArgs args{geometry, x.data, g.data, dw.data};
  return run_job(make_job(current_isa(), args), pool, conv_threads(pool, geometry));
}
FQT_KERNEL(float_conv_weight_grad)

}  // namespace
}  // namespace fqt
