// The kernels that count bits, with AVX-512 through SIMDe (Debian: libsimde-dev). For the check program,
// in place of kernels_vpopcnt.cc, with FQT_ONLY_ISA.

#include "baseline.h"

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "simde_missing.h"

namespace fqt::vpopcnt {
bool runs_here() { return true; }
}  // namespace fqt::vpopcnt

#define FQT_ISA vpopcnt
#define FQT_SIMD "simd_avx512.inc"
#define FQT_HAS_POPCOUNT
#include "kernels.inc"
