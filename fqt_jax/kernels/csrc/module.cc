// The Python module: XLA's handlers, and the choice of an instruction set.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <string>
#include <utility>

#include "handlers.h"
#include "isa.h"

namespace fqt {
namespace {

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.def("registrations", [] {
    nb::dict registrations;
    const std::pair<const char*, void*> handlers[] = {
        {"fqt_jax_forward", reinterpret_cast<void*>(FqtForward)},
        {"fqt_jax_input_grad", reinterpret_cast<void*>(FqtInputGrad)},
        {"fqt_jax_weight_grad", reinterpret_cast<void*>(FqtWeightGrad)},
        {"fqt_jax_moments", reinterpret_cast<void*>(FqtMoments)},
        {"fqt_jax_encode", reinterpret_cast<void*>(FqtEncode)},
        {"fqt_jax_activate", reinterpret_cast<void*>(FqtActivate)},
        {"fqt_jax_gradient_sums", reinterpret_cast<void*>(FqtGradientSums)},
        {"fqt_jax_gradient", reinterpret_cast<void*>(FqtGradient)},
        {"fqt_jax_encode_weights", reinterpret_cast<void*>(FqtEncodeWeights)},
        {"fqt_jax_finish_weight_grad", reinterpret_cast<void*>(FqtFinishWeightGrad)},
        {"fqt_jax_float_conv", reinterpret_cast<void*>(FqtFloatConv)},
        {"fqt_jax_float_conv_weight_grad", reinterpret_cast<void*>(FqtFloatConvWeightGrad)},
        {"fqt_jax_adam", reinterpret_cast<void*>(FqtAdam)},
    };
    for (const auto& [name, handler] : handlers) registrations[name] = nb::capsule(handler);
    return registrations;
  });
  m.def("ffi_version", [] { return std::pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
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
