// The float convolution against one in double.

#include "float_conv.h"

#include "check.h"

namespace fqt {

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
  Sums y(dy.size()), dw(w.size());
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
          y.add(to, v * w[of]);
          dw.add(of, v * dy[to]);
        }
      }
    }
  }
  bool is_good = true;
  for (Isa isa : supported_isas()) {
    std::vector<float> got_y(dy.size(), 12345), got_dw(w.size(), 12345);
    run(isa, FloatConvArgs{g, x.data(), w.data(), got_y.data()}, random);
    run(isa, FloatConvWeightGradArgs{g, x.data(), dy.data(), got_dw.data()}, random);
    if (y.agree(got_y) && dw.agree(got_dw)) continue;
    is_good = false;
    report(seed, "float_conv", isa, {{"n", g.n}, {"c", g.c}, {"o", g.o}});
  }
  return is_good;
}

}  // namespace fqt
