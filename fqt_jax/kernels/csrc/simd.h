// The vector primitives that the kernels are written in, for one instruction set.
//
// Exactly one of FQT_SIMD_AVX512, FQT_SIMD_AVX2, FQT_SIMD_NEON or none (portable C++) is defined,
// and FQT_ISA names the namespace. A `Vec` holds kLanes bytes, one for each channel. Its even and
// odd bytes widen into two vectors of 16-bit sums. Byte j therefore stands for channel
// `(j % 2) * kLanes / 2 + j / 2`, so that the even sums are the first half of the channels in
// order and the odd sums the second.

#if defined(FQT_SIMD_AVX512) || defined(FQT_SIMD_AVX2)
#include <immintrin.h>
#elif defined(FQT_SIMD_NEON)
#include <arm_neon.h>
#endif

namespace fqt::FQT_ISA {

constexpr int64_t channel_of_byte(int64_t byte, int64_t lanes) {
  return (byte % 2) * (lanes / 2) + byte / 2;
}

constexpr int64_t byte_of_channel(int64_t channel, int64_t lanes) {
  return channel % (lanes / 2) * 2 + channel / (lanes / 2);
}

// For each byte of a Vec, the byte and the bit within a word of kLanes bits that it takes.
template <int Lanes>
struct ExpandPattern {
  alignas(64) uint8_t byte[Lanes];
  alignas(64) uint8_t bit[Lanes];
  constexpr ExpandPattern() : byte(), bit() {
    for (int i = 0; i < Lanes; ++i) {
      byte[i] = static_cast<uint8_t>(channel_of_byte(i, Lanes) / 8);
      bit[i] = static_cast<uint8_t>(1 << (channel_of_byte(i, Lanes) % 8));
    }
  }
};

#if defined(FQT_SIMD_AVX512)

using Vec = __m512i;
constexpr int kLanes = 64;
constexpr int kRegisters = 32;

inline Vec zero() { return _mm512_setzero_si512(); }
inline Vec load(const uint8_t* p) { return _mm512_load_si512(p); }
inline void store(uint8_t* p, Vec v) { _mm512_store_si512(p, v); }
inline Vec load_table(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec lookup(Vec table, Vec index) { return _mm512_shuffle_epi8(table, index); }
inline Vec add8(Vec a, Vec b) { return _mm512_add_epi8(a, b); }
inline Vec add16(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
inline Vec odd_bytes(Vec v) { return _mm512_srli_epi16(v, 8); }
// all - 256 * odd, modulo 2^16.
inline Vec even_sums(Vec all, Vec odd) { return _mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8)); }

inline void accumulate(int32_t* out, Vec sums, int shift, bool is_first) {
  const __m256i halves[2] = {_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1)};
  for (int i = 0; i < 2; ++i) {
    Vec v = _mm512_sll_epi32(_mm512_cvtepu16_epi32(halves[i]), _mm_cvtsi32_si128(shift));
    if (!is_first) v = _mm512_add_epi32(v, _mm512_loadu_si512(out + 16 * i));
    _mm512_storeu_si512(out + 16 * i, v);
  }
}
inline void accumulate(uint16_t* out, Vec sums, int /*shift*/, bool is_first) {
  if (!is_first) sums = _mm512_add_epi16(sums, _mm512_loadu_si512(out));
  _mm512_storeu_si512(out, sums);
}

inline Vec expand_bits(uint64_t bits, int value) {
  static constexpr ExpandPattern<kLanes> pattern;
  const Vec bytes = _mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(bits)),
                                        _mm512_load_si512(pattern.byte));
  const __mmask64 set = _mm512_test_epi8_mask(bytes, _mm512_load_si512(pattern.bit));
  return _mm512_maskz_set1_epi8(set, static_cast<char>(value));
}
inline Vec bit_or(Vec a, Vec b) { return _mm512_or_si512(a, b); }

#elif defined(FQT_SIMD_AVX2)

using Vec = __m256i;
constexpr int kLanes = 32;
constexpr int kRegisters = 16;

inline Vec zero() { return _mm256_setzero_si256(); }
inline Vec load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const Vec*>(p)); }
inline void store(uint8_t* p, Vec v) { _mm256_store_si256(reinterpret_cast<Vec*>(p), v); }
inline Vec load_table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec lookup(Vec table, Vec index) { return _mm256_shuffle_epi8(table, index); }
inline Vec add8(Vec a, Vec b) { return _mm256_add_epi8(a, b); }
inline Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
inline Vec odd_bytes(Vec v) { return _mm256_srli_epi16(v, 8); }
// all - 256 * odd, modulo 2^16.
inline Vec even_sums(Vec all, Vec odd) { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); }

inline void accumulate(int32_t* out, Vec sums, int shift, bool is_first) {
  const __m128i halves[2] = {_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)};
  for (int i = 0; i < 2; ++i) {
    Vec* to = reinterpret_cast<Vec*>(out + 8 * i);
    Vec v = _mm256_sll_epi32(_mm256_cvtepu16_epi32(halves[i]), _mm_cvtsi32_si128(shift));
    if (!is_first) v = _mm256_add_epi32(v, _mm256_loadu_si256(to));
    _mm256_storeu_si256(to, v);
  }
}
inline void accumulate(uint16_t* out, Vec sums, int /*shift*/, bool is_first) {
  Vec* to = reinterpret_cast<Vec*>(out);
  if (!is_first) sums = _mm256_add_epi16(sums, _mm256_loadu_si256(to));
  _mm256_storeu_si256(to, sums);
}

inline Vec expand_bits(uint64_t bits, int value) {
  static constexpr ExpandPattern<kLanes> pattern;
  const Vec mask = load(pattern.bit);
  Vec v = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), load(pattern.byte));
  v = _mm256_cmpeq_epi8(_mm256_and_si256(v, mask), mask);
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(value)));
}
inline Vec bit_or(Vec a, Vec b) { return _mm256_or_si256(a, b); }

#elif defined(FQT_SIMD_NEON)

using Vec = uint8x16_t;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

inline Vec zero() { return vdupq_n_u8(0); }
inline Vec load(const uint8_t* p) { return vld1q_u8(p); }
inline void store(uint8_t* p, Vec v) { vst1q_u8(p, v); }
inline Vec load_table(const uint8_t* p) { return vld1q_u8(p); }
inline Vec lookup(Vec table, Vec index) { return vqtbl1q_u8(table, index); }
inline Vec add8(Vec a, Vec b) { return vaddq_u8(a, b); }
inline Vec add16(Vec a, Vec b) {
  return vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
inline Vec odd_bytes(Vec v) {
  return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(v), 8));
}
// all - 256 * odd, modulo 2^16.
inline Vec even_sums(Vec all, Vec odd) {
  const uint16x8_t high = vshlq_n_u16(vreinterpretq_u16_u8(odd), 8);
  return vreinterpretq_u8_u16(vsubq_u16(vreinterpretq_u16_u8(all), high));
}

inline void accumulate(int32_t* out, Vec sums, int shift, bool is_first) {
  const uint16x8_t wide = vreinterpretq_u16_u8(sums);
  const uint16x4_t halves[2] = {vget_low_u16(wide), vget_high_u16(wide)};
  for (int i = 0; i < 2; ++i) {
    int32x4_t v = vshlq_s32(vreinterpretq_s32_u32(vmovl_u16(halves[i])), vdupq_n_s32(shift));
    if (!is_first) v = vaddq_s32(v, vld1q_s32(out + 4 * i));
    vst1q_s32(out + 4 * i, v);
  }
}
inline void accumulate(uint16_t* out, Vec sums, int /*shift*/, bool is_first) {
  uint16x8_t v = vreinterpretq_u16_u8(sums);
  if (!is_first) v = vaddq_u16(v, vld1q_u16(out));
  vst1q_u16(out, v);
}

inline Vec expand_bits(uint64_t bits, int value) {
  static constexpr ExpandPattern<kLanes> pattern;
  const Vec word = vreinterpretq_u8_u16(vdupq_n_u16(static_cast<uint16_t>(bits)));
  const Vec set = vtstq_u8(vqtbl1q_u8(word, load(pattern.byte)), load(pattern.bit));
  return vandq_u8(set, vdupq_n_u8(static_cast<uint8_t>(value)));
}
inline Vec bit_or(Vec a, Vec b) { return vorrq_u8(a, b); }

#else  // portable C++

struct Vec {
  uint8_t b[16];
};
constexpr int kLanes = 16;
constexpr int kRegisters = 16;

inline Vec zero() { return Vec{}; }
inline Vec load(const uint8_t* p) {
  Vec v;
  std::memcpy(v.b, p, sizeof v.b);
  return v;
}
inline void store(uint8_t* p, Vec v) { std::memcpy(p, v.b, sizeof v.b); }
inline Vec load_table(const uint8_t* p) { return load(p); }
inline Vec lookup(Vec table, Vec index) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.b[i] = table.b[index.b[i]];
  return v;
}
inline Vec add8(Vec a, Vec b) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.b[i] = static_cast<uint8_t>(a.b[i] + b.b[i]);
  return v;
}
inline uint16_t sum_at(const Vec& v, int i) {
  return static_cast<uint16_t>(v.b[2 * i] | v.b[2 * i + 1] << 8);
}
inline void set_sum(Vec& v, int i, uint32_t sum) {
  v.b[2 * i] = static_cast<uint8_t>(sum);
  v.b[2 * i + 1] = static_cast<uint8_t>(sum >> 8);
}
inline Vec add16(Vec a, Vec b) {
  Vec v;
  for (int i = 0; i < 8; ++i) set_sum(v, i, sum_at(a, i) + sum_at(b, i));
  return v;
}
inline Vec odd_bytes(Vec a) {
  Vec v;
  for (int i = 0; i < 8; ++i) set_sum(v, i, a.b[2 * i + 1]);
  return v;
}
// all - 256 * odd, modulo 2^16.
inline Vec even_sums(Vec all, Vec odd) {
  Vec v;
  for (int i = 0; i < 8; ++i) set_sum(v, i, sum_at(all, i) - (uint32_t{sum_at(odd, i)} << 8));
  return v;
}

inline void accumulate(int32_t* out, Vec sums, int shift, bool is_first) {
  for (int i = 0; i < 8; ++i) {
    const int32_t v = static_cast<int32_t>(uint32_t{sum_at(sums, i)} << shift);
    out[i] = is_first ? v : out[i] + v;
  }
}
inline void accumulate(uint16_t* out, Vec sums, int /*shift*/, bool is_first) {
  for (int i = 0; i < 8; ++i) {
    out[i] = static_cast<uint16_t>(sum_at(sums, i) + (is_first ? 0 : out[i]));
  }
}

inline Vec expand_bits(uint64_t bits, int value) {
  Vec v;
  for (int i = 0; i < 16; ++i) {
    v.b[i] = static_cast<uint8_t>(bits >> channel_of_byte(i, 16) & 1 ? value : 0);
  }
  return v;
}
inline Vec bit_or(Vec a, Vec b) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.b[i] = a.b[i] | b.b[i];
  return v;
}

#endif

// Tables of 16 bytes from words of four codes: entry e is the sum of those codes whose bit is set in
// e, and must not exceed 255. Table i goes to tables + i * stride.
inline void make_tables(const uint32_t* codes, int64_t n, uint8_t* tables, int64_t stride) {
  int64_t i = 0;
#if defined(FQT_SIMD_AVX512) || defined(FQT_SIMD_AVX2)
  // Two tables at a time. A mask byte of 0x80 selects zero.
  alignas(32) static constexpr uint8_t kSelect[4][16] = {
      {128, 0, 128, 0, 128, 0, 128, 0, 128, 0, 128, 0, 128, 0, 128, 0},
      {128, 128, 1, 1, 128, 128, 1, 1, 128, 128, 1, 1, 128, 128, 1, 1},
      {128, 128, 128, 128, 2, 2, 2, 2, 128, 128, 128, 128, 2, 2, 2, 2},
      {128, 128, 128, 128, 128, 128, 128, 128, 3, 3, 3, 3, 3, 3, 3, 3}};
  __m256i select[4];
  const __m256i second = _mm256_set_m128i(_mm_set1_epi8(4), _mm_setzero_si128());
  for (int k = 0; k < 4; ++k) {
    const __m128i one = _mm_load_si128(reinterpret_cast<const __m128i*>(kSelect[k]));
    select[k] = _mm256_or_si256(_mm256_broadcastsi128_si256(one), second);
  }
  for (; i + 2 <= n; i += 2) {
    int64_t pair;
    std::memcpy(&pair, codes + i, sizeof pair);
    const __m256i q = _mm256_set1_epi64x(pair);
    const __m256i low = _mm256_add_epi8(_mm256_shuffle_epi8(q, select[0]),
                                        _mm256_shuffle_epi8(q, select[1]));
    const __m256i high = _mm256_add_epi8(_mm256_shuffle_epi8(q, select[2]),
                                         _mm256_shuffle_epi8(q, select[3]));
    const __m256i both = _mm256_add_epi8(low, high);
    __m128i* out = reinterpret_cast<__m128i*>(tables + i * stride);
    _mm_store_si128(out, _mm256_castsi256_si128(both));
    out = reinterpret_cast<__m128i*>(tables + (i + 1) * stride);
    _mm_store_si128(out, _mm256_extracti128_si256(both, 1));
  }
#endif
  // One table as two words of eight bytes: no sum carries into the next byte.
  for (; i < n; ++i) {
    const uint64_t q0 = codes[i] & 255, q1 = codes[i] >> 8 & 255, q2 = codes[i] >> 16 & 255,
                   q3 = codes[i] >> 24;
    const uint64_t low =
        q0 * 0x0100010001000100 + q1 * 0x0101000001010000 + q2 * 0x0101010100000000;
    const uint64_t words[2] = {low, low + q3 * 0x0101010101010101};
    std::memcpy(tables + i * stride, words, sizeof words);
  }
}

// For 32 floats, the words of [t >= 0] and [|t| <= 1].
inline void sign_masks(const float* t, uint32_t* signs, uint32_t* clip) {
  uint32_t sign = 0, inside = 0;
#if defined(FQT_SIMD_AVX512) || defined(FQT_SIMD_AVX2)
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  for (int i = 0; i < 4; ++i) {
    const __m256 v = _mm256_loadu_ps(t + 8 * i);
    const __m256 at_least_zero = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GE_OQ);
    const __m256 at_most_one =
        _mm256_cmp_ps(_mm256_and_ps(v, magnitude), _mm256_set1_ps(1.0f), _CMP_LE_OQ);
    sign |= static_cast<uint32_t>(_mm256_movemask_ps(at_least_zero)) << (8 * i);
    inside |= static_cast<uint32_t>(_mm256_movemask_ps(at_most_one)) << (8 * i);
  }
#else
  for (int i = 0; i < 32; ++i) {
    sign |= static_cast<uint32_t>(t[i] >= 0.0f) << i;
    inside |= static_cast<uint32_t>(t[i] >= -1.0f && t[i] <= 1.0f) << i;
  }
#endif
  *signs = sign;
  *clip = inside;
}

// Transposes `rows` x `columns` floats; rows of `in` and of `out` are `in_stride` and `out_stride`
// floats apart.
inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns, float* out,
                      int64_t out_stride) {
  int64_t i = 0;
#if defined(FQT_SIMD_AVX512) || defined(FQT_SIMD_AVX2)
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      __m256 a[8], b[8];
      for (int k = 0; k < 8; ++k) a[k] = _mm256_loadu_ps(in + (i + k) * in_stride + j);
      for (int k = 0; k < 8; k += 2) {
        b[k] = _mm256_unpacklo_ps(a[k], a[k + 1]);
        b[k + 1] = _mm256_unpackhi_ps(a[k], a[k + 1]);
      }
      for (int k = 0; k < 8; k += 4) {
        a[k] = _mm256_shuffle_ps(b[k], b[k + 2], 0x44);
        a[k + 1] = _mm256_shuffle_ps(b[k], b[k + 2], 0xEE);
        a[k + 2] = _mm256_shuffle_ps(b[k + 1], b[k + 3], 0x44);
        a[k + 3] = _mm256_shuffle_ps(b[k + 1], b[k + 3], 0xEE);
      }
      for (int k = 0; k < 4; ++k) {
        _mm256_storeu_ps(out + (j + k) * out_stride + i,
                         _mm256_permute2f128_ps(a[k], a[k + 4], 0x20));
        _mm256_storeu_ps(out + (j + k + 4) * out_stride + i,
                         _mm256_permute2f128_ps(a[k], a[k + 4], 0x31));
      }
    }
    for (; j < columns; ++j) {
      for (int64_t k = i; k < i + 8; ++k) out[j * out_stride + k] = in[k * in_stride + j];
    }
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = i; k < rows; ++k) out[j * out_stride + k] = in[k * in_stride + j];
  }
}

}  // namespace fqt::FQT_ISA
