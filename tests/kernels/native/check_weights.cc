// What becomes of weights against a plain scalar reference.

#include "weights.h"

#include <cmath>

#include "check.h"

namespace fqt {

bool check_weights(uint64_t seed) {
  Random random(seed);
  const int64_t rows = pick(random, 1, pick(random, 0, 9) == 0 ? 700 : 90);
  const int64_t o = choose<int64_t>(random, {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100});
  const bool is_special = pick(random, 0, 3) == 0, clips = pick(random, 0, 1) == 1;
  std::normal_distribution<float> normal;
  std::vector<float> w, dw, d_scale;
  for (int64_t i = 0; i < rows * o; ++i) {
    const float value = static_cast<float>(pick(random, -9, 9)) / 4;
    w.push_back(is_special ? special(random, value) : value);
    dw.push_back(normal(random));
  }
  for (int64_t k = 0; k < o; ++k) d_scale.push_back(normal(random));
  const std::vector<uint32_t> signs = packed(w, 1, [](float v) { return v >= 0.0f ? 1u : 0u; });
  std::vector<float> finished(dw);
  for (size_t i = 0; i < w.size(); ++i) {
    const float clipped = !clips || std::fabs(w[i]) <= 1.0f ? dw[i] : 0.0f;
    const float sign = w[i] > 0.0f ? 1.0f : w[i] < 0.0f ? -1.0f : w[i];
    finished[i] = clipped + sign * d_scale[i % static_cast<size_t>(o)];
  }
  bool is_good = true;
  for (Isa isa : supported_isas()) {
    auto expect = [&](bool condition, const char* what) {
      if (condition) return;
      is_good = false;
      report(seed, what, isa, {{"rows", rows}, {"o", o}});
    };
    std::vector<uint32_t> got(signs.size(), 99);
    std::vector<float> scale(static_cast<size_t>(o), 12345);
    run(isa, EncodeWeightsArgs{w.data(), rows, o, got.data(), scale.data()}, random);
    expect(got == signs, "encode_weights");
    for (int64_t k = 0; k < o; ++k) {
      double mean = 0;
      for (int64_t i = 0; i < rows; ++i) {
        mean += std::fabs(static_cast<double>(w[static_cast<size_t>(i * o + k)])) /
                static_cast<double>(rows);
      }
      const auto found = static_cast<double>(scale[static_cast<size_t>(k)]);
      const bool overflows = mean * static_cast<double>(rows) > 1e38;  // the sum, a float
      const bool is_close = std::fabs(found - mean) <= 1e-5 * mean + 1e-30;
      expect(is_close || found == mean || (found != found && mean != mean) || overflows, "scale");
    }
    std::vector<float> out(dw);
    run(isa, FinishWeightGradArgs{w.data(), d_scale.data(), rows, o, clips, out.data()}, random);
    expect(same(out, finished), "finish_weight_grad");
  }
  return is_good;
}

bool check_adam(uint64_t seed) {
  Random random(seed);
  const int64_t size = choose<int64_t>(random, {1, 7, 8, 33, 4096, 65535, 65536, 65537, 200000});
  std::normal_distribution<float> normal;
  const float scale = choose(random, {1e-30f, 1e-3f, 1.0f, 1e10f});
  std::vector<float> g(static_cast<size_t>(size)), m(g.size()), v(g.size());
  for (size_t i = 0; i < g.size(); ++i) {
    g[i] = scale * normal(random);
    m[i] = scale * normal(random);
    v[i] = scale * std::fabs(normal(random));
  }
  const AdamFactors f{0.1f, 0.9f, 0.001f, 0.999f, choose(random, {1.0f, 10.0f}), 50.0f, 1e-8f};
  std::vector<float> u(g), new_m(m), new_v(v);
  for (size_t i = 0; i < g.size(); ++i) {
    new_m[i] = f.new1 * g[i] + f.old1 * m[i];
    new_v[i] = f.new2 * (g[i] * g[i]) + f.old2 * v[i];
    u[i] = new_m[i] * f.inverse1 / (std::sqrt(new_v[i] * f.inverse2) + f.epsilon);
  }
  bool is_good = true;
  for (Isa isa : supported_isas()) {
    std::vector<float> got_u(g), got_m(m), got_v(v);
    run(isa, AdamArgs{size, got_u.data(), got_m.data(), got_v.data(), f}, random);
    if (same(got_u, u) && same(got_m, new_m) && same(got_v, new_v)) continue;
    is_good = false;
    report(seed, "adam", isa, {{"size", size}});
  }
  return is_good;
}

}  // namespace fqt
