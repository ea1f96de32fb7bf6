// The backward pass of what stands between two integer products; see transform.h.

namespace fqt::FQT_ISA {

// The gradient of a window's maximum goes to the first entry that attains it. Calls
// `take(offset, v, here)` for each entry v of the window, with what goes there.
template <typename V, typename Source, typename Take>
inline void route(const Source* s, const TransformArgs& args, const LineOf<V>& line, V d,
                  Take& take) {
  const int64_t c = args.shape.c, row = args.shape.w * c;
  V most = line.t(load_floats<V>(s));
  for (int64_t i = 0; i < args.pool; ++i) {
    for (int64_t j = 0; j < args.pool; ++j) {
      const V t = line.t(load_floats<V>(s + i * row + j * c));
      most = most > t ? most : t;
    }
  }
  const V zero = {};
  for (int64_t i = 0; i < args.pool; ++i) {
    for (int64_t j = 0; j < args.pool; ++j) {
      const int64_t offset = i * row + j * c;
      const V v = load_floats<V>(s + offset), t = line.t(v);
      const V here = t == most ? d : zero;
      d = t == most ? zero : d;
      take(offset, v, here);
    }
  }
}

// Sums of d and d s, where up and where not, in some channels.
template <typename V>
struct AddToSums {
  const int64_t c;
  float* const sums;
  V S, T, up, up_s, down, down_s;

  AddToSums(const float* rows, int64_t channels, float* to)
      : c(channels), sums(to), S(load_as<V>(rows)), T(load_as<V>(rows + c)), up(load_as<V>(to)),
        up_s(load_as<V>(to + c)), down(load_as<V>(to + 2 * c)), down_s(load_as<V>(to + 3 * c)) {}

  void operator()(int64_t /*offset*/, V v, V d) {
    const V zero = {}, side = S * v + T;
    const V high = side >= 0.0f ? d : zero, low = side >= 0.0f ? zero : d;
    up += high;
    up_s += high * v;
    down += low;
    down_s += low * v;
  }

  void store() const {
    store_floats(sums, up);
    store_floats(sums + c, up_s);
    store_floats(sums + 2 * c, down);
    store_floats(sums + 3 * c, down_s);
  }
};

// Hands the entries of a window, or the only one, and what goes to each to `take`.
template <typename V, typename Source, typename Take>
inline void take_window(const Source* s, const TransformArgs& args, const float* rows, V d,
                        Take& take) {
  if (args.pool == 1) {
    take(0, load_floats<V>(s), d);
  } else {
    route(s, args, LineOf<V>(rows, args.shape.c), d, take);
  }
}

// Sums of d and d s, where up and where not.
template <typename Source>
class GradientSums final : public PerGroup {
 public:
  explicit GradientSums(const GradientSumsArgs& args)
      : PerGroup(args.samples.count, samples_at_once(args.transform.shape)), args_(args),
        sums_(tasks(), 4, args.transform.shape.c) {}

 private:
  void run_group(int64_t task, int64_t first, int64_t last) override {
    const TransformArgs& transform = args_.transform;
    const Shape& shape = transform.shape;
    const int64_t c = shape.c, pool = transform.pool, columns = shape.w / pool;
    ChannelSums::Strips strips(sums_, task);
    const float* d = args_.d + first * (shape.h / pool) * columns * c;
    for (int64_t slot = first; slot < last; ++slot) {
      for (int64_t y = 0; y < shape.h / pool; ++y) {
        const Source* s = source_row<Source>(transform, args_.samples.index(slot), y * pool);
        for (int64_t x = 0; x < columns; ++x, s += pool * c, d += c) add(s, d, strips.data());
        strips.advance(columns * pool * pool);
      }
    }
    strips.flush();
  }

  void add(const Source* s, const float* d, float* sums) const {
    const TransformArgs transform = args_.transform;  // whose copy no store to sums can change
    const int64_t c = transform.shape.c;
    for_channels(c, [=](auto kind, int64_t k) {
      using V = decltype(kind);
      const float* rows = transform.coefficients + k;
      AddToSums<V> take(rows, c, sums + k);
      take_window(s + k, transform, rows, load_as<V>(d + k), take);
      take.store();
    });
  }

  void finish() override { sums_.write(1.0, args_.sums); }

  const GradientSumsArgs args_;
  const ChannelSums sums_;
};

// Entries of g in some channels, and the bounds so far.
template <typename V>
struct TakeGradient {
  float *const g, *const lo, *const hi;
  V S, T, G1, H1, K1, G0, H0, K0, least, most;

  TakeGradient(const float* rows, int64_t c, float* to, float* low, float* high)
      : g(to), lo(low), hi(high), S(load_as<V>(rows)), T(load_as<V>(rows + c)),
        G1(load_as<V>(rows + 6 * c)), H1(load_as<V>(rows + 7 * c)), K1(load_as<V>(rows + 8 * c)),
        G0(load_as<V>(rows + 9 * c)), H0(load_as<V>(rows + 10 * c)),
        K0(load_as<V>(rows + 11 * c)), least(load_as<V>(low)), most(load_as<V>(high)) {}

  void operator()(int64_t offset, V v, V d) {
    const V above = G1 * d + (H1 * v + K1), below = G0 * d + (H0 * v + K0);
    const V value = S * v + T >= 0.0f ? above : below;
    store_floats(g + offset, value);
    least = value < least ? value : least;
    most = value > most ? value : most;
  }

  void store() const {
    store_floats(lo, least);
    store_floats(hi, most);
  }
};

// g, and its least and greatest entry for each sample and channel. Without a gradient d, that of
// samples that were not kept and of rows and columns that pooling leaves out, d is zero.
template <typename Source>
class Gradient final : public PerSample {
 public:
  explicit Gradient(const GradientArgs& args)
      : PerSample(args.transform.shape.n), args_(args),
        slots_(static_cast<size_t>(args.transform.shape.n), -1) {
    for (int64_t slot = 0; slot < args.samples.count; ++slot) {
      slots_[static_cast<size_t>(args.samples.index(slot))] = slot;
    }
  }

  void run(int64_t n) override {
    const TransformArgs& transform = args_.transform;
    const Shape& shape = transform.shape;
    const int64_t c = shape.c, pool = transform.pool, slot = slots_[static_cast<size_t>(n)];
    const Buffer<float> weighted(args_.weights == nullptr ? 0 : 12 * c);
    const float* coefficients = transform.coefficients;
    if (args_.weights != nullptr) {
      std::copy_n(coefficients, 12 * c, weighted.data());
      for (const int64_t row : {7, 8, 10, 11}) {  // H1, K1, H0, K0: what flows through moments
        for (int64_t k = 0; k < c; ++k) weighted[row * c + k] *= args_.weights[n];
      }
      coefficients = weighted.data();
    }
    float *lo = args_.lo + n * c, *hi = args_.hi + n * c;
    std::fill_n(lo, c, std::numeric_limits<float>::infinity());
    std::fill_n(hi, c, -std::numeric_limits<float>::infinity());
    const int64_t rows_out = shape.h / pool, columns = shape.w / pool;
    for (int64_t y = 0; y < shape.h; ++y) {
      const Source* s = source_row<Source>(transform, n, y);
      float* g = args_.g + (n * shape.h + y) * shape.w * c;
      int64_t x = 0;
      if (slot >= 0 && y < rows_out * pool) {
        const float* d = args_.d + (slot * rows_out + y / pool) * columns * c;
        x = columns * pool;
        for (int64_t i = 0; i < columns && y % pool == 0; ++i) {
          run_window(s + i * pool * c, d + i * c, coefficients, g + i * pool * c, lo, hi);
        }
      }
      for (; x < shape.w; ++x) run_zero(s + x * c, coefficients, g + x * c, lo, hi);
    }
    for (int64_t k = 0; k < c; ++k) {
      if (lo[k] > hi[k]) lo[k] = hi[k] = std::numeric_limits<float>::quiet_NaN();  // all are NaN
    }
  }

 private:
  void run_window(const Source* s, const float* d, const float* coefficients, float* g, float* lo,
                  float* hi) const {
    const TransformArgs transform = args_.transform;  // whose copy no store to g can change
    const int64_t c = transform.shape.c;
    for_channels(c, [=](auto kind, int64_t k) {
      using V = decltype(kind);
      const float* rows = coefficients + k;
      TakeGradient<V> take(rows, c, g + k, lo + k, hi + k);
      take_window(s + k, transform, rows, load_as<V>(d + k), take);
      take.store();
    });
  }

  void run_zero(const Source* s, const float* coefficients, float* g, float* lo, float* hi) const {
    const int64_t c = args_.transform.shape.c;
    for_channels(c, [=](auto kind, int64_t k) {
      using V = decltype(kind);
      TakeGradient<V> take(coefficients + k, c, g + k, lo + k, hi + k);
      take(0, load_floats<V>(s + k), V{});
      take.store();
    });
  }

  const GradientArgs args_;
  std::vector<int64_t> slots_;
};

}  // namespace fqt::FQT_ISA
