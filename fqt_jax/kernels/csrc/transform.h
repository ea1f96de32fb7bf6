// What stands between two integer products: norm, activation and pooling, as one function of each
// entry of the sums that is linear on either side of a kink.
//
// With s an entry of channel c and up = [S s + T >= 0],
//
//   t = up ? P1 s + Q1 : P0 s + Q0                          forward, then a maximum over windows
//   g = (up ? G1 : G0) d + (up ? H1 s + K1 : H0 s + K0)     backward, d the gradient of t

namespace fqt::FQT_ISA {

template <typename Source>
const Source* source_row(const TransformArgs& args, int64_t n, int64_t y) {
  return static_cast<const Source*>(args.s) + (n * args.shape.h + y) * args.shape.w * args.shape.c;
}

// The function in some channels; V is a FloatVec of them or a float.
template <typename V>
struct LineOf {
  V S, T, P1, Q1, P0, Q0;

  LineOf(const float* rows, int64_t c)
      : S(load_as<V>(rows)), T(load_as<V>(rows + c)), P1(load_as<V>(rows + 2 * c)),
        Q1(load_as<V>(rows + 3 * c)), P0(load_as<V>(rows + 4 * c)), Q0(load_as<V>(rows + 5 * c)) {}

  V t(V v) const {
    // Both sides, then a choice: only so does a compiler make vectors of it.
    const V above = P1 * v + Q1, below = P0 * v + Q0;
    return S * v + T >= 0.0f ? above : below;
  }
};

template <typename Source>
void transform_row(const Source* s, int64_t positions, int64_t c, const float* rows, float* t) {
  for (int64_t i = 0; i < positions; ++i, s += c, t += c) {
    for_channels(c, [&](auto kind, int64_t k) {
      using V = decltype(kind);
      store_floats(t + k, LineOf<V>(rows + k, c).t(load_floats<V>(s + k)));
    });
  }
}

// Whether `next` takes the place of the maximum so far, as in fqt_jax.pooling: NaN does, and stays.
template <typename V>
inline auto is_more(V next, V most) {
  return (next > most) | (next != next);
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
    transform_row(source_row<Source>(args_, n, y * pool), pool * args_.shape.w, c,
                  args_.coefficients, rows_.data());
    if (pool == 1) return rows_.data();
    for (int64_t x = 0; x < args_.shape.w / pool; ++x) {
      float* __restrict out = pooled_.data() + x * c;
      for (int64_t i = 0; i < pool; ++i) {
        const float* __restrict in = rows_.data() + i * row_size() + x * pool * c;
        for (int64_t j = 0; j < pool; ++j, in += c) {
          if (i + j == 0) {
            std::copy_n(in, c, out);
          } else {
            for (int64_t k = 0; k < c; ++k) out[k] = is_more(in[k], out[k]) ? in[k] : out[k];
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

// Signs and clip mask of t, as PackedBits.
template <typename Source>
class Encode final : public PerSample {
 public:
  explicit Encode(const EncodeArgs& args)
      : PerSample(args.transform.shape.n), args_(args), can_be_nan_(can_be_nan(args.transform)) {}

  void run(int64_t n) override {
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
      if (can_be_nan_) {
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

 private:
  // Of integers and finite coefficients no NaN comes.
  static bool can_be_nan(const TransformArgs& args) {
    const float* first = args.coefficients;
    return std::is_floating_point_v<Source> ||
           !std::all_of(first, first + 6 * args.shape.c, [](float v) { return std::isfinite(v); });
  }

  const EncodeArgs args_;
  const bool can_be_nan_;
};

// t itself, and what is added to it.
template <typename Source>
class Activate final : public PerSample {
 public:
  explicit Activate(const ActivateArgs& args) : PerSample(args.transform.shape.n), args_(args) {}

  void run(int64_t n) override {
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

 private:
  const ActivateArgs args_;
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
