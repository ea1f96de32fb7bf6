// One step of Adam's moments in place, and the direction that follows from them.
//
//   m = (1 - b1) g + b1 m,   v = (1 - b2) g^2 + b2 v,   u = m r1 / (sqrt(v r2) + epsilon)
//
// with r1 and r2 the inverse bias corrections. Each entry is read and written once.

namespace fqt::FQT_ISA {

inline void adam_entries(int64_t n, const AdamFactors& f, float* __restrict g,
                         float* __restrict m, float* __restrict v) {
  for (int64_t i = 0; i < n; ++i) {
    const float first = f.new1 * g[i] + f.old1 * m[i];
    const float second = f.new2 * (g[i] * g[i]) + f.old2 * v[i];
    m[i] = first;
    v[i] = second;
    g[i] = first * f.inverse1 / (std::sqrt(second * f.inverse2) + f.epsilon);
  }
}

class Adam final : public Product {
 public:
  explicit Adam(const AdamArgs& args) : args_(args) {}

  int64_t tasks() const override { return ceil_div(args_.size, kEntries); }

  void run(int64_t task) override {
    const int64_t first = task * kEntries;
    adam_entries(std::min(kEntries, args_.size - first), args_.factors, args_.g + first,
                 args_.m + first, args_.v + first);
  }

 private:
  static constexpr int64_t kEntries = 65536;

  const AdamArgs args_;
};

}  // namespace fqt::FQT_ISA
