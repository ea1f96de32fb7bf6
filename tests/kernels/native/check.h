// What the checks of the kernels have in common; see check.cc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "geometry.h"
#include "isa.h"

namespace fqt {

// Each returns whether all kernels agree with the reference in a case drawn from the seed.
bool check_products(uint64_t seed);
bool check_float_products(uint64_t seed);
bool check_transforms(uint64_t seed);
bool check_weights(uint64_t seed);
bool check_adam(uint64_t seed);
bool check_float_conv(uint64_t seed);
bool check_normed(uint64_t seed);
bool check_attention(uint64_t seed);
bool check_draws(uint64_t seed);

using Random = std::mt19937_64;

inline int64_t pick(Random& random, int64_t first, int64_t last) {
  return first + static_cast<int64_t>(random() % static_cast<uint64_t>(last - first + 1));
}

template <typename T>
T choose(Random& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

inline Axis random_axis(Random& random) {
  Axis axis{pick(random, 1, 9), 0, pick(random, 1, 4), choose<int64_t>(random, {1, 1, 2, 3}), 0};
  axis.before = pick(random, 0, 4);
  int64_t after = pick(random, 0, 4);
  while (axis.in + axis.before + after < axis.window) ++after;
  axis.out = (axis.in + axis.before + after - axis.window) / axis.stride + 1;
  return axis;
}

inline Geometry random_geometry(Random& random) {
  const std::initializer_list<int64_t> channels = {0,  1,  2,  3,  4,  5,  8,  15, 16,  17,
                                                   31, 32, 33, 63, 64, 65, 96, 97, 128, 200};
  Geometry g{choose<int64_t>(random, {0, 1, 2, 3, 4, 5, 8, 13, 33}), choose(random, channels),
             choose(random, channels), random_axis(random), random_axis(random)};
  if (pick(random, 0, 9) == 0) g.y = g.x = {1, 1, 1, 1, 0};  // a dense layer
  if (pick(random, 0, 9) == 0) g.n = pick(random, 120, 270);  // several blocks of samples
  if (pick(random, 0, 9) == 0) g.y = {40, 40, 3, 1, 1};       // several blocks of rows
  return g;
}

inline float special(Random& random, float value) {
  switch (pick(random, 0, 400)) {
    case 0: return std::numeric_limits<float>::quiet_NaN();
    case 1: return std::numeric_limits<float>::infinity();
    case 2: return -std::numeric_limits<float>::infinity();
    case 3: return 1e-42f;
    case 4: return -3e38f;
    default: return value;
  }
}

template <typename Args>
void run(Isa isa, const Args& args, Random& random) {
  const std::unique_ptr<Job> job = make_job(isa, args);
  std::vector<int64_t> order(static_cast<size_t>(job->tasks()));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t task : order) job->run(task);
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !(a[i] != a[i] && b[i] != b[i])) return false;
  }
  return a.size() == b.size();
}

// Says that a kernel of an instruction set differs from the reference, for `sizes` of these names.
inline void report(uint64_t seed, const char* kernel, Isa isa,
                   std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  std::printf("seed %llu: %s of %s differs (", static_cast<unsigned long long>(seed), kernel,
              name_of(isa).c_str());
  const char* between = "";
  for (const auto& [name, size] : sizes) {
    std::printf("%s%s %lld", between, name, static_cast<long long>(size));
    between = " ";
  }
  std::printf(")\n");
}

// A sum over channels, in the order of the kernels: channel k in lane k % 16, then the lanes.
template <typename Of>
double lane_sum(int64_t c, Of of) {
  float lanes[16] = {};
  for (int64_t k = 0; k < c; ++k) lanes[k % 16] += of(k);
  double total = 0.0;
  for (float lane : lanes) total += static_cast<double>(lane);
  return total;
}

// Sums of floats, against doubles: they differ by the rounding of what is summed.
struct Sums {
  std::vector<double> sums, sizes;

  explicit Sums(size_t n) : sums(n), sizes(n) {}
  void add(size_t i, double value) {
    sums[i] += value;
    sizes[i] += std::fabs(value);
  }
  bool agree(const std::vector<float>& got) const {
    for (size_t i = 0; i < got.size(); ++i) {
      if (!(std::fabs(got[i] - sums[i]) <= 1e-5 * sizes[i])) return false;
    }
    return got.size() == sums.size();
  }
};

// Bits of rows as PackedBits.
template <typename Test>
std::vector<uint32_t> packed(const std::vector<float>& values, int64_t rows, Test test) {
  const int64_t size = static_cast<int64_t>(values.size()) / rows, words = (size + 31) / 32;
  std::vector<uint32_t> out(static_cast<size_t>(rows * words));
  for (int64_t i = 0; i < rows * size; ++i) {
    const uint32_t bit = test(values[static_cast<size_t>(i)]);
    out[static_cast<size_t>(i / size * words + i % size / 32)] |= bit << (i % size % 32);
  }
  return out;
}

}  // namespace fqt
