// XLA's handler of the optimizer's kernel.

#include "checks.h"
#include "handlers.h"

namespace fqt {
namespace {

ffi::Future adam(ffi::ThreadPool pool, Floats g, Floats m, Floats v, Floats factors,
                 ffi::Result<Floats> direction, ffi::Result<Floats> new_m,
                 ffi::Result<Floats> new_v) {
  return guarded([&] {
    for (const Floats& other : {m, v, *direction, *new_m, *new_v}) {
      require(has_shape(other.dimensions(), g.dimensions()),
              "gradient, moments and results must have the same shape");
    }
    require(has_shape(factors.dimensions(), {7}), "factors must be 7 numbers");
    if (is_empty(g.dimensions())) return done();
    const auto size = static_cast<int64_t>(g.element_count());
    const float* f = factors.typed_data();
    return run_tasks(current_kernels().adam({size, in_place(g, direction), in_place(m, new_m),
                                             in_place(v, new_v),
                                             {f[0], f[1], f[2], f[3], f[4], f[5], f[6]}}),
                     pool, pass_threads(pool, size));
  });
}

}  // namespace
}  // namespace fqt

using namespace fqt;

XLA_FFI_DEFINE_HANDLER_SYMBOL(FqtAdam, adam,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
