// Keep probabilities and draws against a plain scalar reference.

#include "draws.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"

namespace fqt {
namespace {

// Water-filling in doubles: the first number of groups capped at one that caps no further.
std::vector<double> filled(const std::vector<float>& r, int64_t k) {
  const size_t n = r.size();
  std::vector<double> falling(r.begin(), r.end()), p(n);
  std::sort(falling.rbegin(), falling.rend());
  const auto positive = std::count_if(r.begin(), r.end(), [](float v) { return v > 0; });
  if (k == 0) return p;
  if (positive <= k) {
    const double spread = static_cast<double>(k - positive) /
                          static_cast<double>(std::max<int64_t>(1, static_cast<int64_t>(n) - positive));
    for (size_t i = 0; i < n; ++i) p[i] = r[i] > 0 ? 1 : spread;
    return p;
  }
  double c = 0;
  for (int64_t m = 0; m < k; ++m) {
    const auto at = static_cast<size_t>(m);
    const double tail = std::accumulate(falling.rbegin(), falling.rend() - m, 0.0);
    c = static_cast<double>(k - m) / tail;
    if (c * falling[at] <= 1) break;
  }
  for (size_t i = 0; i < n; ++i) p[i] = std::min(1.0, c * static_cast<double>(r[i]));
  return p;
}

}  // namespace

bool check_draws(uint64_t seed) {
  Random random(seed);
  const int64_t n = choose<int64_t>(random, {1, 2, 3, 5, 8, 17, 64, 100, 128, 129, 700});
  const int64_t k = pick(random, 0, n);
  const float spread = choose(random, {0.1f, 1.0f, 4.0f});
  std::normal_distribution<float> normal;
  std::vector<float> r;
  for (int64_t i = 0; i < n; ++i) {
    r.push_back(pick(random, 0, 9) == 0 ? 0.0f : std::exp(spread * normal(random)));
  }
  const std::vector<double> expected = filled(r, k);
  const uint32_t start = static_cast<uint32_t>(random());
  bool is_good = true;
  std::vector<float> first;
  for (Isa isa : supported_isas()) {
    auto expect = [&](bool condition, const char* what) {
      if (condition) return;
      is_good = false;
      report(seed, what, isa, {{"n", n}, {"k", k}});
    };
    std::vector<float> p(r.size(), 12345);
    run(isa, WaterFillingArgs{r.data(), n, static_cast<int32_t>(k), p.data()}, random);
    for (size_t i = 0; i < p.size(); ++i) {
      expect(std::fabs(static_cast<double>(p[i]) - expected[i]) <= 1e-5 * expected[i], "water_filling");
    }
    if (first.empty()) first = p;
    expect(same(p, first), "water_filling, beside another set's");

    std::vector<int32_t> indices(static_cast<size_t>(k), -1);
    std::vector<float> weights(indices.size(), 12345);
    run(isa, SystematicArgs{p.data(), n, k, start, indices.data(), weights.data()}, random);
    std::vector<bool> is_kept;
    uint64_t end = start;
    for (float value : p) {
      const uint64_t before = end >> 32;
      if (value > 0 && value < 1) {
        end += std::max<uint64_t>(1, static_cast<uint64_t>(static_cast<double>(value) * 0x1p32));
      }
      is_kept.push_back(value >= 1 || end >> 32 > before);
    }
    auto to_fill = k - std::count(is_kept.begin(), is_kept.end(), true);
    size_t slot = 0;
    for (size_t i = 0; slot < indices.size(); ++i) {
      if (!is_kept[i] && to_fill-- <= 0) continue;
      const double weight = is_kept[i] ? 1 / static_cast<double>(p[i]) : 0;
      expect(indices[slot] == static_cast<int32_t>(i), "indices of systematic");
      expect(std::fabs(static_cast<double>(weights[slot]) - weight) <= 1e-6 * weight ||
                 (weight > 1e6 && weights[slot] > 1e6f),
             "weights of systematic");
      ++slot;
    }
  }
  return is_good;
}

}  // namespace fqt
