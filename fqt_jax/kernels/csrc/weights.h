// What becomes of weights: their signs and scales forward, and the gradient of either backward.

namespace fqt::FQT_ISA {

// Signs of weights as PackedBits, and the mean of their absolute values in each output channel.
class EncodeWeights final : public PerGroup {
 public:
  explicit EncodeWeights(const EncodeWeightsArgs& args)
      : PerGroup(args.rows, kRows), args_(args), sums_(tasks(), 1, args.o) {}

 private:
  static constexpr int64_t kRows = 256;

  void run_group(int64_t task, int64_t first, int64_t last) override {
    const int64_t o = args_.o;
    ChannelSums::Strips<float> strips(sums_, task);
    float* __restrict sums = strips.data();
    for (int64_t row = first; row < last; ++row) {
      const float* __restrict w = args_.w + row * o;
      for (int64_t k = 0; k < o; ++k) sums[k] += std::fabs(w[k]);
      if ((row + 1) % 32 == 0) strips.flush();
    }
    strips.flush();
    // A task starts at a multiple of 32 rows, and so at a word.
    const float* w = args_.w + first * o;
    uint32_t *signs = args_.signs + first * o / 32, ignored;
    int64_t count = (last - first) * o;
    for (; count >= 32; count -= 32, w += 32) sign_masks(w, signs++, &ignored);
    if (count > 0) {
      float rest[32];
      std::fill_n(rest, 32, std::numeric_limits<float>::quiet_NaN());
      std::copy_n(w, count, rest);
      sign_masks(rest, signs, &ignored);
    }
  }

  void finish() override { sums_.write(1.0 / static_cast<double>(args_.rows), args_.scale); }

  const EncodeWeightsArgs args_;
  const ChannelSums sums_;
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

}  // namespace fqt::FQT_ISA
