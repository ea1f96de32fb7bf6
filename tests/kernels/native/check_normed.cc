// A layer norm before a product, against a plain scalar reference.

#include <cmath>

#include "check.h"
#include "strip_sums.h"
#include "transforms.h"

namespace fqt {
namespace {

struct NormedCase {
  Random random;
  Shape shape;
  SourceType type;
  float epsilon;
  std::vector<int16_t> narrow;
  std::vector<int32_t> wide;
  std::vector<float> real;
  std::vector<float> before, after;  // six rows each
  std::vector<int32_t> indices;      // of the kept samples
  bool is_selected;
  std::vector<float> d;

  explicit NormedCase(uint64_t seed)
      : random(seed),
        shape{pick(random, 1, pick(random, 0, 9) == 0 ? 150 : 5), pick(random, 1, 3),
              pick(random, 1, 3),
              choose<int64_t>(random, {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100})},
        type(choose(random, {SourceType::kInt16, SourceType::kInt32, SourceType::kFloat32})),
        epsilon(choose(random, {1e-6f, 1e-3f, 1.0f})), is_selected(pick(random, 0, 1) == 1) {
    if (pick(random, 0, 2) == 0) shape.h = shape.w = 1;
    std::normal_distribution<float> normal;
    const bool is_special = pick(random, 0, 3) == 0;
    auto value = [&](float v) { return is_special ? special(random, v) : v; };
    for (int64_t i = 0; i < shape.n * shape.h * shape.w * shape.c; ++i) {
      narrow.push_back(static_cast<int16_t>(pick(random, -9, 9)));
      wide.push_back(static_cast<int32_t>(pick(random, -9, 9)));
      real.push_back(value(normal(random)));
    }
    for (int64_t i = 0; i < 6 * shape.c; ++i) {
      before.push_back(value(normal(random)));
      after.push_back(value(normal(random)));
    }
    for (int32_t i = 0; i < shape.n; ++i) {
      if (!is_selected || pick(random, 0, 1) == 1) indices.push_back(i);
    }
    if (indices.empty()) indices.push_back(0);
    for (int64_t i = 0; i < kept().count * positions() * shape.c; ++i) {
      d.push_back(value(normal(random)));
    }
  }

  int64_t positions() const { return shape.h * shape.w; }
  Kept kept() const {
    const auto count = static_cast<int64_t>(indices.size());
    return {count, is_selected ? indices.data() : nullptr, nullptr};
  }
  const void* source() const {
    switch (type) {
      case SourceType::kInt16: return narrow.data();
      case SourceType::kInt32: return wide.data();
      default: return real.data();
    }
  }
  NormedArgs args() const {
    return {shape, source(), type, before.data(), after.data(), epsilon};
  }
  // Entry of channel k at position i, counted over all samples.
  float s(int64_t i, int64_t k) const {
    const auto at = static_cast<size_t>(i * shape.c + k);
    switch (type) {
      case SourceType::kInt16: return static_cast<float>(narrow[at]);
      case SourceType::kInt32: return static_cast<float>(wide[at]);
      default: return real[at];
    }
  }
  float row(const std::vector<float>& rows, int64_t i, int64_t k) const {
    return rows[static_cast<size_t>(i * shape.c + k)];
  }
  bool is_up(const std::vector<float>& rows, float v, int64_t k) const {
    return row(rows, 0, k) * v + row(rows, 1, k) >= 0.0f;
  }
  float line(const std::vector<float>& rows, float v, int64_t k) const {
    const int64_t side = is_up(rows, v, k) ? 2 : 4;
    return row(rows, side, k) * v + row(rows, side + 1, k);
  }
  float slope(const std::vector<float>& rows, float v, int64_t k) const {
    return row(rows, is_up(rows, v, k) ? 2 : 4, k);
  }

  struct Position {
    std::vector<float> x;
    float inverse;
  };
  Position normalized(int64_t i) const {
    const auto c = static_cast<double>(shape.c);
    Position p{std::vector<float>(static_cast<size_t>(shape.c)), 0.0f};
    for (int64_t k = 0; k < shape.c; ++k) p.x[static_cast<size_t>(k)] = line(before, s(i, k), k);
    const auto x = [&](int64_t k) { return p.x[static_cast<size_t>(k)]; };
    const auto mean = static_cast<float>(lane_sum(shape.c, x) / c);
    for (float& v : p.x) v -= mean;
    const double squares = lane_sum(shape.c, [&](int64_t k) { return x(k) * x(k); });
    p.inverse = static_cast<float>(1.0 / std::sqrt(squares / c + static_cast<double>(epsilon)));
    for (float& v : p.x) v *= p.inverse;
    return p;
  }

  std::vector<float> t() const {
    std::vector<float> out;
    for (int64_t i = 0; i < shape.n * positions(); ++i) {
      const Position p = normalized(i);
      for (int64_t k = 0; k < shape.c; ++k) {
        out.push_back(line(after, p.x[static_cast<size_t>(k)], k));
      }
    }
    return out;
  }

  // The gradient, and adds to the sums of the coefficients.
  std::vector<float> gradient(StripSums& sums) const {
    std::vector<float> out(narrow.size());
    int64_t slot = 0;
    for (int64_t n = 0; n < shape.n; ++n) {
      const bool is_kept = slot < kept().count && kept().index(slot) == n;
      for (int64_t i = 0; is_kept && i < positions(); ++i) {
        add_position(n * positions() + i, slot * positions() + i, out, sums);
        sums.end_row(1);
      }
      slot += is_kept;
      if ((n + 1) % samples_at_once(shape) == 0 || n + 1 == shape.n) sums.end_task();
    }
    return out;
  }

  void add_position(int64_t i, int64_t of_d, std::vector<float>& g, StripSums& sums) const {
    const int64_t c = shape.c;
    const Position p = normalized(i);
    const auto x = [&](int64_t k) { return p.x[static_cast<size_t>(k)]; };
    const auto d_at = [&](int64_t k) { return d[static_cast<size_t>(of_d * c + k)]; };
    const auto h = [&](int64_t k) { return slope(after, x(k), k) * d_at(k); };
    const auto mean = static_cast<float>(lane_sum(c, h) / static_cast<double>(c));
    const auto along = static_cast<float>(
        lane_sum(c, [&](int64_t k) { return h(k) * x(k); }) / static_cast<double>(c));
    for (int64_t k = 0; k < c; ++k) {
      const float e = p.inverse * (h(k) - mean - x(k) * along), v = s(i, k);
      g[static_cast<size_t>(i * c + k)] = slope(before, v, k) * e;
      add(sums, 0, k, is_up(after, x(k), k), d_at(k), x(k));
      add(sums, 4, k, is_up(before, v, k), e, v);
    }
  }

  void add(StripSums& sums, int64_t first, int64_t k, bool is_up, float here, float v) const {
    const int64_t side = first + (is_up ? 0 : 2);
    sums.add(static_cast<size_t>(side * shape.c + k), here, here);
    sums.add(static_cast<size_t>((side + 1) * shape.c + k), here * v,
             static_cast<double>(here) * static_cast<double>(v));
  }

  std::vector<float> bounds(const std::vector<float>& g, bool is_least) const {
    std::vector<float> out;
    for (int64_t i = 0; i < shape.n * shape.c; ++i) {
      const int64_t first = i / shape.c * positions() * shape.c + i % shape.c;
      float bound = g[static_cast<size_t>(first)];
      for (int64_t j = 1; j < positions(); ++j) {
        const float v = g[static_cast<size_t>(first + j * shape.c)];
        if ((is_least ? v < bound : v > bound) || v != v) bound = v;
      }
      out.push_back(bound);
    }
    return out;
  }
};

}  // namespace

bool check_normed(uint64_t seed) {
  NormedCase c(seed);
  const Shape& shape = c.shape;
  const auto positive = [](float v) { return v >= 0.0f ? 1u : 0u; };
  const auto inside = [](float v) { return std::fabs(v) <= 1.0f ? 1u : 0u; };
  const std::vector<float> t = c.t();
  StripSums all(8 * shape.c);
  const std::vector<float> g = c.gradient(all), sums(all.all.begin(), all.all.end());
  const std::vector<float> lo = c.bounds(g, true), hi = c.bounds(g, false);
  const std::vector<uint32_t> signs = packed(t, shape.n, positive), clip = packed(t, shape.n, inside);
  const auto words = static_cast<int64_t>(signs.size()) / shape.n;
  bool is_good = true;
  for (Isa isa : supported_isas()) {
    auto expect = [&](bool condition, const char* kernel) {
      if (condition) return;
      is_good = false;
      report(seed, kernel, isa, {{"n", shape.n}, {"h", shape.h}, {"w", shape.w}, {"c", shape.c}});
    };
    const float garbage = 12345;
    std::vector<uint32_t> got_signs(signs.size(), 99), got_clip(clip.size(), 99);
    std::vector<float> nan(static_cast<size_t>(shape.n), garbage), expected_nan(nan.size(), 0.0f);
    run(isa, EncodeNormedArgs{c.args(), got_signs.data(), got_clip.data(), words, nan.data()},
        c.random);
    for (size_t i = 0; i < t.size(); ++i) {
      if (t[i] != t[i]) expected_nan[i / (t.size() / nan.size())] = t[i];
    }
    expect(got_signs == signs && got_clip == clip && same(nan, expected_nan), "encode_normed");
    std::vector<float> out(g.size(), garbage), got(sums.size(), garbage);
    std::vector<float> got_lo(lo.size(), garbage), got_hi(hi.size(), garbage);
    run(isa, GradientNormedArgs{c.args(), c.d.data(), c.kept(), out.data(), got_lo.data(),
                                got_hi.data(), got.data()},
        c.random);
    expect(same(out, g), "gradient_normed");
    expect(same(got, sums), "sums of gradient_normed");
    expect(same(got_lo, lo) && same(got_hi, hi), "bounds of gradient_normed");
    std::vector<float> again(g.size(), garbage);
    run(isa, GradientNormedArgs{c.args(), c.d.data(), c.kept(), again.data(), nullptr, nullptr,
                                got.data()},
        c.random);
    expect(same(again, g), "gradient_normed without bounds");
  }
  return is_good;
}

}  // namespace fqt
