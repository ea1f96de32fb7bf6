// The Python module: the kernels, and the choice of an instruction set.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <string>
#include <utility>

#include "isa.h"
#include "kernel.h"

namespace fqt {
namespace {

namespace nb = nanobind;

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
  m.def("current_isa", [] { return name_of(current_isa()); });
  m.def("select_isa", [](const std::string& name) {
    if (!select_isa(name)) {
      throw nb::value_error(("this machine does not run the instruction set '" + name + "'").c_str());
    }
  });
}

}  // namespace
}  // namespace fqt
