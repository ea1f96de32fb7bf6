// The integer products against a plain scalar reference.

#include "products.h"

#include <cmath>

#include "check.h"

namespace fqt {
namespace {

struct Signs {
  std::vector<uint32_t> words;
  int64_t row_words = 0, row_bits = 0;

  Signs(Random& random, int64_t rows, int64_t bits)
      : words(static_cast<size_t>(rows * ((bits + 31) / 32))),
        row_words((bits + 31) / 32),
        row_bits(bits) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t bit = 0; bit < bits; ++bit) {
        const auto word = static_cast<size_t>(row * row_words + bit / 32);
        words[word] |= static_cast<uint32_t>(random() & 1) << (bit % 32);
      }
    }
  }
  int sign(int64_t row, int64_t bit) const {
    return words[static_cast<size_t>(row * row_words + bit / 32)] >> (bit % 32) & 1 ? 1 : -1;
  }
  Bits bits() const { return {words.data(), row_words}; }
};

struct Selected {
  bool is_selected;
  std::vector<int32_t> indices;
  std::vector<float> weights;
  int64_t size;

  Selected(Random& random, int64_t n) : is_selected(pick(random, 0, 3) > 0), size(n) {
    if (!is_selected) return;
    for (int32_t i = 0; i < n; ++i) {
      if (random() & 1) continue;
      indices.push_back(i);
      weights.push_back(0.25f * static_cast<float>(pick(random, 0, 3) ? pick(random, 1, 40) : 0));
      if (pick(random, 0, 60) == 0) weights.back() = std::numeric_limits<float>::quiet_NaN();
    }
  }
  Kept kept() const {
    if (!is_selected) return {size, nullptr, nullptr};
    return {static_cast<int64_t>(indices.size()), indices.data(), weights.data()};
  }
};

// fqt_jax.rounding, word for word.
int64_t code(float g, float lo, float scale, const Rounding& rounding, int64_t index) {
  uint32_t x = static_cast<uint32_t>(index) ^ rounding.seed[0];
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x ^= rounding.seed[1];
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  x ^= x >> 15;
  const int64_t top = ((int64_t{1} << rounding.bits) - 1) << 16;
  const float t = (g - lo) * scale;
  int64_t fixed = 0;
  if (t >= static_cast<float>(top)) {
    fixed = top;
  } else if (t > 0) {
    fixed = static_cast<int64_t>(t);
  }
  return (fixed + (x >> 16)) >> 16;
}

struct Case {
  Random random;
  Geometry geometry;
  Signs x, w;
  std::vector<float> g;
  Selected samples, channels;
  std::vector<float> lo, range;  // enough for either axis
  Rounding rounding;
  int64_t threads;

  explicit Case(uint64_t seed)
      : random(seed),
        geometry(random_geometry(random)),
        x(random, geometry.n, geometry.y.in * geometry.x.in * geometry.c),
        w(random, 1, geometry.taps() * geometry.c * geometry.o),
        g(static_cast<size_t>(geometry.n * geometry.y.out * geometry.x.out * geometry.o)),
        samples(random, geometry.n),
        channels(random, geometry.o),
        rounding{},
        threads(pick(random, 1, 9)) {
    std::normal_distribution<float> normal;
    const bool is_special = pick(random, 0, 3) == 0;
    for (float& v : g) v = is_special ? special(random, normal(random)) : normal(random);
    for (int64_t i = 0; i < std::max(geometry.n, geometry.o); ++i) {
      lo.push_back(-2.0f - normal(random) * normal(random));
      range.push_back(0.5f + 4 * std::abs(normal(random)));
      if (is_special) lo.back() = special(random, lo.back());
      if (is_special) range.back() = std::abs(special(random, range.back()));
    }
    rounding = {static_cast<int>(pick(random, 1, 8)),
                {static_cast<uint32_t>(random()), static_cast<uint32_t>(random())},
                lo.data(),
                range.data()};
  }

  // In double where a product could overflow; see rounding.h.
  float dequantized(float weight, float step, float low, float sum, float signs) const {
    if (step * top() < 1e27f && std::fabs(low) < 1e27f) return weight * (step * sum + low * signs);
    const double w = weight, product = static_cast<double>(step) * static_cast<double>(sum);
    return static_cast<float>(w *
                              (product + static_cast<double>(low) * static_cast<double>(signs)));
  }
  float top() const { return static_cast<float>((1 << rounding.bits) - 1); }
  float scale(int64_t group) const {
    return static_cast<float>(((1 << rounding.bits) - 1) << 16) / range[static_cast<size_t>(group)];
  }
  int x_sign(int64_t n, int64_t y, int64_t x_at, int64_t c) const {
    return x.sign(n, (y * geometry.x.in + x_at) * geometry.c + c);
  }
  int w_sign(int64_t tap, int64_t c, int64_t o) const {
    return w.sign(0, (tap * geometry.c + c) * geometry.o + o);
  }
  int64_t g_index(int64_t n, int64_t y, int64_t x_at, int64_t o) const {
    return ((n * geometry.y.out + y) * geometry.x.out + x_at) * geometry.o + o;
  }

  // Calls visit(tap, in_y, in_x, out_y, out_x) for each tap inside the image.
  template <typename Visit>
  void for_taps(Visit visit) const {
    const Axis &ys = geometry.y, &xs = geometry.x;
    for (int64_t out_y = 0; out_y < ys.out; ++out_y) {
      for (int64_t out_x = 0; out_x < xs.out; ++out_x) {
        for (int64_t i = 0; i < ys.window; ++i) {
          for (int64_t j = 0; j < xs.window; ++j) {
            const int64_t in_y = out_y * ys.stride - ys.before + i;
            const int64_t in_x = out_x * xs.stride - xs.before + j;
            if (in_y < 0 || in_y >= ys.in || in_x < 0 || in_x >= xs.in) continue;
            visit(i * xs.window + j, in_y, in_x, out_y, out_x);
          }
        }
      }
    }
  }

  std::vector<int32_t> forward() const {
    std::vector<int32_t> z(g.size());
    for_taps([&](int64_t tap, int64_t in_y, int64_t in_x, int64_t out_y, int64_t out_x) {
      for (int64_t n = 0; n < geometry.n; ++n) {
        for (int64_t c = 0; c < geometry.c; ++c) {
          const int sign = x_sign(n, in_y, in_x, c);
          for (int64_t o = 0; o < geometry.o; ++o) {
            z[static_cast<size_t>(g_index(n, out_y, out_x, o))] += sign * w_sign(tap, c, o);
          }
        }
      }
    });
    return z;
  }

  std::vector<float> input_grad() const {
    const Kept kept = samples.kept();
    const int64_t image = geometry.y.in * geometry.x.in * geometry.c;
    std::vector<float> dx(static_cast<size_t>(geometry.n * image));
    std::vector<int64_t> sums(static_cast<size_t>(image)), signs(static_cast<size_t>(image));
    for (int64_t slot = 0; slot < kept.count; ++slot) {
      std::fill(sums.begin(), sums.end(), 0);
      std::fill(signs.begin(), signs.end(), 0);
      const int64_t n = kept.index(slot);
      const float low = lo[static_cast<size_t>(slot)];
      for_taps([&](int64_t tap, int64_t in_y, int64_t in_x, int64_t out_y, int64_t out_x) {
        for (int64_t o = 0; o < geometry.o; ++o) {
          const int64_t index = g_index(n, out_y, out_x, o);
          const int64_t q =
              code(g[static_cast<size_t>(index)], low, scale(slot), rounding, index);
          for (int64_t c = 0; c < geometry.c; ++c) {
            const auto at = static_cast<size_t>((in_y * geometry.x.in + in_x) * geometry.c + c);
            sums[at] += q * w_sign(tap, c, o);
            signs[at] += w_sign(tap, c, o);
          }
        }
      });
      const float weight = kept.weight(slot), step = range[static_cast<size_t>(slot)] / top();
      for (int64_t i = 0; i < image && weight != 0; ++i) {
        const auto at = static_cast<size_t>(i);
        dx[static_cast<size_t>(n * image + i)] = dequantized(
            weight, step, low, static_cast<float>(sums[at]), static_cast<float>(signs[at]));
      }
    }
    return dx;
  }

  std::vector<float> weight_grad() const {
    const Kept kept = samples.kept(), columns = channels.kept();
    const auto size = static_cast<size_t>(geometry.taps() * geometry.c * geometry.o);
    std::vector<float> dw(size);
    std::vector<int64_t> sums(size), signs(size);
    auto at = [&](int64_t tap, int64_t c, int64_t o) {
      return static_cast<size_t>((tap * geometry.c + c) * geometry.o + o);
    };
    for_taps([&](int64_t tap, int64_t in_y, int64_t in_x, int64_t out_y, int64_t out_x) {
      for (int64_t slot = 0; slot < kept.count; ++slot) {
        const float weight = kept.weight(slot);
        if (weight == 0) continue;
        for (int64_t k = 0; k < columns.count; ++k) {
          const int64_t o = columns.index(k);
          const int64_t index = g_index(kept.index(slot), out_y, out_x, o);
          const float low = lo[static_cast<size_t>(k)] * (1.0f / weight);
          const int64_t q = code(g[static_cast<size_t>(index)], low, scale(k) * weight, rounding,
                                 index);
          for (int64_t c = 0; c < geometry.c; ++c) {
            const int sign = x_sign(kept.index(slot), in_y, in_x, c);
            sums[at(tap, c, o)] += q * sign;
            signs[at(tap, c, o)] += sign;
          }
        }
      }
    });
    for (int64_t k = 0; k < columns.count; ++k) {
      const float weight = columns.weight(k);
      if (weight == 0) continue;
      const float step = range[static_cast<size_t>(k)] / top(), low = lo[static_cast<size_t>(k)];
      for (int64_t tap = 0; tap < geometry.taps(); ++tap) {
        for (int64_t c = 0; c < geometry.c; ++c) {
          const size_t i = at(tap, c, columns.index(k));
          dw[i] = dequantized(weight, step, low, static_cast<float>(sums[i]),
                              static_cast<float>(signs[i]));
        }
      }
    }
    return dw;
  }
};

}  // namespace

bool check_float_products(uint64_t seed) {
  Case c(seed);
  const Geometry& g = c.geometry;
  std::normal_distribution<float> normal;
  for (float& v : c.g) v = normal(c.random);
  for (size_t i = 0; i < c.lo.size(); ++i) {
    c.lo[i] = -2 - std::fabs(normal(c.random));
    c.range[i] = 1 + std::fabs(normal(c.random));
  }
  for (float& weight : c.samples.weights) weight = weight == weight ? weight : 0.5f;
  const bool rounds = pick(c.random, 0, 1) == 0;
  const Kept kept = c.samples.kept(), all{g.n, nullptr, nullptr};
  const Kept samples = rounds ? kept : all;
  Sums dx(static_cast<size_t>(g.n * g.y.in * g.x.in * g.c));
  Sums dw(static_cast<size_t>(g.taps() * g.c * g.o));
  c.for_taps([&](int64_t tap, int64_t in_y, int64_t in_x, int64_t out_y, int64_t out_x) {
    for (int64_t o = 0; o < g.o; ++o) {
      for (int64_t n = 0; n < g.n; ++n) {
        const double value = c.g[static_cast<size_t>(c.g_index(n, out_y, out_x, o))];
        for (int64_t i = 0; i < g.c; ++i) {
          dx.add(static_cast<size_t>(((n * g.y.in + in_y) * g.x.in + in_x) * g.c + i),
                 value * c.w_sign(tap, i, o));
        }
      }
      for (int64_t slot = 0; slot < samples.count; ++slot) {
        const int64_t n = samples.index(slot), index = c.g_index(n, out_y, out_x, o);
        const float weight = samples.weight(slot);
        double value = c.g[static_cast<size_t>(index)];
        if (weight == 0) continue;
        if (rounds) {
          const auto at = static_cast<size_t>(slot);
          const int64_t q = code(c.g[static_cast<size_t>(index)], c.lo[at], c.scale(slot), c.rounding,
                                 index);
          value = weight * (static_cast<double>(q) * c.range[at] / c.top() + c.lo[at]);
        }
        for (int64_t i = 0; i < g.c; ++i) {
          dw.add(static_cast<size_t>((tap * g.c + i) * g.o + o), value * c.x_sign(n, in_y, in_x, i));
        }
      }
    }
  });
  bool is_good = true;
  std::vector<float> first_dx, first_dw;
  for (Isa isa : supported_isas()) {
    std::vector<float> got_dx(dx.sums.size(), 12345), got_dw(dw.sums.size(), 12345);
    run(isa, FloatInputGradArgs{g, c.g.data(), c.w.bits(), Bits{nullptr, 0}, got_dx.data()}, c.random);
    run(isa, FloatWeightGradArgs{g, c.g.data(), c.x.bits(), samples, rounds, c.rounding, got_dw.data()},
        c.random);
    if (first_dx.empty()) first_dx = got_dx;
    if (first_dw.empty()) first_dw = got_dw;
    const bool is_same = same(got_dx, first_dx) && same(got_dw, first_dw);
    if (is_same && dx.agree(got_dx) && dw.agree(got_dw)) continue;
    is_good = false;
    report(seed, "float products", isa, {{"n", g.n}, {"c", g.c}, {"o", g.o}, {"rounds", rounds}});
  }
  return is_good;
}

bool check_products(uint64_t seed) {
  Case c(seed);
  const Geometry& g = c.geometry;
  const std::vector<int32_t> z = c.forward();
  const std::vector<float> dx = c.input_grad(), dw = c.weight_grad();
  bool is_good = true;
  for (Isa isa : supported_isas()) {
    auto expect = [&](bool condition, const char* product) {
      if (condition) return;
      is_good = false;
      report(seed, product, isa, {{"n", g.n}, {"c", g.c}, {"o", g.o}});
    };
    std::vector<int16_t> narrow(z.size(), -1);
    std::vector<int32_t> wide(z.size(), -1);
    run(isa, ForwardArgs{g, c.x.bits(), c.w.bits(), narrow.data(), false, c.threads}, c.random);
    run(isa, ForwardArgs{g, c.x.bits(), c.w.bits(), wide.data(), true, c.threads}, c.random);
    expect(std::vector<int32_t>(narrow.begin(), narrow.end()) == z && wide == z, "forward");
    const float garbage = 12345;
    std::vector<float> out(dx.size(), garbage);
    run(isa, InputGradArgs{g, c.g.data(), c.w.bits(), c.samples.kept(), c.rounding, Bits{nullptr, 0},
                             true, out.data(), c.threads},
        c.random);
    expect(same(out, dx), "input_grad");
    out.assign(dw.size(), garbage);
    run(isa, WeightGradArgs{g, c.g.data(), c.x.bits(), c.samples.kept(), c.channels.kept(),
                              c.rounding, out.data(), c.threads},
        c.random);
    expect(same(out, dw), "weight_grad");
  }
  return is_good;
}

}  // namespace fqt
