// Convolution of float images that have few channels, and the gradient of its weights: the first
// layer, which stays float. No columns are written to memory: the entries that a window meets are
// `window` runs of contiguous floats in an image with its padding.

namespace fqt::FQT_ISA {

constexpr int64_t kPanel = 2 * kFloats;  // output channels that are computed at once

// One sample with its padding.
class PaddedImage {
 public:
  explicit PaddedImage(const Geometry& g)
      : geometry_(g),
        rows_((g.y.out - 1) * g.y.stride + g.y.window),
        columns_((g.x.out - 1) * g.x.stride + g.x.window),
        data_(rows_ * columns_ * g.c) {}

  int64_t row_size() const { return columns_ * geometry_.c; }
  int64_t run() const { return geometry_.x.window * geometry_.c; }
  int64_t step() const { return geometry_.x.stride * geometry_.c; }

  void read(const float* x, int64_t n) const {
    const int64_t c = geometry_.c;
    std::fill_n(data_.data(), rows_ * row_size(), 0.0f);
    // Columns and rows at the end that no window reaches are left out.
    const int64_t columns = std::min(geometry_.x.in, columns_ - geometry_.x.before);
    const int64_t rows = std::min(geometry_.y.in, rows_ - geometry_.y.before);
    for (int64_t y = 0; y < rows && columns > 0; ++y) {
      std::copy_n(x + (n * geometry_.y.in + y) * geometry_.x.in * c, columns * c,
                  data_.data() + (geometry_.y.before + y) * row_size() + geometry_.x.before * c);
    }
  }

  // What the first window of output row y meets.
  const float* window(int64_t y) const {
    return data_.data() + y * geometry_.y.stride * row_size();
  }

 private:
  const Geometry& geometry_;
  const int64_t rows_, columns_;
  const Buffer<float> data_;
};

// One panel of outputs at `Positions` neighbouring positions.
template <int Positions>
inline void convolve(const float* x, const PaddedImage& image, int64_t window_rows, const float* w,
                     float* out, int64_t out_stride) {
  FloatVec sums[Positions][2] = {};
  const int64_t run = image.run(), step = image.step();
  for (int64_t i = 0; i < window_rows; ++i, x += image.row_size()) {
    for (int64_t j = 0; j < run; ++j, w += kPanel) {
      const FloatVec w0 = load_as<FloatVec>(w), w1 = load_as<FloatVec>(w + kFloats);
      for (int p = 0; p < Positions; ++p) {
        const float value = x[p * step + j];
        sums[p][0] += w0 * value;
        sums[p][1] += w1 * value;
      }
    }
  }
  for (int p = 0; p < Positions; ++p) {
    store_floats(out + p * out_stride, sums[p][0]);
    store_floats(out + p * out_stride + kFloats, sums[p][1]);
  }
}

class FloatConv final : public PerSample {
 public:
  explicit FloatConv(const FloatConvArgs& args)
      : PerSample(args.geometry.n),
        args_(args),
        terms_(args.geometry.taps() * args.geometry.c),
        panels_(ceil_div(args.geometry.o, kPanel)),
        weights_(panels_ * terms_ * kPanel) {
    const int64_t o = args_.geometry.o;
    std::fill_n(weights_.data(), panels_ * terms_ * kPanel, 0.0f);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      for (int64_t i = 0; i < terms_; ++i) {
        std::copy_n(args_.w + i * o + panel * kPanel, std::min(kPanel, o - panel * kPanel),
                    weights_.data() + (panel * terms_ + i) * kPanel);
      }
    }
  }

  void run(int64_t n) override {
    const Geometry& g = args_.geometry;
    const PaddedImage image(g);
    image.read(args_.x, n);
    const Buffer<float> part(kPositions * kPanel);
    for (int64_t y = 0; y < g.y.out; ++y) {
      const float* x = image.window(y);
      float* out = args_.y + (n * g.y.out + y) * g.x.out * g.o;
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const float* w = weights_.data() + panel * terms_ * kPanel;
        const int64_t count = std::min(kPanel, g.o - panel * kPanel);
        for (int64_t i = 0; i < g.x.out;) {
          const int64_t positions = i + kPositions <= g.x.out ? kPositions : 1;
          const float* at = x + i * image.step();
          float* to = out + i * g.o + panel * kPanel;
          const bool is_whole = count == kPanel;
          float* sums = is_whole ? to : part.data();
          const int64_t stride = is_whole ? g.o : kPanel;
          if (positions == kPositions) {
            convolve<kPositions>(at, image, g.y.window, w, sums, stride);
          } else {
            convolve<1>(at, image, g.y.window, w, sums, stride);
          }
          for (int64_t p = 0; p < positions && !is_whole; ++p) {
            std::copy_n(sums + p * kPanel, count, to + p * g.o);
          }
          i += positions;
        }
      }
    }
  }

 private:
  static constexpr int64_t kPositions = 4;

  const FloatConvArgs args_;
  const int64_t terms_, panels_;
  const Buffer<float> weights_;  // [panels, terms, kPanel]
};

// Adds a row of positions to the gradients of `Terms` weights in one panel of output channels.
template <int Terms>
inline void add_weight_gradients(const float* x, const int64_t* offsets, int64_t step,
                                 const float* g, int64_t g_stride, int64_t positions, float* sums,
                                 int64_t sums_stride) {
  FloatVec parts[Terms][2] = {};
  const float* at[Terms];
  for (int i = 0; i < Terms; ++i) at[i] = x + offsets[i];
  for (int64_t p = 0; p < positions; ++p, g += g_stride) {
    const FloatVec g0 = load_as<FloatVec>(g), g1 = load_as<FloatVec>(g + kFloats);
    for (int i = 0; i < Terms; ++i) {
      const float value = at[i][p * step];
      parts[i][0] += g0 * value;
      parts[i][1] += g1 * value;
    }
  }
  for (int i = 0; i < Terms; ++i, sums += sums_stride) {
    store_floats(sums, load_as<FloatVec>(sums) + parts[i][0]);
    store_floats(sums + kFloats, load_as<FloatVec>(sums + kFloats) + parts[i][1]);
  }
}

// At most 64 groups of samples, whatever the threads; their floats are added in double.
class FloatConvWeightGrad final : public PerGroup {
 public:
  explicit FloatConvWeightGrad(const FloatConvWeightGradArgs& args)
      : PerGroup(args.geometry.n, ceil_div(args.geometry.n, 64)),
        args_(args),
        terms_(args.geometry.taps() * args.geometry.c),
        width_(ceil_div(args.geometry.o, kPanel) * kPanel),
        sums_(tasks() * terms_ * width_) {}

 private:
  static constexpr int64_t kTerms = 4;

  void run_group(int64_t task, int64_t first_sample, int64_t last_sample) override {
    const Geometry& g = args_.geometry;
    const PaddedImage image(g);
    const Buffer<int64_t> offsets(terms_);
    for (int64_t i = 0; i < terms_; ++i) {
      offsets[i] = i / image.run() * image.row_size() + i % image.run();
    }
    float* sums = sums_.data() + task * terms_ * width_;
    std::fill_n(sums, terms_ * width_, 0.0f);
    const Buffer<float> padded(width_ == g.o ? 0 : g.x.out * kPanel);
    for (int64_t n = first_sample; n < last_sample; ++n) {
      image.read(args_.x, n);
      for (int64_t y = 0; y < g.y.out; ++y) {
        const float* row = args_.g + (n * g.y.out + y) * g.x.out * g.o;
        for (int64_t first = 0; first < width_; first += kPanel) {
          const float* panel = row + first;
          int64_t stride = g.o;
          if (first + kPanel > g.o) {
            std::fill_n(padded.data(), g.x.out * kPanel, 0.0f);
            for (int64_t p = 0; p < g.x.out; ++p) {
              std::copy_n(panel + p * g.o, g.o - first, padded.data() + p * kPanel);
            }
            panel = padded.data();
            stride = kPanel;
          }
          add_row(image.window(y), image.step(), offsets.data(), panel, stride, sums + first);
        }
      }
    }
  }

  void add_row(const float* x, int64_t step, const int64_t* offsets, const float* g,
               int64_t g_stride, float* sums) const {
    const int64_t positions = args_.geometry.x.out;
    int64_t i = 0;
    for (; i + kTerms <= terms_; i += kTerms) {
      add_weight_gradients<kTerms>(x, offsets + i, step, g, g_stride, positions,
                                   sums + i * width_, width_);
    }
    for (; i < terms_; ++i) {
      add_weight_gradients<1>(x, offsets + i, step, g, g_stride, positions, sums + i * width_,
                              width_);
    }
  }

  void finish() override {
    for (int64_t i = 0; i < terms_; ++i) {
      for (int64_t k = 0; k < args_.geometry.o; ++k) {
        double sum = 0.0;
        for (int64_t task = 0; task < tasks(); ++task) {
          sum += static_cast<double>(sums_[(task * terms_ + i) * width_ + k]);
        }
        args_.dw[i * args_.geometry.o + k] = static_cast<float>(sum);
      }
    }
  }

  const FloatConvWeightGradArgs args_;
  const int64_t terms_, width_;
  const Buffer<float> sums_;  // [tasks, terms, width]
};

}  // namespace fqt::FQT_ISA
