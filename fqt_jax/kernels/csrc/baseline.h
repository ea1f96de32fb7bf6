// All headers that the kernels' fragments need; see kernels.inc.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "draws.h"
#include "float_conv.h"
#include "geometry.h"
#include "job.h"
#include "products.h"
#include "transforms.h"
#include "weights.h"
