#include "standard.h"

#define FQT_ISA neon
#define FQT_SIMD_NEON
#include "kernels.inc"
