// Drives the kernels against a plain scalar reference over random shapes and values, without
// Python: for sanitizers, and for machines that only an emulator can run.
//
//   check FIRST_SEED CASES
//
// Results must agree bit for bit: sums are integers, and floats are computed in one fixed order.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "denormals.h"
#include "isa.h"

namespace fqt {
namespace {

using Random = std::mt19937_64;

int64_t pick(Random& random, int64_t first, int64_t last) {
  return first + static_cast<int64_t>(random() % static_cast<uint64_t>(last - first + 1));
}

template <typename T>
T choose(Random& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

Axis random_axis(Random& random) {
  Axis axis{pick(random, 1, 9), 0, pick(random, 1, 4), choose<int64_t>(random, {1, 1, 2, 3}), 0};
  axis.before = pick(random, 0, 4);
  int64_t after = pick(random, 0, 4);
  while (axis.in + axis.before + after < axis.window) ++after;
  axis.out = (axis.in + axis.before + after - axis.window) / axis.stride + 1;
  return axis;
}

Geometry random_geometry(Random& random) {
  const std::initializer_list<int64_t> channels = {0,  1,  2,  3,  4,  5,  8,  15, 16,  17,
                                                   31, 32, 33, 63, 64, 65, 96, 97, 130, 200};
  Geometry g{choose<int64_t>(random, {0, 1, 2, 3, 4, 5, 8, 13, 33}), choose(random, channels),
             choose(random, channels), random_axis(random), random_axis(random)};
  if (pick(random, 0, 9) == 0) g.y = g.x = {1, 1, 1, 1, 0};  // a dense layer
  if (pick(random, 0, 9) == 0) g.n = pick(random, 120, 270);  // several blocks of samples
  if (pick(random, 0, 9) == 0) g.y = {40, 40, 3, 1, 1};       // several blocks of rows
  return g;
}

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

float special(Random& random, float value) {
  switch (pick(random, 0, 400)) {
    case 0: return std::numeric_limits<float>::quiet_NaN();
    case 1: return std::numeric_limits<float>::infinity();
    case 2: return -std::numeric_limits<float>::infinity();
    case 3: return 1e-42f;
    case 4: return -3e38f;
    default: return value;
  }
}

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

void run(std::unique_ptr<Product> product, Random& random) {
  std::vector<int64_t> order(static_cast<size_t>(product->tasks()));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t task : order) product->run(task);
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !(a[i] != a[i] && b[i] != b[i])) return false;
  }
  return a.size() == b.size();
}

bool check(uint64_t seed) {
  Case c(seed);
  const Geometry& g = c.geometry;
  const std::vector<int32_t> z = c.forward();
  const std::vector<float> dx = c.input_grad(), dw = c.weight_grad();
  bool is_good = true;
  for (const Kernels* kernels : supported_kernels()) {
    auto expect = [&](bool condition, const char* product) {
      if (condition) return;
      is_good = false;
      std::printf("seed %llu: %s of %s differs (n %lld c %lld o %lld)\n",
                  static_cast<unsigned long long>(seed), product, kernels->isa,
                  static_cast<long long>(g.n), static_cast<long long>(g.c),
                  static_cast<long long>(g.o));
    };
    std::vector<int16_t> narrow(z.size(), -1);
    std::vector<int32_t> wide(z.size(), -1);
    run(kernels->forward({g, c.x.bits(), c.w.bits(), narrow.data(), false, c.threads}), c.random);
    run(kernels->forward({g, c.x.bits(), c.w.bits(), wide.data(), true, c.threads}), c.random);
    expect(std::vector<int32_t>(narrow.begin(), narrow.end()) == z && wide == z, "forward");
    const float garbage = 12345;
    std::vector<float> out(dx.size(), garbage);
    run(kernels->input_grad({g, c.g.data(), c.w.bits(), c.samples.kept(), c.rounding, Bits{nullptr, 0},
                             true, out.data(), c.threads}),
        c.random);
    expect(same(out, dx), "input_grad");
    out.assign(dw.size(), garbage);
    run(kernels->weight_grad({g, c.g.data(), c.x.bits(), c.samples.kept(), c.channels.kept(),
                              c.rounding, out.data(), c.threads}),
        c.random);
    expect(same(out, dw), "weight_grad");
  }
  return is_good;
}

#include "transforms.h"

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
  for (const Kernels* kernels : supported_kernels()) {
    std::vector<float> got_u(g), got_m(m), got_v(v);
    run(kernels->adam({size, got_u.data(), got_m.data(), got_v.data(), f}), random);
    if (same(got_u, u) && same(got_m, new_m) && same(got_v, new_v)) continue;
    is_good = false;
    std::printf("seed %llu: adam of %s differs (size %lld)\n",
                static_cast<unsigned long long>(seed), kernels->isa, static_cast<long long>(size));
  }
  return is_good;
}

// Sums of floats, against doubles: they differ by rounding of what is summed.
bool check_float_conv(uint64_t seed) {
  Random random(seed);
  Geometry g = random_geometry(random);
  g.n = pick(random, 1, pick(random, 0, 9) == 0 ? 140 : 5);
  g.c = pick(random, 1, 5);
  g.o = choose<int64_t>(random, {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 70});
  std::normal_distribution<float> normal;
  const auto size = [](int64_t a, int64_t b, int64_t c, int64_t d) {
    return static_cast<size_t>(a * b * c * d);
  };
  std::vector<float> x(size(g.n, g.y.in, g.x.in, g.c)), w(size(g.taps(), g.c, g.o, 1)),
      dy(size(g.n, g.y.out, g.x.out, g.o));
  for (auto* values : {&x, &w, &dy}) {
    for (float& value : *values) value = normal(random);
  }
  std::vector<double> y(dy.size()), dw(w.size()), y_size(dy.size()), dw_size(w.size());
  for (int64_t n = 0; n < g.n; ++n) {
    for (int64_t i = 0; i < g.y.out * g.x.out * g.taps(); ++i) {
      const int64_t tap = i % g.taps(), out_y = i / g.taps() / g.x.out, out_x = i / g.taps() % g.x.out;
      const int64_t in_y = out_y * g.y.stride - g.y.before + tap / g.x.window;
      const int64_t in_x = out_x * g.x.stride - g.x.before + tap % g.x.window;
      if (in_y < 0 || in_y >= g.y.in || in_x < 0 || in_x >= g.x.in) continue;
      for (int64_t c = 0; c < g.c; ++c) {
        const double v = x[static_cast<size_t>(((n * g.y.in + in_y) * g.x.in + in_x) * g.c + c)];
        for (int64_t o = 0; o < g.o; ++o) {
          const auto to = static_cast<size_t>(((n * g.y.out + out_y) * g.x.out + out_x) * g.o + o);
          const auto of = static_cast<size_t>((tap * g.c + c) * g.o + o);
          y[to] += v * w[of];
          y_size[to] += std::fabs(v * w[of]);
          dw[of] += v * dy[to];
          dw_size[of] += std::fabs(v * dy[to]);
        }
      }
    }
  }
  const auto is_close = [](const std::vector<float>& got, const std::vector<double>& wanted,
                           const std::vector<double>& sizes) {
    for (size_t i = 0; i < got.size(); ++i) {
      if (!(std::fabs(got[i] - wanted[i]) <= 1e-5 * sizes[i])) return false;
    }
    return true;
  };
  bool is_good = true;
  for (const Kernels* kernels : supported_kernels()) {
    std::vector<float> got_y(y.size(), 12345), got_dw(dw.size(), 12345);
    run(kernels->float_conv({g, x.data(), w.data(), got_y.data()}), random);
    run(kernels->float_conv_weight_grad({g, x.data(), dy.data(), got_dw.data()}), random);
    if (is_close(got_y, y, y_size) && is_close(got_dw, dw, dw_size)) continue;
    is_good = false;
    std::printf("seed %llu: float_conv of %s differs (n %lld c %lld o %lld)\n",
                static_cast<unsigned long long>(seed), kernels->isa, static_cast<long long>(g.n),
                static_cast<long long>(g.c), static_cast<long long>(g.o));
  }
  return is_good;
}

}  // namespace
}  // namespace fqt

int main(int argc, char** argv) {
  const fqt::FlushDenormals flush;
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t cases = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 100;
  uint64_t failed = 0;
  for (uint64_t seed = first; seed < first + cases; ++seed) {
    failed += !fqt::check(seed);
    failed += !fqt::check_transforms(seed);
    failed += !fqt::check_adam(seed);
    failed += !fqt::check_float_conv(seed);
  }
  for (const fqt::Kernels* kernels : fqt::supported_kernels()) std::printf("%s ", kernels->isa);
  std::printf("kernels: %llu of %llu cases agree with the reference\n",
              static_cast<unsigned long long>(4 * cases - failed),
              static_cast<unsigned long long>(4 * cases));
  return failed != 0;
}
