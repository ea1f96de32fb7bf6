// What stands between two products against a plain scalar reference.

#include "transforms.h"

#include <cmath>

#include "check.h"
#include "strip_sums.h"

namespace fqt {
namespace {

struct TransformCase {
  Random random;
  Shape shape;
  SourceType type;
  int64_t pool;
  std::vector<int16_t> narrow;
  std::vector<int32_t> wide;
  std::vector<float> real;
  std::vector<float> coefficients;  // twelve rows
  std::vector<int32_t> indices;     // of the kept samples
  bool is_selected, is_weighted;
  std::vector<float> d, weights;

  explicit TransformCase(uint64_t seed)
      : random(seed),
        shape{pick(random, 1, 5), pick(random, 1, 9), pick(random, 1, 9),
              choose<int64_t>(random, {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100})},
        type(choose(random, {SourceType::kInt16, SourceType::kInt32, SourceType::kFloat32})),
        pool(pick(random, 1, std::min<int64_t>(3, std::min(shape.h, shape.w)))),
        is_selected(pick(random, 0, 1) == 1),
        is_weighted(pick(random, 0, 1) == 1) {
    std::normal_distribution<float> normal;
    const bool is_special = pick(random, 0, 3) == 0;
    auto value = [&](float v) { return is_special ? special(random, v) : v; };
    for (int64_t i = 0; i < shape.n * shape.h * shape.w * shape.c; ++i) {
      // Few values, so that several entries of a window are its maximum.
      narrow.push_back(static_cast<int16_t>(pick(random, -9, 9)));
      wide.push_back(static_cast<int32_t>(pick(random, -9, 9)));
      real.push_back(value(static_cast<float>(pick(random, -9, 9)) / 4));
    }
    for (int64_t i = 0; i < 12 * shape.c; ++i) coefficients.push_back(value(normal(random)));
    for (int32_t i = 0; i < shape.n; ++i) {
      if (!is_selected || pick(random, 0, 1) == 1) indices.push_back(i);
      weights.push_back(static_cast<float>(pick(random, 0, 8)) / 4);
    }
    if (indices.empty()) indices.push_back(0);
    for (int64_t i = 0; i < kept().count * rows_out() * columns_out() * shape.c; ++i) {
      d.push_back(value(normal(random)));
    }
  }

  int64_t rows_out() const { return shape.h / pool; }
  int64_t columns_out() const { return shape.w / pool; }
  Kept kept() const {
    const auto count = static_cast<int64_t>(indices.size());
    return {count, is_selected ? indices.data() : nullptr, nullptr};
  }
  const float* sample_weights() const { return is_weighted ? weights.data() : nullptr; }
  float weight(int64_t n) const { return is_weighted ? weights[static_cast<size_t>(n)] : 1.0f; }
  const void* source() const {
    switch (type) {
      case SourceType::kInt16: return narrow.data();
      case SourceType::kInt32: return wide.data();
      default: return real.data();
    }
  }
  TransformArgs args() const { return {shape, source(), type, coefficients.data(), pool}; }

  size_t at(int64_t n, int64_t y, int64_t x, int64_t k) const {
    return static_cast<size_t>(((n * shape.h + y) * shape.w + x) * shape.c + k);
  }
  float s(size_t i) const {
    switch (type) {
      case SourceType::kInt16: return static_cast<float>(narrow[i]);
      case SourceType::kInt32: return static_cast<float>(wide[i]);
      default: return real[i];
    }
  }
  float row(int64_t i, int64_t k) const {
    return coefficients[static_cast<size_t>(i * shape.c + k)];
  }
  bool is_up(float v, int64_t k) const { return row(0, k) * v + row(1, k) >= 0.0f; }
  float t(int64_t n, int64_t y, int64_t x, int64_t k) const {
    const float v = s(at(n, y, x, k));
    return is_up(v, k) ? row(2, k) * v + row(3, k) : row(4, k) * v + row(5, k);
  }
  // The entry of a window that its maximum is taken from: the first that attains it, or the last NaN.
  int64_t place(int64_t n, int64_t y, int64_t x, int64_t k) const {
    int64_t found = 0;
    float most = t(n, y * pool, x * pool, k);
    for (int64_t i = 1; i < pool * pool; ++i) {
      const float next = t(n, y * pool + i / pool, x * pool + i % pool, k);
      if (!(next > most) && next == next) continue;
      most = next;
      found = i;
    }
    return found;
  }
  float pooled(int64_t n, int64_t y, int64_t x, int64_t k) const {
    const int64_t i = place(n, y, x, k);
    return t(n, y * pool + i / pool, x * pool + i % pool, k);
  }

  std::vector<float> activated() const {
    std::vector<float> out;
    for (int64_t n = 0; n < shape.n; ++n) {
      for (int64_t y = 0; y < rows_out(); ++y) {
        for (int64_t x = 0; x < columns_out(); ++x) {
          for (int64_t k = 0; k < shape.c; ++k) out.push_back(pooled(n, y, x, k));
        }
      }
    }
    return out;
  }

  // d on the entries before pooling, zero where a sample was not kept.
  std::vector<float> spread() const {
    std::vector<float> out(narrow.size());
    for (int64_t slot = 0; slot < kept().count; ++slot) {
      const int64_t n = kept().index(slot);
      for (int64_t y = 0; y < rows_out(); ++y) {
        for (int64_t x = 0; x < columns_out(); ++x) {
          for (int64_t k = 0; k < shape.c; ++k) {
            const float here = d[static_cast<size_t>(
                ((slot * rows_out() + y) * columns_out() + x) * shape.c + k)];
            const int64_t i = place(n, y, x, k);
            out[at(n, y * pool + i / pool, x * pool + i % pool, k)] = here;
          }
        }
      }
    }
    return out;
  }

  std::vector<float> moments() const {
    StripSums sums(6 * shape.c);
    const float *slope = coefficients.data(), *offset = slope + shape.c;
    for (int64_t n = 0; n < shape.n; ++n) {
      for (int64_t y = 0; y < shape.h; ++y) {
        for (int64_t x = 0; x < shape.w; ++x) {
          for (int64_t k = 0; k < shape.c; ++k) {
            const float v = s(at(n, y, x, k));
            const bool is_up = slope[k] * v + offset[k] >= 0.0f;
            const float high = is_up ? v : 0.0f, low = is_up ? 0.0f : v;
            const float one = is_up ? 1.0f : 0.0f, other = 1.0f - one;
            const float parts[] = {one, high, high * high, other, low, low * low};
            const double wide[] = {high, low};
            const double exact[] = {one,   wide[0], wide[0] * wide[0],
                                    other, wide[1], wide[1] * wide[1]};
            for (int64_t q = 0; q < 6; ++q) {
              sums.add(static_cast<size_t>(q * shape.c + k), parts[q], exact[q]);
            }
          }
        }
        if (is_weighted) {
          sums.flush(weight(n));
        } else {
          sums.end_row(shape.w);
        }
      }
      if ((n + 1) % samples_at_once(shape) == 0 || n + 1 == shape.n) sums.end_task();
    }
    std::vector<float> out;
    const auto count = static_cast<double>(shape.n * shape.h * shape.w);
    for (double sum : sums.all) out.push_back(static_cast<float>(sum * (1.0 / count)));
    return out;
  }

  std::vector<float> gradient_sums() const {
    const std::vector<float> spread_d = spread();
    StripSums sums(4 * shape.c);
    for (int64_t slot = 0; slot < kept().count; ++slot) {
      const int64_t n = kept().index(slot);
      for (int64_t y = 0; y < rows_out(); ++y) {
        for (int64_t i = 0; i < columns_out() * pool * pool; ++i) {  // window by window
          const int64_t x = i / (pool * pool), of_window = i % (pool * pool);
          for (int64_t k = 0; k < shape.c; ++k) {
            const size_t entry = at(n, y * pool + of_window / pool, x * pool + of_window % pool, k);
            const float here = spread_d[entry], v = s(entry);
            const int64_t side = is_up(v, k) ? 0 : 2;
            sums.add(static_cast<size_t>(side * shape.c + k), here, here);
            sums.add(static_cast<size_t>((side + 1) * shape.c + k), here * v,
                     static_cast<double>(here) * static_cast<double>(v));
          }
        }
        sums.end_row(columns_out() * pool * pool);
      }
      if ((slot + 1) % samples_at_once(shape) == 0 || slot + 1 == kept().count) sums.end_task();
    }
    return {sums.all.begin(), sums.all.end()};
  }

  std::vector<float> gradient() const {
    const std::vector<float> spread_d = spread();
    std::vector<float> out(narrow.size());
    for (int64_t n = 0; n < shape.n; ++n) {
      for (int64_t i = 0; i < shape.h * shape.w; ++i) {
        for (int64_t k = 0; k < shape.c; ++k) {
          const size_t entry = at(n, i / shape.w, i % shape.w, k);
          const float v = s(entry);
          const int64_t side = is_up(v, k) ? 6 : 9;
          const float h = is_weighted ? row(side + 1, k) * weight(n) : row(side + 1, k);
          const float flow = is_weighted ? row(side + 2, k) * weight(n) : row(side + 2, k);
          out[entry] = row(side, k) * spread_d[entry] + (h * v + flow);
        }
      }
    }
    return out;
  }

  // The least, or the greatest, of each sample and channel; NaN where one is.
  std::vector<float> bounds(const std::vector<float>& g, bool is_least) const {
    const float none = std::numeric_limits<float>::infinity();
    std::vector<float> out(static_cast<size_t>(shape.n * shape.c), is_least ? none : -none);
    for (size_t i = 0; i < g.size(); ++i) {
      const size_t c = static_cast<size_t>(shape.c);
      float& bound = out[i / (static_cast<size_t>(shape.h * shape.w) * c) * c + i % c];
      if ((is_least ? g[i] < bound : g[i] > bound) || g[i] != g[i]) bound = g[i];
    }
    return out;
  }
};

}  // namespace

bool check_transforms(uint64_t seed) {
  TransformCase c(seed);
  const Shape& shape = c.shape;
  const auto positive = [](float v) { return v >= 0.0f ? 1u : 0u; };
  const auto inside = [](float v) { return std::fabs(v) <= 1.0f ? 1u : 0u; };
  const std::vector<float> t = c.activated(), moments = c.moments(), g = c.gradient(),
                           sums = c.gradient_sums(), lo = c.bounds(g, true), hi = c.bounds(g, false);
  bool is_good = true;
  for (Isa isa : supported_isas()) {
    auto expect = [&](bool condition, const char* kernel) {
      if (condition) return;
      is_good = false;
      report(seed, kernel, isa, {{"n", shape.n}, {"h", shape.h},
                                 {"w", shape.w}, {"c", shape.c}, {"pool", c.pool}});
    };
    const float garbage = 12345;
    std::vector<float> out(t.size(), garbage);
    run(isa, ActivateArgs{c.args(), nullptr, nullptr, out.data()}, c.random);
    expect(same(out, t), "activate");
    std::vector<float> sum(t);
    for (size_t i = 0; i < t.size(); ++i) {
      sum[i] = t[i] + c.weights[i / (t.size() / static_cast<size_t>(shape.n))] + t[i];
    }
    run(isa, ActivateArgs{c.args(), c.weights.data(), t.data(), out.data()}, c.random);
    expect(same(out, sum), "activate and add");
    const std::vector<uint32_t> signs = packed(t, shape.n, positive), clip = packed(t, shape.n, inside);
    std::vector<uint32_t> got_signs(signs.size(), 99), got_clip(clip.size(), 99);
    std::vector<float> nan(static_cast<size_t>(shape.n), garbage);
    const auto words = static_cast<int64_t>(signs.size()) / shape.n;
    run(isa, EncodeArgs{c.args(), got_signs.data(), got_clip.data(), words, nan.data()}, c.random);
    std::vector<float> expected_nan(nan.size(), 0.0f);
    for (size_t i = 0; i < t.size(); ++i) {
      if (t[i] != t[i]) expected_nan[i / (t.size() / nan.size())] = t[i];
    }
    expect(got_signs == signs && got_clip == clip && same(nan, expected_nan), "encode");
    out.assign(moments.size(), garbage);
    run(isa, MomentsArgs{shape, c.source(), c.type, c.coefficients.data(), c.sample_weights(),
                          out.data()},
        c.random);
    expect(same(out, moments), "moments");
    out.assign(sums.size(), garbage);
    run(isa, GradientSumsArgs{c.args(), c.d.data(), c.kept(), out.data()}, c.random);
    expect(same(out, sums), "gradient_sums");
    out.assign(g.size(), garbage);
    std::vector<float> got_lo(lo.size(), garbage), got_hi(hi.size(), garbage);
    run(isa, GradientArgs{c.args(), c.d.data(), c.kept(), c.sample_weights(), out.data(),
                           got_lo.data(), got_hi.data()},
        c.random);
    expect(same(out, g), "gradient");
    expect(same(got_lo, lo) && same(got_hi, hi), "bounds");
  }
  return is_good;
}

}  // namespace fqt
