#if defined(__x86_64__)

#include "baseline.h"

#include <immintrin.h>

namespace fqt::vpopcnt {
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vpopcntdq");
}
}  // namespace fqt::vpopcnt

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx2,fma,popcnt,avx512f,avx512bw,avx512vbmi,avx512vpopcntdq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,avx512f,avx512bw,avx512vbmi,avx512vpopcntdq")
// GCC's own headers leave registers undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define FQT_ISA vpopcnt
#define FQT_SIMD "simd_avx512.inc"
#define FQT_HAS_POPCOUNT
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
