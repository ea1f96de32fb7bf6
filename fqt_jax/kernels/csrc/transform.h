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

  const Source* source(int64_t n, int64_t y) const {
    return static_cast<const Source*>(args_.s) + (n * args_.shape.h + y) * row_size();
  }

  // The pooled row y.
  const float* pooled(int64_t n, int64_t y) {
    const int64_t pool = args_.pool, c = args_.shape.c;
    transform_row(source(n, y * pool), pool * args_.shape.w, c, args_.coefficients, rows_.data());
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

  // After pooled(n, y): the gradient d of that row on the `pool` rows before pooling. It goes to
  // the first entry of a window that is its maximum.
  void spread(const float* d, float* out) const {
    const int64_t pool = args_.pool, c = args_.shape.c;
    std::fill_n(out, pool * row_size(), 0.0f);
    const Buffer<float> rest(c);
    for (int64_t x = 0; x < args_.shape.w / pool; ++x) {
      std::copy_n(d + x * c, c, rest.data());
      for (int64_t i = 0; i < pool * pool; ++i) {
        give(rows_.data() + offset(i, x), pooled_.data() + x * c, c, rest.data(),
             out + offset(i, x));
      }
    }
  }

 private:
  // Hands over what is left of the gradient where t is the maximum.
  static void give(const float* __restrict t, const float* __restrict most, int64_t c,
                   float* __restrict rest, float* __restrict to) {
    for (int64_t k = 0; k < c; ++k) {
      const bool is_most = t[k] == most[k];
      const float here = rest[k];
      to[k] = is_most ? here : 0.0f;
      rest[k] = is_most ? 0.0f : here;
    }
  }

  int64_t offset(int64_t i, int64_t x) const {
    const int64_t pool = args_.pool;
    return i / pool * row_size() + (x * pool + i % pool) * args_.shape.c;
  }

  const TransformArgs& args_;
  const Buffer<float> rows_, pooled_;
};

// One task for each sample; whoever ends the last one finishes.
class PerSample : public Product {
 public:
  explicit PerSample(int64_t samples) : samples_(samples), remaining_(samples) {}
  int64_t tasks() const override { return samples_; }
  void run(int64_t task) override {
    run_sample(task);
    if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) finish();
  }

 protected:
  virtual void run_sample(int64_t n) = 0;
  virtual void finish() {}

 private:
  const int64_t samples_;
  std::atomic<int64_t> remaining_;
};

// Sums over all samples and positions of several quantities of each channel: floats over a row,
// then doubles.
class ChannelSums {
 public:
  ChannelSums(int64_t samples, int64_t quantities, int64_t c)
      : samples_(samples), size_(quantities * c), sums_(samples * size_) {}

  void add_row(int64_t n, int64_t y, const float* row, float weight = 1.0f) const {
    double* sums = sums_.data() + n * size_;
    const auto factor = static_cast<double>(weight);
    if (y == 0) std::fill_n(sums, size_, 0.0);
    for (int64_t k = 0; k < size_; ++k) sums[k] += factor * static_cast<double>(row[k]);
  }

  void write(double factor, float* out) const {
    for (int64_t k = 0; k < size_; ++k) {
      double sum = 0.0;
      for (int64_t n = 0; n < samples_; ++n) sum += sums_[n * size_ + k];
      out[k] = static_cast<float>(sum * factor);
    }
  }

 private:
  const int64_t samples_, size_;
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
class Moments final : public PerSample {
 public:
  explicit Moments(const MomentsArgs& args)
      : PerSample(args.shape.n), args_(args), sums_(args.shape.n, 4, args.shape.c) {}

 private:
  void run_sample(int64_t n) override {
    const int64_t c = args_.shape.c, w = args_.shape.w;
    const Buffer<float> row(4 * c);
    for (int64_t y = 0; y < args_.shape.h; ++y) {
      std::fill_n(row.data(), 4 * c, 0.0f);
      add_moments(static_cast<const Source*>(args_.s) + (n * args_.shape.h + y) * w * c, w, c,
                  row.data(), row.data() + c, row.data() + 2 * c, row.data() + 3 * c);
      sums_.add_row(n, y, row.data(), args_.weights ? args_.weights[n] : 1.0f);
    }
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
    bool has_nan = false;
    for (int64_t y = 0; y < shape.h / args_.transform.pool; ++y) {
      const float* t = rows.pooled(n, y);
      if (std::is_floating_point_v<Source>) {
        for (int64_t i = 0; i < size; ++i) has_nan |= t[i] != t[i];
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
    args_.nan[n] = has_nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  }

  const EncodeArgs args_;
};

// t itself.
template <typename Source>
class Activate final : public PerSample {
 public:
  explicit Activate(const ActivateArgs& args) : PerSample(args.transform.shape.n), args_(args) {}

 private:
  void run_sample(int64_t n) override {
    const int64_t rows_out = args_.transform.shape.h / args_.transform.pool;
    Rows<Source> rows(args_.transform);
    for (int64_t y = 0; y < rows_out; ++y) {
      std::copy_n(rows.pooled(n, y), rows.pooled_size(),
                  args_.t + (n * rows_out + y) * rows.pooled_size());
    }
  }

  const ActivateArgs args_;
};

// The gradient d of t, spread over the rows before pooling. Rows of samples that were not kept, and
// those that pooling leaves out, are zero.
template <typename Source>
class GradientRows {
 public:
  GradientRows(const TransformArgs& transform, const float* d)
      : transform_(transform), d_(d), rows_(transform),
        spread_(transform.pool * rows_.row_size()) {}

  // Rows [y, y + pool), or null where the gradient is zero; `slot` is negative for a sample
  // that was not kept.
  const float* at(int64_t n, int64_t slot, int64_t y) {
    const int64_t pool = transform_.pool, rows_out = transform_.shape.h / pool;
    if (slot < 0 || y / pool >= rows_out) return nullptr;
    const float* d = d_ + (slot * rows_out + y / pool) * rows_.pooled_size();
    if (pool == 1) return d;
    rows_.pooled(n, y / pool);
    rows_.spread(d, spread_.data());
    return spread_.data();
  }

  const Source* source(int64_t n, int64_t y) const { return rows_.source(n, y); }

 private:
  const TransformArgs& transform_;
  const float* d_;
  Rows<Source> rows_;
  const Buffer<float> spread_;
};

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

// Sums of d and d s, where up and where not.
template <typename Source>
class GradientSums final : public PerSample {
 public:
  explicit GradientSums(const GradientSumsArgs& args)
      : PerSample(args.samples.count), args_(args),
        sums_(args.samples.count, 4, args.transform.shape.c) {}

 private:
  void run_sample(int64_t slot) override {
    const TransformArgs& transform = args_.transform;
    const int64_t c = transform.shape.c, w = transform.shape.w, n = args_.samples.index(slot);
    GradientRows<Source> gradients(transform, args_.d);
    const Buffer<float> row(4 * c);
    const float* S = transform.coefficients;
    for (int64_t y = 0; y < transform.shape.h; y += transform.pool) {
      std::fill_n(row.data(), 4 * c, 0.0f);
      const float* d = gradients.at(n, slot, y);
      if (d != nullptr) {
        add_gradient_sums(gradients.source(n, y), d, transform.pool * w, c, S, S + c, row.data(),
                          row.data() + c, row.data() + 2 * c, row.data() + 3 * c);
      }
      sums_.add_row(slot, y, row.data());
    }
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

// g, and its least and greatest entry for each sample and channel.
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
    const int64_t c = shape.c, slot = slots_[static_cast<size_t>(n)];
    GradientRows<Source> gradients(transform, args_.d);
    const Buffer<float> coefficients(12 * c);
    std::copy_n(transform.coefficients, 12 * c, coefficients.data());
    for (const int64_t row : {7, 8, 10, 11}) {  // H1, K1, H0, K0: what flows through moments
      if (args_.weights == nullptr) break;
      for (int64_t k = 0; k < c; ++k) coefficients.data()[row * c + k] *= args_.weights[n];
    }
    const Buffer<float> zeros(c);
    std::fill_n(zeros.data(), c, 0.0f);
    float *lo = args_.lo + n * c, *hi = args_.hi + n * c;
    std::fill_n(lo, c, std::numeric_limits<float>::infinity());
    std::fill_n(hi, c, -std::numeric_limits<float>::infinity());
    for (int64_t y = 0; y < shape.h; y += transform.pool) {
      const int64_t rows = std::min(transform.pool, shape.h - y);
      const float* d = gradients.at(n, slot, y);
      const Source* source = gradients.source(n, y);
      float* g = args_.g + (n * shape.h + y) * shape.w * c;
      for (int64_t x = 0; x < rows * shape.w; ++x, source += c, g += c) {
        const float* here = d == nullptr ? zeros.data() : d + x * c;
        gradient_position(source, here, c, coefficients.data(), g, lo, hi);
      }
    }
    for (int64_t k = 0; k < c; ++k) {
      if (lo[k] > hi[k]) lo[k] = hi[k] = std::numeric_limits<float>::quiet_NaN();  // all are NaN
    }
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
