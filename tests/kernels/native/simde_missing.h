// AVX-512 that the kernels use and SIMDe 0.7 lacks.
#pragma once

#include <cstdint>
#include <cstring>

#include <simde/x86/avx512.h>

inline __m512i cvtepu16_epi32(__m256i v) {
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v));
  const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#define _mm512_cvtepu16_epi32 cvtepu16_epi32

inline void mask_storeu_epi8(void* p, uint64_t mask, __m512i v) {
  alignas(64) char bytes[64];
  std::memcpy(bytes, &v, sizeof bytes);
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) static_cast<char*>(p)[i] = bytes[i];
  }
}
#define _mm512_mask_storeu_epi8 mask_storeu_epi8

template <typename Number, typename Vector>
Vector narrowed(__m512i v) {
  int64_t words[8];
  Number numbers[8];
  std::memcpy(words, &v, sizeof words);
  for (int i = 0; i < 8; ++i) numbers[i] = static_cast<Number>(words[i]);
  Vector result;
  std::memcpy(&result, numbers, sizeof result);
  return result;
}
#define _mm512_cvtepi64_epi16 narrowed<int16_t, __m128i>
#define _mm512_cvtepi64_epi32 narrowed<int32_t, __m256i>

inline __m512i maskz_loadu_epi64(uint8_t mask, const void* p) {
  alignas(64) int64_t words[8] = {};
  for (int i = 0; i < 8; ++i) {
    if (mask >> i & 1) std::memcpy(words + i, static_cast<const char*>(p) + 8 * i, 8);
  }
  __m512i v;
  std::memcpy(&v, words, sizeof v);
  return v;
}
#define _mm512_maskz_loadu_epi64 maskz_loadu_epi64

inline __m512 mask_i32gather_ps(__m512 v, uint16_t mask, __m512i index, const float* p, int) {
  alignas(64) int32_t offsets[16];
  alignas(64) float values[16];
  std::memcpy(offsets, &index, sizeof offsets);
  std::memcpy(values, &v, sizeof values);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) values[i] = p[offsets[i]];
  }
  std::memcpy(&v, values, sizeof values);
  return v;
}
#define _mm512_mask_i32gather_ps mask_i32gather_ps
