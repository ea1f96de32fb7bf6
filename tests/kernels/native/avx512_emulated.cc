// The AVX-512 kernels through SIMDe (Debian: libsimde-dev), which writes their intrinsics in terms
// of what the machine has. For the check program, in place of kernels_avx512.cc, with FQT_ONLY_ISA.

#include "baseline.h"

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Missing in SIMDe 0.7.
inline __m512i cvtepu16_epi32(__m256i v) {
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v));
  const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#define _mm512_cvtepu16_epi32 cvtepu16_epi32

namespace fqt::avx512 {
bool runs_here() { return true; }
}  // namespace fqt::avx512

#define FQT_ISA avx512
#define FQT_SIMD "simd_avx512.inc"
#include "kernels.inc"
