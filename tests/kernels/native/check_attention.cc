// Self-attention against one in double, and the instruction sets against each other.

#include "attention.h"

#include "check.h"

namespace fqt {
namespace {

// The result in doubles, and the sizes of what was summed, which bound the rounding.
struct Expected {
  Sums y, dqkv;
};

Expected expected(const AttentionShape& shape, bool is_causal, float scale,
                  const std::vector<float>& qkv, const std::vector<float>& dy) {
  Expected out{Sums(dy.size()), Sums(qkv.size())};
  const int64_t length = shape.length, d = shape.d;
  for (int64_t n = 0; n < shape.n; ++n) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      const auto at = [&](int64_t i, int64_t part, int64_t k) {
        return static_cast<size_t>((((n * length + i) * 3 + part) * shape.heads + h) * d + k);
      };
      const auto at_y = [&](int64_t i, int64_t k) {
        return static_cast<size_t>(((n * length + i) * shape.heads + h) * d + k);
      };
      for (int64_t i = 0; i < length; ++i) {
        const int64_t keys = is_causal ? i + 1 : length;
        std::vector<double> p, dp;
        double most = -1e300, total = 0, mean = 0, size = 0;
        for (int64_t j = 0; j < keys; ++j) {
          double s = 0, v = 0;
          for (int64_t k = 0; k < d; ++k) {
            s += double{scale} * qkv[at(i, 0, k)] * qkv[at(j, 1, k)];
            v += double{dy[at_y(i, k)]} * qkv[at(j, 2, k)];
          }
          p.push_back(s);
          dp.push_back(v);
          most = std::max(most, s);
        }
        for (double& s : p) total += s = std::exp(s - most);
        for (int64_t j = 0; j < keys; ++j) {
          const auto at_j = static_cast<size_t>(j);
          p[at_j] /= total;
          mean += p[at_j] * dp[at_j];
          size += p[at_j] * std::fabs(dp[at_j]);
        }
        for (int64_t j = 0; j < keys; ++j) {
          const auto at_j = static_cast<size_t>(j);
          const double ds = p[at_j] * (dp[at_j] - mean);
          // What the difference was taken of; 8 stands for the error of a softmax of such products.
          const double around = 8 * p[at_j] * (std::fabs(dp[at_j]) + size);
          for (int64_t k = 0; k < d; ++k) {
            out.y.add(at_y(i, k), p[at_j] * qkv[at(j, 2, k)]);
            out.dqkv.add(at(j, 2, k), p[at_j] * dy[at_y(i, k)]);
            const double q = double{scale} * qkv[at(i, 0, k)], key = double{scale} * qkv[at(j, 1, k)];
            out.dqkv.sums[at(i, 0, k)] += ds * key;
            out.dqkv.sizes[at(i, 0, k)] += around * std::fabs(key);
            out.dqkv.sums[at(j, 1, k)] += ds * q;
            out.dqkv.sizes[at(j, 1, k)] += around * std::fabs(q);
          }
        }
      }
    }
  }
  return out;
}

}  // namespace

bool check_attention(uint64_t seed) {
  Random random(seed);
  const AttentionShape shape{pick(random, 1, 3), choose<int64_t>(random, {1, 2, 5, 31, 32, 33, 70}),
                             pick(random, 1, 3),
                             choose<int64_t>(random, {1, 2, 7, 8, 15, 16, 17, 32, 33, 64, 70})};
  const bool is_causal = pick(random, 0, 1) == 1;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.d));
  std::normal_distribution<float> normal;
  std::vector<float> qkv, dy;
  for (int64_t i = 0; i < shape.n * shape.length * shape.heads * shape.d; ++i) {
    dy.push_back(normal(random));
    for (int part = 0; part < 3; ++part) qkv.push_back(normal(random));
  }
  const Expected wanted = expected(shape, is_causal, scale, qkv, dy);
  std::vector<float> first_y, first_dqkv;
  bool is_good = true;
  for (Isa isa : supported_isas()) {
    std::vector<float> y(dy.size(), 12345), dqkv(qkv.size(), 12345);
    run(isa, AttentionArgs{shape, is_causal, scale, qkv.data(), y.data()}, random);
    run(isa, AttentionGradArgs{shape, is_causal, scale, qkv.data(), dy.data(), dqkv.data()}, random);
    if (first_y.empty()) {
      first_y = y;
      first_dqkv = dqkv;
    }
    if (wanted.y.agree(y) && wanted.dqkv.agree(dqkv) && same(y, first_y) &&
        same(dqkv, first_dqkv)) {
      continue;
    }
    is_good = false;
    report(seed, "attention", isa, {{"n", shape.n}, {"length", shape.length},
                                    {"heads", shape.heads}, {"d", shape.d}});
  }
  return is_good;
}

}  // namespace fqt
