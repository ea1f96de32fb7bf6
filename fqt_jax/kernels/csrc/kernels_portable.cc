#include "standard.h"

#define FQT_ISA portable
#include "kernels.inc"
