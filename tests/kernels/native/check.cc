// Drives the kernels against a plain scalar reference over random shapes and values, without
// Python: for sanitizers, and for machines that only an emulator can run.
//
//   check FIRST_SEED CASES
//
// Results must agree bit for bit: sums are integers, and floats are computed in one fixed order.

#include "check.h"

#include <cstdlib>

#include "denormals.h"

int main(int argc, char** argv) {
  const fqt::FlushDenormals flush;
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t cases = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 100;
  uint64_t failed = 0;
  for (uint64_t seed = first; seed < first + cases; ++seed) {
    // Each form in turn: cases are small, and by itself none would be taken that is for large ones.
    fqt::prefer_form(static_cast<fqt::Form>(seed % 3));
    for (auto* check : {fqt::check_products, fqt::check_float_products, fqt::check_transforms,
                        fqt::check_weights, fqt::check_adam, fqt::check_float_conv,
                        fqt::check_normed, fqt::check_attention, fqt::check_draws}) {
      failed += !check(seed);
    }
  }
  for (fqt::Isa isa : fqt::supported_isas()) std::printf("%s ", fqt::name_of(isa).c_str());
  std::printf("kernels: %llu of %llu cases agree with the reference\n",
              static_cast<unsigned long long>(9 * cases - failed),
              static_cast<unsigned long long>(9 * cases));
  return failed != 0;
}
