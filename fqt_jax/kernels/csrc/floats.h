// Vectors of floats, in the compiler's own terms: they work like floats, entry by entry.
//
// Loops over channels are written once, for a FloatVec of them and for a single float.

namespace fqt::FQT_ISA {

#if defined(FQT_SIMD_AVX512)
constexpr int64_t kFloats = 16;
#elif defined(FQT_SIMD_AVX2)
constexpr int64_t kFloats = 8;
#else
constexpr int64_t kFloats = 4;
#endif

typedef float FloatVec __attribute__((vector_size(4 * kFloats)));
typedef int32_t IntVec __attribute__((vector_size(4 * kFloats)));
typedef int16_t ShortVec __attribute__((vector_size(2 * kFloats)));

template <typename V, typename T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// V is a FloatVec or a float.
template <typename V, typename Source>
inline V load_floats(const Source* p) {
  if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(*p);
  } else if constexpr (std::is_same_v<Source, float>) {
    return load_as<V>(p);
  } else if constexpr (std::is_same_v<Source, int32_t>) {
    return __builtin_convertvector(load_as<IntVec>(p), V);
  } else {
    return __builtin_convertvector(__builtin_convertvector(load_as<ShortVec>(p), IntVec), V);
  }
}

template <typename T, typename V>
inline void store_floats(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Calls `run(V{}, k)` for the channels from k on: a FloatVec of them at a time, then each of those
// left.
template <typename Run>
inline void for_channels(int64_t c, Run run) {
  int64_t k = 0;
  for (; k + kFloats <= c; k += kFloats) run(FloatVec{}, k);
  for (; k < c; ++k) run(0.0f, k);
}

}  // namespace fqt::FQT_ISA
