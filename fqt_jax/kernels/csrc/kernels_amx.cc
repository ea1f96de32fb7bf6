#include "isa.h"

#if defined(FQT_AMX)

#include "baseline.h"

#include <immintrin.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fqt::amx {
namespace {

// Linux gives a process the tiles' 8 KiB of state for each thread only if it asks.
bool is_permitted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
}

}  // namespace

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("bmi2") && has_tiles() &&
         is_permitted();
}
}  // namespace fqt::amx

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(
    "avx2,fma,popcnt,bmi2,avx512f,avx512bw,avx512vbmi,amx-tile,amx-int8")), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi2,avx512f,avx512bw,avx512vbmi,amx-tile,amx-int8")
// GCC's own headers leave registers undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// GCC 12 believes that a copy of `transpose` made for constants runs beyond its end; the sanitizers,
// which run every call of it, find nothing.
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#endif

#define FQT_ISA amx
#define FQT_SIMD "simd_avx512.inc"
#define FQT_HAS_TILES
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
