#include "baseline.h"

namespace fqt::portable {
bool runs_here() { return true; }
}  // namespace fqt::portable

#define FQT_ISA portable
#define FQT_SIMD "simd_portable.inc"
#include "kernels.inc"
