#if defined(__x86_64__)

#include "baseline.h"

#include <immintrin.h>

namespace fqt::avx2 {
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("popcnt");
}
}  // namespace fqt::avx2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#endif

#define FQT_ISA avx2
#define FQT_SIMD "simd_avx2.inc"
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
