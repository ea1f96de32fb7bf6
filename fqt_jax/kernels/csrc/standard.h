// The standard headers of the kernels; see kernels.inc.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "geometry.h"
#include "product.h"
