#if defined(__aarch64__)

#include "baseline.h"

#include <arm_neon.h>

namespace fqt::neon {
bool runs_here() { return true; }
}  // namespace fqt::neon

#define FQT_ISA neon
#define FQT_SIMD "simd_neon.inc"
#include "kernels.inc"

#endif
