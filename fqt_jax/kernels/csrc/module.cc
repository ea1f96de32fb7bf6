// The Python module: XLA FFI handlers, which check what they are given, and the choice of an
// instruction set.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace fqt {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

using Floats = ffi::Buffer<ffi::F32>;
using Words = ffi::Buffer<ffi::U32>;
using Ints = ffi::Buffer<ffi::S32>;
using Dimensions = ffi::AnyBuffer::Dimensions;

// Thrown by the checks below, caught by `guarded`.
struct Invalid {
  std::string message;
};

void require(bool condition, const char* message) {
  if (!condition) throw Invalid{message};
}

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t total = 1;
  for (int64_t factor : factors) {
    require(factor >= 0 && !__builtin_mul_overflow(total, factor, &total), "sizes overflow");
  }
  return total;
}

bool has_shape(Dimensions dimensions, std::initializer_list<int64_t> shape) {
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

Axis make_axis(int64_t in, int64_t window, int64_t stride, int64_t before, int64_t after) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  require(in >= 0 && in < kLimit, "the image's size is out of range");
  require(window >= 1 && window < kLimit, "the window's size is out of range");
  require(stride >= 1 && stride < kLimit, "the stride is out of range");
  require(before >= 0 && before < kLimit && after >= 0 && after < kLimit,
          "the padding is out of range");
  const int64_t padded = in + before + after;
  require(padded >= window, "the window is larger than the padded image");
  return {in, (padded - window) / stride + 1, window, stride, before};
}

// `sizes`: h, w, c, o, window (2), strides (2), padding (top, bottom, left, right).
Geometry make_geometry(int64_t n, ffi::Span<const int64_t> sizes) {
  require(sizes.size() == 12, "sizes must be 12 numbers");
  const int64_t* s = sizes.begin();
  const Geometry geometry{n, s[2], s[3], make_axis(s[0], s[4], s[6], s[8], s[9]),
                          make_axis(s[1], s[5], s[7], s[10], s[11])};
  const int64_t limit = int64_t{1} << 31;
  require(n >= 0 && geometry.c >= 0 && geometry.c < limit && geometry.o >= 0 && geometry.o < limit,
          "the number of channels is out of range");
  require(product({geometry.y.window, geometry.x.window, geometry.c}) < (1 << 24),
          "a sum has too many products");
  // Every offset in bytes that follows fits with room to spare.
  require(product({n, geometry.y.in, geometry.x.in, geometry.c}) < (int64_t{1} << 48) &&
              product({n, geometry.y.out, geometry.x.out, geometry.o}) < (int64_t{1} << 48) &&
              product({geometry.taps(), geometry.c, geometry.o}) < (int64_t{1} << 48),
          "an operand is too large");
  return geometry;
}

int64_t words_for(int64_t bits) { return (bits + 31) / 32; }

Bits sample_bits(const Words& words, const Geometry& g) {
  const int64_t row = words_for(g.y.in * g.x.in * g.c);
  require(has_shape(words.dimensions(), {g.n, row}), "x has not the words of its shape");
  return {words.typed_data(), row};
}

Bits weight_bits(const Words& words, const Geometry& g) {
  const int64_t row = words_for(g.taps() * g.c * g.o);
  require(has_shape(words.dimensions(), {row}), "w has not the words of its shape");
  return {words.typed_data(), row};
}

// No selection keeps everything; its two arrays are then empty.
Kept make_kept(bool is_selected, const Ints& indices, const Floats& weights, int64_t size) {
  require(indices.dimensions().size() == 1 && weights.dimensions().size() == 1 &&
              indices.element_count() == weights.element_count(),
          "indices and weights must be vectors of one length");
  const auto count = static_cast<int64_t>(indices.element_count());
  if (!is_selected) {
    require(count == 0, "indices without a selection");
    return {size, nullptr, nullptr};
  }
  const int32_t* index = indices.typed_data();
  for (int64_t i = 0; i < count; ++i) {
    require(index[i] >= 0 && index[i] < size, "an index of a selection is out of range");
    require(i == 0 || index[i] > index[i - 1], "the indices of a selection must increase");
  }
  return {count, index, weights.typed_data()};
}

Rounding make_rounding(int64_t bits, const Words& seed, const Floats& lo, const Floats& range,
                       int64_t groups) {
  require(bits >= 1 && bits <= 8, "bits must be from 1 to 8");
  require(has_shape(seed.dimensions(), {2}), "seed must be two words");
  require(has_shape(lo.dimensions(), {groups}) && has_shape(range.dimensions(), {groups}),
          "lo and value_range must have one entry for each kept group");
  const uint32_t* s = seed.typed_data();
  return {static_cast<int>(bits), {s[0], s[1]}, lo.typed_data(), range.typed_data()};
}

void require_int32_sums(int64_t terms, int bits) {
  require(product({terms, (1 << bits) - 1}) < (int64_t{1} << 31), "sums of codes exceed int32");
}

// Runs what a check or an allocation may leave by an exception; XLA must see an error instead.
template <typename F>
ffi::Future guarded(F run) {
  ffi::Error error;
  try {
    return run();
  } catch (const Invalid& invalid) {
    error = ffi::Error::InvalidArgument("fqt_jax native kernel: " + invalid.message);
  } catch (const std::exception& e) {
    error = ffi::Error(ffi::ErrorCode::kResourceExhausted, e.what());
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(error);
  return future;
}

ffi::Future forward(ffi::ThreadPool pool, Words x, Words w, ffi::Result<ffi::AnyBuffer> z,
                    ffi::Span<const int64_t> sizes) {
  return guarded([&] {
    require(x.dimensions().size() == 2, "x must be words of samples");
    const Geometry g = make_geometry(x.dimensions()[0], sizes);
    const bool is_wide = g.taps() * g.c > 32767;
    require(z->element_type() == (is_wide ? ffi::S32 : ffi::S16), "z has the wrong type");
    require(has_shape(z->dimensions(), {g.n, g.y.out, g.x.out, g.o}), "z has the wrong shape");
    const int64_t threads = useful_threads(pool, work(g));
    return run_tasks(
        current_kernels().forward({g, sample_bits(x, g), weight_bits(w, g), z->untyped_data(),
                                   is_wide, threads}),
        pool, threads);
  });
}

ffi::Future input_grad(ffi::ThreadPool pool, Floats g, Words w, Floats lo, Floats range, Words seed,
                       Ints sample_indices, Floats sample_weights, ffi::Result<Floats> dx,
                       ffi::Span<const int64_t> sizes, int64_t bits, bool selects_samples) {
  return guarded([&] {
    require(g.dimensions().size() == 4, "g must have four axes");
    const Geometry geometry = make_geometry(g.dimensions()[0], sizes);
    require(has_shape(g.dimensions(),
                      {geometry.n, geometry.y.out, geometry.x.out, geometry.o}),
            "g has the wrong shape");
    require(has_shape(dx->dimensions(), {geometry.n, geometry.y.in, geometry.x.in, geometry.c}),
            "dx has the wrong shape");
    const Kept samples =
        make_kept(selects_samples, sample_indices, sample_weights, geometry.n);
    const Rounding rounding = make_rounding(bits, seed, lo, range, samples.count);
    require_int32_sums(product({geometry.taps(), geometry.o}), rounding.bits);
    const int64_t threads = useful_threads(pool, work(geometry));
    return run_tasks(current_kernels().input_grad({geometry, g.typed_data(),
                                                   weight_bits(w, geometry), samples, rounding,
                                                   dx->typed_data(), threads}),
                     pool, threads);
  });
}

ffi::Future weight_grad(ffi::ThreadPool pool, Floats g, Words x, Floats lo, Floats range,
                        Words seed, Ints sample_indices, Floats sample_weights,
                        Ints channel_indices, Floats channel_weights, ffi::Result<Floats> dw,
                        ffi::Span<const int64_t> sizes, int64_t bits, bool selects_samples,
                        bool selects_channels) {
  return guarded([&] {
    require(g.dimensions().size() == 4, "g must have four axes");
    const Geometry geometry = make_geometry(g.dimensions()[0], sizes);
    require(has_shape(g.dimensions(),
                      {geometry.n, geometry.y.out, geometry.x.out, geometry.o}),
            "g has the wrong shape");
    require(has_shape(dw->dimensions(),
                      {geometry.y.window, geometry.x.window, geometry.c, geometry.o}),
            "dw has the wrong shape");
    const Kept samples =
        make_kept(selects_samples, sample_indices, sample_weights, geometry.n);
    const Kept channels =
        make_kept(selects_channels, channel_indices, channel_weights, geometry.o);
    const Rounding rounding = make_rounding(bits, seed, lo, range, channels.count);
    require_int32_sums(product({samples.count, geometry.y.out, geometry.x.out}), rounding.bits);
    const int64_t threads = useful_threads(pool, work(geometry));
    return run_tasks(current_kernels().weight_grad({geometry, g.typed_data(),
                                                    sample_bits(x, geometry), samples, channels,
                                                    rounding, dw->typed_data(), threads}),
                     pool, threads);
  });
}

XLA_FFI_DEFINE_HANDLER(kForward, forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Words>()
                           .Arg<Words>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<ffi::Span<const int64_t>>("sizes"));

XLA_FFI_DEFINE_HANDLER(kInputGrad, input_grad,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Floats>()
                           .Arg<Words>()
                           .Arg<Floats>()
                           .Arg<Floats>()
                           .Arg<Words>()
                           .Arg<Ints>()
                           .Arg<Floats>()
                           .Ret<Floats>()
                           .Attr<ffi::Span<const int64_t>>("sizes")
                           .Attr<int64_t>("bits")
                           .Attr<bool>("selects_samples"));

XLA_FFI_DEFINE_HANDLER(kWeightGrad, weight_grad,
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

NB_MODULE(_native, m) {
  m.def("registrations", [] {
    nb::dict registrations;
    registrations["fqt_jax_forward"] = nb::capsule(reinterpret_cast<void*>(kForward));
    registrations["fqt_jax_input_grad"] = nb::capsule(reinterpret_cast<void*>(kInputGrad));
    registrations["fqt_jax_weight_grad"] = nb::capsule(reinterpret_cast<void*>(kWeightGrad));
    return registrations;
  });
  m.def("supported_isas", [] {
    nb::list names;
    for (const Kernels* kernels : supported_kernels()) names.append(kernels->isa);
    return names;
  });
  m.def("current_isa", [] { return std::string(current_kernels().isa); });
  m.def("select_isa", [](const std::string& isa) {
    if (!select_kernels(isa)) {
      throw nb::value_error(("this machine does not run the instruction set '" + isa + "'").c_str());
    }
  });
}

}  // namespace
}  // namespace fqt
