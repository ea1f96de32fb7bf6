// Stochastic rounding of a gradient to codes; the same fixed point as fqt_jax/rounding.py.

namespace fqt::FQT_ISA {

// 32 uniform bits for a counter value: fqt_jax.rounding.counter_bits.
inline uint32_t counter_bits(uint32_t seed0, uint32_t seed1, uint32_t index) {
  uint32_t x = index ^ seed0;
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x ^= seed1;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

// t = int32((g - lo) * scale) clipped to [0, top], code = (t + u) >> 16. The comparisons are
// written so that NaN gives zero, as the conversion does in XLA.
inline uint32_t round_to_code(float g, float lo, float scale, float top, uint32_t random) {
  float t = (g - lo) * scale;
  t = t > 0.0f ? t : 0.0f;
  t = t < top ? t : top;
  return (static_cast<uint32_t>(static_cast<int32_t>(t)) + (random >> 16)) >> 16;
}

inline float largest_fixed_point(int bits) { return static_cast<float>(((1 << bits) - 1) << 16); }

// Codes of `n` consecutive entries that share one group; `index` is the first one's counter.
inline void round_group(const float* __restrict g, int64_t n, float lo, float scale,
                        const Rounding& rounding, uint32_t index, uint8_t* __restrict codes) {
  const float top = largest_fixed_point(rounding.bits);
  const uint32_t seed0 = rounding.seed[0], seed1 = rounding.seed[1];
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t random = counter_bits(seed0, seed1, index + static_cast<uint32_t>(i));
    codes[i] = static_cast<uint8_t>(round_to_code(g[i], lo, scale, top, random));
  }
}

// Codes of `n` entries of different groups, put into `words` at bit `shift` and added to `sums`.
// Entry i has the counter index + offsets[i].
inline void round_groups(const float* __restrict g, int64_t n, const float* __restrict lo,
                         const float* __restrict scale, const Rounding& rounding, uint32_t index,
                         const uint32_t* __restrict offsets, int shift,
                         uint32_t* __restrict words, int32_t* __restrict sums) {
  const float top = largest_fixed_point(rounding.bits);
  const uint32_t seed0 = rounding.seed[0], seed1 = rounding.seed[1];
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t random = counter_bits(seed0, seed1, index + offsets[i]);
    const uint32_t code = round_to_code(g[i], lo[i], scale[i], top, random);
    words[i] |= code << shift;
    sums[i] += static_cast<int32_t>(code);
  }
}

// From sums of codes to gradients: weight (step sum + lo signs). In groups so large that a product
// could overflow, in double: infinity less infinity would be NaN, where the sum may well be finite.
struct Dequantize {
  float step, lo;
  bool is_large;

  Dequantize(float range, float low, int bits)
      : step(range / static_cast<float>((1 << bits) - 1)),
        lo(low),
        is_large(!(range < kLimit && std::fabs(low) < kLimit)) {}

  // For the float sums of codes and of signs of `n` entries.
  template <typename Sum>
  void run(int64_t n, Sum sum, const float* __restrict signs, float weight,
           float* __restrict out) const {
    if (is_large) {
      for (int64_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(step) * static_cast<double>(sum(i)) +
                             static_cast<double>(lo) * static_cast<double>(signs[i]);
        out[i] = static_cast<float>(static_cast<double>(weight) * value);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = weight * (step * sum(i) + lo * signs[i]);
    }
  }

 private:
  static constexpr float kLimit = 1e27f;  // sums are below 2^31, and 2^31 1e27 is below 1e37
};

// Codes above four bits go in two planes of nibbles, each with its own tables.
inline int code_planes(int bits) { return bits > 4 ? 2 : 1; }

inline void take_plane(const uint32_t* words, int64_t n, int plane, uint32_t* nibbles) {
  for (int64_t i = 0; i < n; ++i) nibbles[i] = words[i] >> (4 * plane) & 0x0F0F0F0F;
}

}  // namespace fqt::FQT_ISA
