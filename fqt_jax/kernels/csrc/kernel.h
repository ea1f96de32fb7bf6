// How a handler becomes a kernel that Python can call:
//
//   ffi::Future add(ffi::ThreadPool pool, Floats a, Floats b, FloatsOut sum, SomeAttribute n) {...}
//   FQT_KERNEL(add)
//
// The function's name is the kernel's, its parameters are what XLA has to pass: operands, then
// results, then attributes, in any number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "operands.h"
#include "xla/ffi/api/ffi.h"

namespace fqt {

struct Kernel {
  const char* name;
  XLA_FFI_Handler* handler;
};

// All kernels, in no particular order.
inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

// A future that is available at once.
inline ffi::Future done(const ffi::Error& error = ffi::Error::Success()) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (error.success()) {
    promise.SetAvailable();
  } else {
    promise.SetError(error);
  }
  return future;
}

inline ffi::Error error_of(const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    std::string("fqt_jax native kernel: ") + e.what());
}

namespace internal {

// How each parameter of a handler is bound: as what XLA calls it, and what becomes of that. Element
// types are checked here rather than by XLA, whose message takes several lines.
template <typename T>
struct Parameter;

template <>
struct Parameter<ffi::AnyBuffer> {
  using OfXla = ffi::AnyBuffer;
  static constexpr bool kIsOperand = true;
  template <typename Binding>
  static auto bind(Binding&& binding) {
    return std::move(binding).template Arg<ffi::AnyBuffer>();
  }
  static ffi::AnyBuffer convert(ffi::AnyBuffer buffer, int, int) { return buffer; }
};

template <>
struct Parameter<ffi::Result<ffi::AnyBuffer>> {
  using OfXla = ffi::Result<ffi::AnyBuffer>;
  static constexpr bool kIsOperand = false;
  template <typename Binding>
  static auto bind(Binding&& binding) {
    return std::move(binding).template Ret<ffi::AnyBuffer>();
  }
  static OfXla convert(OfXla buffer, int, int) { return buffer; }
};

template <typename T>
using BufferOf = std::conditional_t<std::is_const_v<T>, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>>;

template <typename T>
struct Parameter<Array<T>> : Parameter<BufferOf<T>> {
  static Array<T> convert(BufferOf<T> value, int position, int operands) {
    const ffi::AnyBuffer& buffer = buffer_of(value);
    if (buffer.element_type() != kType.type) {
      throw Invalid{(std::is_const_v<T> ? "operand " + std::to_string(position)
                                        : "result " + std::to_string(position - operands)) +
                    " must be " + kType.name};
    }
    return {buffer.dimensions(), static_cast<T*>(buffer.untyped_data())};
  }

 private:
  struct Type {
    ffi::DataType type;
    const char* name;
  };
  using Element = std::remove_const_t<T>;
  static constexpr Type kType = std::is_same_v<Element, float>      ? Type{ffi::F32, "float32"}
                                : std::is_same_v<Element, uint32_t> ? Type{ffi::U32, "uint32"}
                                                                    : Type{ffi::S32, "int32"};
  static const ffi::AnyBuffer& buffer_of(const ffi::AnyBuffer& operand) { return operand; }
  static const ffi::AnyBuffer& buffer_of(ffi::Result<ffi::AnyBuffer>& result) { return *result; }
};

template <typename T, const char* name>
struct Parameter<Attribute<T, name>> {
  using OfXla = T;
  static constexpr bool kIsOperand = false;
  template <typename Binding>
  static auto bind(Binding&& binding) {
    return std::move(binding).template Attr<T>(name);
  }
  static Attribute<T, name> convert(T value, int, int) { return {value}; }
};

// XLA's binding cannot be moved, only extended: hence by reference, with the end apart.
template <typename Last, typename Binding>
auto bind_all(Binding&& binding) {
  return Parameter<Last>::bind(std::move(binding));
}
template <typename First, typename Second, typename... Rest, typename Binding>
auto bind_all(Binding&& binding) {
  return bind_all<Second, Rest...>(Parameter<First>::bind(std::move(binding)));
}

template <auto handler>
struct Guarded;

// Runs what a check or an allocation may leave by an exception; XLA must see an error instead.
template <typename... T, ffi::Future (*handler)(ffi::ThreadPool, T...)>
struct Guarded<handler> {
  template <size_t... position>
  static ffi::Future call(std::index_sequence<position...>, ffi::ThreadPool pool,
                          typename Parameter<T>::OfXla... values) {
    constexpr int kOperands = (0 + ... + int{Parameter<T>::kIsOperand});
    try {
      return handler(pool, Parameter<T>::convert(values, int{position}, kOperands)...);
    } catch (const Invalid& invalid) {
      return done(ffi::Error::InvalidArgument("fqt_jax native kernel: " + invalid.message));
    } catch (const std::exception& e) {
      return done(error_of(e));
    }
  }

  static XLA_FFI_Error* run(XLA_FFI_CallFrame* frame) {
    static auto* const bound =
        bind_all<T...>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>())
            .To([](ffi::ThreadPool pool, typename Parameter<T>::OfXla... values) {
              return call(std::index_sequence_for<T...>(), pool, values...);
            })
            .release();
    return bound->Call(frame);
  }
};

}  // namespace internal

#define FQT_KERNEL(handler)                                \
  [[maybe_unused]] static const bool is_kernel_##handler = \
      (kernels().push_back({"fqt_jax_" #handler, internal::Guarded<&handler>::run}), true);

}  // namespace fqt
