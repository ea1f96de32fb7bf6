// Kernels that go sample by sample, and sums over samples and positions for each channel.
//
// All sums of floats are taken in one order, whatever the number of threads.

namespace fqt::FQT_ISA {

// One task for each sample.
class PerSample : public Product {
 public:
  explicit PerSample(int64_t samples) : samples_(samples) {}
  int64_t tasks() const override { return samples_; }

 private:
  const int64_t samples_;
};

// One task for each group of neighbouring samples, or rows; whoever ends the last one finishes.
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
// some positions, then doubles, one row of them for each task. Where that is not finite, a task sums
// again with doubles in its strips: floats overflow where the sum need not.
class ChannelSums {
 public:
  ChannelSums(int64_t tasks, int64_t quantities, int64_t c)
      : tasks_(tasks), size_(quantities * c), sums_(tasks * size_) {}

  bool is_finite(int64_t task) const {
    const double* sums = sums_.data() + task * size_;
    return std::all_of(sums, sums + size_, [](double sum) { return std::isfinite(sum); });
  }

  // The strips of one task.
  template <typename Sum>
  class Strips {
   public:
    Strips(const ChannelSums& all, int64_t task)
        : size_(all.size_), sums_(all.sums_.data() + task * size_), strip_(size_) {
      std::fill_n(sums_, size_, 0.0);
      std::fill_n(strip_.data(), size_, Sum{0});
    }
    Sum* data() const { return strip_.data(); }
    // So many positions have been added to data().
    void advance(int64_t positions) {
      positions_ += positions;
      if (positions_ >= kStrip) flush();
    }
    void flush(float weight = 1.0f) {
      const auto factor = static_cast<double>(weight);
      for (int64_t k = 0; k < size_; ++k) sums_[k] += factor * static_cast<double>(strip_[k]);
      std::fill_n(strip_.data(), size_, Sum{0});
      positions_ = 0;
    }

   private:
    const int64_t size_;
    double* const sums_;
    const Buffer<Sum> strip_;
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

// Adds a row to the sums of 1, s and s^2 where S s + T >= 0, and where it is not; NaN is not.
template <typename Source, typename Sum>
void add_moments(const Source* __restrict s, int64_t positions, int64_t c,
                 const float* __restrict slope, const float* __restrict offset,
                 Sum* __restrict sums) {
  Sum *up = sums, *up1 = up + c, *up2 = up1 + c, *down = up2 + c, *down1 = down + c,
      *down2 = down1 + c;
  for (int64_t x = 0; x < positions; ++x, s += c) {
    for (int64_t k = 0; k < c; ++k) {
      const auto v = static_cast<Sum>(s[k]);
      // In floats, whatever is summed in: the kink is where it is everywhere else.
      const bool is_up = slope[k] * static_cast<float>(s[k]) + offset[k] >= 0.0f;
      const Sum one = is_up ? Sum{1} : Sum{0}, high = is_up ? v : 0, low = is_up ? 0 : v;
      up[k] += one;
      up1[k] += high;
      up2[k] += high * high;
      down[k] += Sum{1} - one;
      down1[k] += low;
      down2[k] += low * low;
    }
  }
}

// Means over samples and positions of 1, s and s^2 on either side of a kink; samples count by their
// weights.
template <typename Source>
class Moments final : public PerGroup {
 public:
  explicit Moments(const MomentsArgs& args)
      : PerGroup(args.shape.n, samples_at_once(args.shape)), args_(args),
        sums_(tasks(), 6, args.shape.c) {}

 private:
  void run_group(int64_t task, int64_t first, int64_t last) override {
    sum_group<float>(task, first, last);
    if (!sums_.is_finite(task)) sum_group<double>(task, first, last);
  }

  template <typename Sum>
  void sum_group(int64_t task, int64_t first, int64_t last) {
    const int64_t c = args_.shape.c, w = args_.shape.w, rows = args_.shape.h;
    ChannelSums::Strips<Sum> strips(sums_, task);
    const Source* s = static_cast<const Source*>(args_.s) + first * rows * w * c;
    for (int64_t n = first; n < last; ++n) {
      for (int64_t y = 0; y < rows; ++y, s += w * c) {
        add_moments(s, w, c, args_.thresholds, args_.thresholds + c, strips.data());
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

}  // namespace fqt::FQT_ISA
