// What stands between two integer products: norm, activation and pooling, as one function of each
// entry of the sums that is linear on either side of a kink.
//
// With s an entry of channel c and up = [S s + T >= 0],
//
//   t = up ? P1 s + Q1 : P0 s + Q0                          forward, then a maximum over windows
//   g = (up ? G1 : G0) d + (up ? H1 s + K1 : H0 s + K0)     backward, d the gradient of t
//
// All sums of floats are taken sample by sample in one order, whatever the number of threads.

namespace fqt::FQT_ISA {

template <typename Source>
const Source* source_row(const TransformArgs& args, int64_t n, int64_t y) {
  return static_cast<const Source*>(args.s) + (n * args.shape.h + y) * args.shape.w * args.shape.c;
}

template <typename Source>
void transform_row(const Source* __restrict s, int64_t positions, int64_t c,
                   const float* __restrict coefficients, float* __restrict t) {
  const float *__restrict S = coefficients, *__restrict T = S + c, *__restrict P1 = T + c,
              *__restrict Q1 = P1 + c, *__restrict P0 = Q1 + c, *__restrict Q0 = P0 + c;
  for (int64_t i = 0; i < positions; ++i, s += c, t += c) {
    for (int64_t k = 0; k < c; ++k) {
      const auto v = static_cast<float>(s[k]);
      // Both sides, then a choice: only so does a compiler make vectors of it.
      const float above = P1[k] * v + Q1[k], below = P0[k] * v + Q0[k];
      t[k] = S[k] * v + T[k] >= 0.0f ? above : below;
    }
  }
}

// Rows of one sample, transformed and pooled.
template <typename Source>
class Rows {
 public:
  explicit Rows(const TransformArgs& args)
      : args_(args), rows_(args.pool * row_size()), pooled_(args.pool > 1 ? pooled_size() : 0) {}

  int64_t row_size() const { return args_.shape.w * args_.shape.c; }
  int64_t pooled_size() const { return args_.shape.w / args_.pool * args_.shape.c; }

  // The pooled row y.
  const float* pooled(int64_t n, int64_t y) {
    const int64_t pool = args_.pool, c = args_.shape.c;
    transform_row(source_row<Source>(args_, n, y * pool), pool * args_.shape.w, c, args_.coefficients, rows_.data());
    if (pool == 1) return rows_.data();
    for (int64_t x = 0; x < args_.shape.w / pool; ++x) {
      float* __restrict out = pooled_.data() + x * c;
      for (int64_t i = 0; i < pool; ++i) {
        const float* __restrict in = rows_.data() + i * row_size() + x * pool * c;
        for (int64_t j = 0; j < pool; ++j, in += c) {
          if (i + j == 0) {
            std::copy_n(in, c, out);
          } else {
            for (int64_t k = 0; k < c; ++k) out[k] = out[k] > in[k] ? out[k] : in[k];
          }
        }
      }
    }
    return pooled_.data();
  }

 private:
  const TransformArgs& args_;
  const Buffer<float> rows_, pooled_;
};

// One task for each sample.
class PerSample : public Product {
 public:
  explicit PerSample(int64_t samples) : samples_(samples) {}
  int64_t tasks() const override { return samples_; }
  void run(int64_t task) override { run_sample(task); }

 protected:
  virtual void run_sample(int64_t n) = 0;

 private:
  const int64_t samples_;
};

// One task for each group of neighbouring samples; whoever ends the last one finishes.
class PerGroup : public Product {
 public:
  PerGroup(int64_t samples, int64_t at_once)
      : samples_(samples), at_once_(at_once), remaining_(ceil_div(samples, at_once)) {}
  int64_t tasks() const override { return ceil_div(samples_, at_once_); }
  void run(int64_t task) override {
    run_group(task, task * at_once_, std::min(samples_, (task + 1) * at_once_));
    if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) finish();
  }

 protected:
  virtual void run_group(int64_t task, int64_t first, int64_t last) = 0;
  virtual void finish() = 0;

 private:
  const int64_t samples_, at_once_;
  std::atomic<int64_t> remaining_;
};

// Sums over all samples and positions of several quantities of each channel: floats over strips of
// some positions, then doubles, one row of them for each task.
class ChannelSums {
 public:
  ChannelSums(int64_t tasks, int64_t quantities, int64_t c)
      : tasks_(tasks), size_(quantities * c), sums_(tasks * size_) {}

  // The strips of one task.
  class Strips {
   public:
    Strips(const ChannelSums& all, int64_t task)
        : size_(all.size_), sums_(all.sums_.data() + task * size_), strip_(size_) {
      std::fill_n(sums_, size_, 0.0);
      std::fill_n(strip_.data(), size_, 0.0f);
    }
    float* data() const { return strip_.data(); }
    // So many positions have been added to data().
    void advance(int64_t positions) {
      positions_ += positions;
      if (positions_ >= kStrip) flush();
    }
    void flush(float weight = 1.0f) {
      const auto factor = static_cast<double>(weight);
      for (int64_t k = 0; k < size_; ++k) sums_[k] += factor * static_cast<double>(strip_[k]);
      std::fill_n(strip_.data(), size_, 0.0f);
      positions_ = 0;
    }

   private:
    const int64_t size_;
    double* const sums_;
    const Buffer<float> strip_;
    int64_t positions_ = 0;
  };

  void write(double factor, float* out) const {
    for (int64_t k = 0; k < size_; ++k) {
      double sum = 0.0;
      for (int64_t task = 0; task < tasks_; ++task) sum += sums_[task * size_ + k];
      out[k] = static_cast<float>(sum * factor);
    }
  }

 private:
  const int64_t tasks_, size_;
  const Buffer<double> sums_;
};

// Adds a row to the sums of s and s^2, where s >= 0 and where it is not.
template <typename Source>
void add_moments(const Source* __restrict s, int64_t positions, int64_t c, float* __restrict up,
                 float* __restrict up2, float* __restrict down, float* __restrict down2) {
  for (int64_t x = 0; x < positions; ++x, s += c) {
    for (int64_t k = 0; k < c; ++k) {
      const auto v = static_cast<float>(s[k]);
      // NaN goes down.
      const float high = v >= 0.0f ? v : 0.0f, low = v >= 0.0f ? 0.0f : v;
      up[k] += high;
      up2[k] += high * high;
      down[k] += low;
      down2[k] += low * low;
    }
  }
}

// Means over samples and positions of s and s^2, where s >= 0 and where it is not; samples count
// by their weights.
template <typename Source>
class Moments final : public PerGroup {
 public:
  explicit Moments(const MomentsArgs& args)
      : PerGroup(args.shape.n, samples_at_once(args.shape)), args_(args),
        sums_(tasks(), 4, args.shape.c) {}

 private:
  void run_group(int64_t task, int64_t first, int64_t last) override {
    const int64_t c = args_.shape.c, w = args_.shape.w, rows = args_.shape.h;
    ChannelSums::Strips strips(sums_, task);
    float* at = strips.data();
    const Source* s = static_cast<const Source*>(args_.s) + first * rows * w * c;
    for (int64_t n = first; n < last; ++n) {
      for (int64_t y = 0; y < rows; ++y, s += w * c) {
        add_moments(s, w, c, at, at + c, at + 2 * c, at + 3 * c);
        if (args_.weights == nullptr) {
          strips.advance(w);
        } else {
          strips.flush(args_.weights[n]);
        }
      }
    }
    strips.flush();
  }

  void finish() override {
    const auto count = static_cast<double>(args_.shape.n * args_.shape.h * args_.shape.w);
    sums_.write(1.0 / count, args_.moments);
  }

  const MomentsArgs args_;
  const ChannelSums sums_;
};

// Signs and clip mask of t, as PackedBits.
template <typename Source>
class Encode final : public PerSample {
 public:
  explicit Encode(const EncodeArgs& args) : PerSample(args.transform.shape.n), args_(args) {}

 private:
  void run_sample(int64_t n) override {
    const Shape& shape = args_.transform.shape;
    Rows<Source> rows(args_.transform);
    const int64_t size = rows.pooled_size();
    // Where a row does not end with a word, its rest goes before the next one.
    const Buffer<float> carried(size + 32);
    int64_t rest = 0;
    uint32_t* signs = args_.signs + n * args_.row_words;
    uint32_t* clip = args_.clip + n * args_.row_words;
    int32_t nans = 0;
    for (int64_t y = 0; y < shape.h / args_.transform.pool; ++y) {
      const float* t = rows.pooled(n, y);
      if (std::is_floating_point_v<Source>) {
        for (int64_t i = 0; i < size; ++i) nans |= t[i] != t[i] ? 1 : 0;
      }
      int64_t count = size;
      if (rest != 0 || size % 32 != 0) {
        std::copy_n(t, size, carried.data() + rest);
        t = carried.data();
        count += rest;
      }
      for (; count >= 32; count -= 32, t += 32) sign_masks(t, signs++, clip++);
      std::copy(t, t + count, carried.data());
      rest = count;
    }
    if (rest > 0) {
      std::fill_n(carried.data() + rest, 32 - rest, std::numeric_limits<float>::quiet_NaN());
      sign_masks(carried.data(), signs, clip);
    }
    args_.nan[n] = nans != 0 ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  }

  const EncodeArgs args_;
};

// t itself, and what is added to it.
template <typename Source>
class Activate final : public PerSample {
 public:
  explicit Activate(const ActivateArgs& args) : PerSample(args.transform.shape.n), args_(args) {}

 private:
  void run_sample(int64_t n) override {
    const int64_t rows_out = args_.transform.shape.h / args_.transform.pool;
    const float offset = args_.offsets == nullptr ? 0.0f : args_.offsets[n];
    Rows<Source> rows(args_.transform);
    const int64_t size = rows.pooled_size();
    for (int64_t y = 0; y < rows_out; ++y) {
      const int64_t first = (n * rows_out + y) * size;
      const float* __restrict t = rows.pooled(n, y);
      float* __restrict out = args_.t + first;
      if (args_.added == nullptr) {
        for (int64_t i = 0; i < size; ++i) out[i] = t[i] + offset;
      } else {
        const float* __restrict added = args_.added + first;
        for (int64_t i = 0; i < size; ++i) out[i] = t[i] + offset + added[i];
      }
    }
  }

  const ActivateArgs args_;
};

// The function in some channels, in registers: for windows that are pooled.
template <typename V>
struct LineOf {
  V S, T, P1, Q1, P0, Q0;

  LineOf(const float* rows, int64_t c)
      : S(load_as<V>(rows)), T(load_as<V>(rows + c)), P1(load_as<V>(rows + 2 * c)),
        Q1(load_as<V>(rows + 3 * c)), P0(load_as<V>(rows + 4 * c)), Q0(load_as<V>(rows + 5 * c)) {}

  V t(V v) const { return S * v + T >= 0.0f ? P1 * v + Q1 : P0 * v + Q0; }
};

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

// Adds a row to the sums of d and d s, where up and where not.
template <typename Source>
void add_gradient_sums(const Source* __restrict s, const float* __restrict d, int64_t positions,
                       int64_t c, const float* __restrict S, const float* __restrict T,
                       float* __restrict up, float* __restrict up_s, float* __restrict down,
                       float* __restrict down_s) {
  for (int64_t x = 0; x < positions; ++x, s += c, d += c) {
    for (int64_t k = 0; k < c; ++k) {
      const auto v = static_cast<float>(s[k]);
      const float here = d[k], side = S[k] * v + T[k];
      const float high = side >= 0.0f ? here : 0.0f, low = side >= 0.0f ? 0.0f : here;
      up[k] += high;
      up_s[k] += high * v;
      down[k] += low;
      down_s[k] += low * v;
    }
  }
}

// Adds an entry of a window to the same sums.
template <typename V>
struct AddToSums {
  V S, T, up, up_s, down, down_s;

  void operator()(int64_t /*offset*/, V v, V d) {
    const V zero = {}, side = S * v + T;
    const V high = side >= 0.0f ? d : zero, low = side >= 0.0f ? zero : d;
    up += high;
    up_s += high * v;
    down += low;
    down_s += low * v;
  }
};

template <typename V, typename Source>
inline void add_window_sums(const Source* s, const float* d, const TransformArgs& args, int64_t k,
                            float* sums) {
  const int64_t c = args.shape.c;
  const LineOf<V> line(args.coefficients + k, c);
  AddToSums<V> add{line.S, line.T, load_as<V>(sums + k), load_as<V>(sums + c + k),
                   load_as<V>(sums + 2 * c + k), load_as<V>(sums + 3 * c + k)};
  route(s + k, args, line, load_as<V>(d + k), add);
  store_floats(sums + k, add.up);
  store_floats(sums + c + k, add.up_s);
  store_floats(sums + 2 * c + k, add.down);
  store_floats(sums + 3 * c + k, add.down_s);
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
    float* sums = strips.data();
    const float* d = args_.d + first * (shape.h / pool) * columns * c;
    for (int64_t slot = first; slot < last; ++slot) {
      for (int64_t y = 0; y < shape.h / pool; ++y, d += columns * c) {
        const Source* s = source_row<Source>(transform, args_.samples.index(slot), y * pool);
        if (pool == 1) {
          add_gradient_sums(s, d, columns, c, transform.coefficients, transform.coefficients + c,
                            sums, sums + c, sums + 2 * c, sums + 3 * c);
        } else {
          for (int64_t x = 0; x < columns; ++x) add_window(s + x * pool * c, d + x * c, sums);
        }
        strips.advance(columns * pool * pool);
      }
    }
    strips.flush();
  }

  void add_window(const Source* s, const float* d, float* sums) const {
    const int64_t c = args_.transform.shape.c;
    int64_t k = 0;
    for (; k + kFloats <= c; k += kFloats) {
      add_window_sums<FloatVec>(s, d, args_.transform, k, sums);
    }
    for (; k < c; ++k) add_window_sums<float>(s, d, args_.transform, k, sums);
  }

  void finish() override { sums_.write(1.0, args_.sums); }

  const GradientSumsArgs args_;
  const ChannelSums sums_;
};

// A position of g, and of its bounds so far.
template <typename Source>
void gradient_position(const Source* __restrict s, const float* __restrict d, int64_t c,
                       const float* __restrict coefficients, float* __restrict g,
                       float* __restrict lo, float* __restrict hi) {
  const float *__restrict S = coefficients, *__restrict T = S + c, *__restrict G1 = T + 5 * c,
              *__restrict H1 = G1 + c, *__restrict K1 = H1 + c, *__restrict G0 = K1 + c,
              *__restrict H0 = G0 + c, *__restrict K0 = H0 + c;
  for (int64_t k = 0; k < c; ++k) {
    const auto v = static_cast<float>(s[k]);
    const float here = d[k];
    const float above = G1[k] * here + (H1[k] * v + K1[k]);
    const float below = G0[k] * here + (H0[k] * v + K0[k]);
    const float value = S[k] * v + T[k] >= 0.0f ? above : below;
    g[k] = value;
    lo[k] = value < lo[k] ? value : lo[k];
    hi[k] = value > hi[k] ? value : hi[k];
  }
}

// Entries of g in a window, and the bounds so far.
template <typename V>
struct TakeGradient {
  V S, T, G1, H1, K1, G0, H0, K0, least, most;
  float* g;

  TakeGradient(const float* rows, int64_t c, float* at, const float* lo, const float* hi)
      : S(load_as<V>(rows)), T(load_as<V>(rows + c)), G1(load_as<V>(rows + 6 * c)),
        H1(load_as<V>(rows + 7 * c)), K1(load_as<V>(rows + 8 * c)), G0(load_as<V>(rows + 9 * c)),
        H0(load_as<V>(rows + 10 * c)), K0(load_as<V>(rows + 11 * c)), least(load_as<V>(lo)),
        most(load_as<V>(hi)), g(at) {}

  void operator()(int64_t offset, V v, V d) {
    const V above = G1 * d + (H1 * v + K1), below = G0 * d + (H0 * v + K0);
    const V value = S * v + T >= 0.0f ? above : below;
    store_floats(g + offset, value);
    least = value < least ? value : least;
    most = value > most ? value : most;
  }
};

template <typename V, typename Source>
inline void gradient_window(const Source* s, const float* d, const TransformArgs& args, int64_t k,
                            const float* coefficients, float* g, float* lo, float* hi) {
  const int64_t c = args.shape.c;
  const float* rows = coefficients + k;
  TakeGradient<V> take(rows, c, g + k, lo + k, hi + k);
  route(s + k, args, LineOf<V>(rows, c), load_as<V>(d + k), take);
  store_floats(lo + k, take.least);
  store_floats(hi + k, take.most);
}

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

 private:
  void run_sample(int64_t n) override {
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
    const Buffer<float> zeros(c);
    std::fill_n(zeros.data(), c, 0.0f);
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
        if (pool == 1) {
          for (int64_t i = 0; i < x; ++i) {
            gradient_position(s + i * c, d + i * c, c, coefficients, g + i * c, lo, hi);
          }
        } else if (y % pool == 0) {
          for (int64_t i = 0; i < columns; ++i) {
            run_window(s + i * pool * c, d + i * c, coefficients, g + i * pool * c, lo, hi);
          }
        }
      }
      for (; x < shape.w; ++x) {
        gradient_position(s + x * c, zeros.data(), c, coefficients, g + x * c, lo, hi);
      }
    }
    for (int64_t k = 0; k < c; ++k) {
      if (lo[k] > hi[k]) lo[k] = hi[k] = std::numeric_limits<float>::quiet_NaN();  // all are NaN
    }
  }

  void run_window(const Source* s, const float* d, const float* coefficients, float* g, float* lo,
                  float* hi) const {
    const int64_t c = args_.transform.shape.c;
    int64_t k = 0;
    for (; k + kFloats <= c; k += kFloats) {
      gradient_window<FloatVec>(s, d, args_.transform, k, coefficients, g, lo, hi);
    }
    for (; k < c; ++k) gradient_window<float>(s, d, args_.transform, k, coefficients, g, lo, hi);
  }

  const GradientArgs args_;
  std::vector<int64_t> slots_;
};

// Signs of weights as PackedBits, and the mean of their absolute values in each output channel.
class EncodeWeights final : public Product {
 public:
  explicit EncodeWeights(const EncodeWeightsArgs& args)
      : args_(args), tasks_(ceil_div(args.rows, kRows)), sums_(tasks_ * args.o),
        remaining_(tasks_) {}

  int64_t tasks() const override { return tasks_; }

  void run(int64_t task) override {
    const int64_t o = args_.o, first = task * kRows, last = std::min(args_.rows, first + kRows);
    const float* w = args_.w + first * o;
    double* sums = sums_.data() + task * o;
    const Buffer<float> part(o);
    std::fill_n(sums, o, 0.0);
    for (int64_t row = first; row < last; row += 32) {
      std::fill_n(part.data(), o, 0.0f);
      for (int64_t i = row; i < std::min(last, row + 32); ++i) {
        const float* __restrict in = args_.w + i * o;
        float* __restrict out = part.data();
        for (int64_t k = 0; k < o; ++k) out[k] += std::fabs(in[k]);
      }
      for (int64_t k = 0; k < o; ++k) sums[k] += static_cast<double>(part[k]);
    }
    // A task starts at a multiple of 32 rows, and so at a word.
    uint32_t *signs = args_.signs + first * o / 32, ignored;
    int64_t count = (last - first) * o;
    for (; count >= 32; count -= 32, w += 32) sign_masks(w, signs++, &ignored);
    if (count > 0) {
      float rest[32];
      std::fill_n(rest, 32, std::numeric_limits<float>::quiet_NaN());
      std::copy_n(w, count, rest);
      sign_masks(rest, signs, &ignored);
    }
    if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) finish();
  }

 private:
  static constexpr int64_t kRows = 256;

  void finish() const {
    for (int64_t k = 0; k < args_.o; ++k) {
      double sum = 0.0;
      for (int64_t task = 0; task < tasks_; ++task) sum += sums_[task * args_.o + k];
      args_.scale[k] = static_cast<float>(sum / static_cast<double>(args_.rows));
    }
  }

  const EncodeWeightsArgs args_;
  const int64_t tasks_;
  const Buffer<double> sums_;
  std::atomic<int64_t> remaining_;
};

// The gradient of weights from that of their signs and of their scales, in place.
class FinishWeightGrad final : public Product {
 public:
  explicit FinishWeightGrad(const FinishWeightGradArgs& args) : args_(args) {}

  int64_t tasks() const override { return ceil_div(args_.rows, kRows); }

  void run(int64_t task) override {
    const int64_t o = args_.o;
    for (int64_t i = task * kRows; i < std::min(args_.rows, (task + 1) * kRows); ++i) {
      const float* __restrict w = args_.w + i * o;
      const float* __restrict scale = args_.d_scale;
      float* __restrict dw = args_.dw + i * o;
      const float limit = args_.clips ? 1.0f : std::numeric_limits<float>::infinity();
      for (int64_t k = 0; k < o; ++k) {
        const float v = w[k];
        const float clipped = std::fabs(v) <= limit ? dw[k] : 0.0f;
        // The sign of zero is zero, that of NaN is NaN.
        const float sign = v > 0.0f ? 1.0f : v < 0.0f ? -1.0f : v;
        dw[k] = clipped + sign * scale[k];
      }
    }
  }

 private:
  static constexpr int64_t kRows = 256;

  const FinishWeightGradArgs args_;
};

// Makes a kernel for the type of the source.
template <template <typename> class Kernel, typename Args>
std::unique_ptr<Product> for_source(SourceType type, const Args& args) {
  switch (type) {
    case SourceType::kInt16: return std::make_unique<Kernel<int16_t>>(args);
    case SourceType::kInt32: return std::make_unique<Kernel<int32_t>>(args);
    default: return std::make_unique<Kernel<float>>(args);
  }
}

}  // namespace fqt::FQT_ISA
