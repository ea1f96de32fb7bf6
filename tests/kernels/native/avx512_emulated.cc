// The AVX-512 kernels through SIMDe (Debian: libsimde-dev), which writes their intrinsics in terms
// of what the machine has. For the check program, in place of kernels_avx512.cc, with FQT_ONLY_ISA.

#include "baseline.h"

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include "simde_missing.h"

namespace fqt::avx512 {
bool runs_here() { return true; }
}  // namespace fqt::avx512

#define FQT_ISA avx512
#define FQT_SIMD "simd_avx512.inc"
#include "kernels.inc"
