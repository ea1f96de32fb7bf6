// The backward pass of what stands between two integer products; see transform.h.

namespace fqt::FQT_ISA {

// The gradient of a window's maximum goes to the first entry that attains it, or the last that is
// NaN, as in fqt_jax.pooling. Calls `take(offset, v, here)` for each entry v of the window, with what
// goes there.
template <typename V, typename Source, typename Take>
inline void route(const Source* s, const TransformArgs& args, const LineOf<V>& line, V d,
                  Take& take) {
  using Place = std::conditional_t<std::is_same_v<V, float>, int32_t, IntVec>;
  const int64_t c = args.shape.c, row = args.shape.w * c;
  const auto entries = static_cast<int32_t>(args.pool * args.pool);
  const auto offset = [=](int32_t i) { return i / args.pool * row + i % args.pool * c; };
  V most = line.t(load_floats<V>(s));
  Place place = {};
  for (int32_t i = 1; i < entries; ++i) {
    const V t = line.t(load_floats<V>(s + offset(i)));
    const auto more = is_more(t, most);
    most = more ? t : most;
    place = more ? Place{} + i : place;
  }
  for (int32_t i = 0; i < entries; ++i) {
    take(offset(i), load_floats<V>(s + offset(i)), place == i ? d : V{});
  }
}

// Sums of d and d s, where up and where not, in some channels. V is a FloatVec of them or a float;
// the sums of a float may be doubles.
template <typename V, typename Sum = V>
struct AddToSums {
  V S, T;
  Sum up, up_s, down, down_s;

  template <typename Element>
  AddToSums(const float* rows, int64_t c, const Element* from)
      : S(load_as<V>(rows)), T(load_as<V>(rows + c)), up(load_as<Sum>(from)),
        up_s(load_as<Sum>(from + c)), down(load_as<Sum>(from + 2 * c)),
        down_s(load_as<Sum>(from + 3 * c)) {}

  void operator()(int64_t /*offset*/, V v, V d) {
    const Sum here = d, product = here * static_cast<Sum>(v), zero = {};
    const auto is_up = S * v + T >= 0.0f;
    up += is_up ? here : zero;
    up_s += is_up ? product : zero;
    down += is_up ? zero : here;
    down_s += is_up ? zero : product;
  }

  template <typename Element>
  void store(int64_t c, Element* to) const {
    store_floats(to, up);
    store_floats(to + c, up_s);
    store_floats(to + 2 * c, down);
    store_floats(to + 3 * c, down_s);
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
    sum_group<float>(task, first, last);
    if (!sums_.is_finite(task)) sum_group<double>(task, first, last);
  }

  template <typename Sum>
  void sum_group(int64_t task, int64_t first, int64_t last) {
    const TransformArgs& transform = args_.transform;
    const Shape& shape = transform.shape;
    const int64_t c = shape.c, pool = transform.pool, columns = shape.w / pool;
    ChannelSums::Strips<Sum> strips(sums_, task);
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
      take.store(c, sums + k);
    });
  }

  void add(const Source* s, const float* d, double* sums) const {
    const int64_t c = args_.transform.shape.c;
    for (int64_t k = 0; k < c; ++k) {
      const float* rows = args_.transform.coefficients + k;
      AddToSums<float, double> take(rows, c, sums + k);
      take_window(s + k, args_.transform, rows, d[k], take);
      take.store(c, sums + k);
    }
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
    // NaN is taken, and stays: nothing is less or more.
    const auto nan = value != value;
    least = (value < least) | nan ? value : least;
    most = (value > most) | nan ? value : most;
  }

  void store() const {
    store_floats(lo, least);
    store_floats(hi, most);
  }
};

// g, and its least and greatest entry for each sample and channel, NaN where one is. Where there is no
// gradient d, in samples that were not kept and in rows and columns that pooling leaves out, d is
// zero.
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
