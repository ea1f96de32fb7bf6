// The Python module: the kernels, and the choice of an instruction set.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "kernel.h"
#include "products.h"

namespace fqt {
namespace {

namespace nb = nanobind;

// The form in which the set in use computes a product, for `sizes` as in make_geometry and so many kept
// samples and channels.
std::string product_form(const std::string& product, int64_t n, const std::vector<int64_t>& sizes,
                         int64_t samples, int64_t channels) {
  try {
    const Geometry g = make_geometry(n, {sizes.data(), sizes.size()});
    require(samples >= 0 && samples <= g.n, "samples are out of range");
    require(channels >= 0 && channels <= g.o, "channels are out of range");
    const Kept kept_samples{samples, nullptr, nullptr}, kept_channels{channels, nullptr, nullptr};
    const Isa isa = current_isa();
    if (product == "forward") {
      return name_of(form_of(isa, ForwardArgs{g, {}, {}, nullptr, false, 1}));
    }
    if (product == "input_grad") {
      return name_of(
          form_of(isa, InputGradArgs{g, nullptr, {}, kept_samples, {}, {}, false, nullptr, 1}));
    }
    require(product == "weight_grad", "the product must be forward, input_grad or weight_grad");
    return name_of(form_of(
        isa, WeightGradArgs{g, nullptr, {}, kept_samples, kept_channels, {}, nullptr, 1}));
  } catch (const Invalid& invalid) {
    throw nb::value_error(invalid.message.c_str());
  }
}

NB_MODULE(_native, m) {
  m.def("registrations", [] {
    nb::dict registrations;
    for (const Kernel& kernel : kernels()) {
      registrations[kernel.name] = nb::capsule(reinterpret_cast<void*>(kernel.handler));
    }
    return registrations;
  });
  m.def("ffi_version", [] { return std::pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("sources_digest", [] { return std::string(FQT_JAX_SOURCES_DIGEST); });
  m.def("supported_isas", [] {
    nb::list names;
    for (Isa isa : supported_isas()) names.append(name_of(isa));
    return names;
  });
  m.def("product_form", &product_form, nb::arg("product"), nb::arg("n"), nb::arg("sizes"),
        nb::arg("samples"), nb::arg("channels"));
  m.def(
      "prefer_form",
      [](const std::string& name) {
        if (!prefer_form(name)) {
          throw nb::value_error(("a form is look_up, popcount or tiles; not '" + name + "'").c_str());
        }
      },
      nb::arg("name"));
  m.def("current_isa", [] { return name_of(current_isa()); });
  m.def("select_isa", [](const std::string& name) {
    if (!select_isa(name)) {
      throw nb::value_error(("this machine does not run the instruction set '" + name + "'").c_str());
    }
  });
}

}  // namespace
}  // namespace fqt
