// Rows of tensors in any storage type, handled as SIMD vectors of the arithmetic type.
//
// Arithmetic is in float (double for double). One vector is as wide as the build allows, so the
// same source serves every ISA; intrinsics appear only where a conversion needs them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dfm_fast {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The arithmetic type of a storage type.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A, int bytes = kVectorBytes>
struct VecOf {
  typedef A type __attribute__((vector_size(bytes)));
};
template <class A, int bytes = kVectorBytes>
using Vec = typename VecOf<A, bytes>::type;

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

// --- Conversions ---------------------------------------------------------------------------------

namespace detail {

constexpr int kFloats = kLanes<float>;
using Float = Vec<float>;
using Word = Vec<uint32_t>;
using HalfWord = Vec<uint16_t, kVectorBytes / 2>;

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline HalfWord load_half_words(const void* p) {
  HalfWord v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Round to nearest even; NaN keeps its sign and becomes quiet.
inline HalfWord to_bf16(Float v) {
  Word bits = bits_as<Word>(v);
  Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Word nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, HalfWord);
}

// The float operations round to nearest even in the fp16's last place (fbgemm's and c10's method).
inline Float from_fp16(HalfWord h) {
#if defined(__AVX512F__)
  return bits_as<Float>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(h)));
#elif defined(__F16C__)
  return bits_as<Float>(_mm256_cvtph_ps(bits_as<__m128i>(h)));
#else
  Word w = __builtin_convertvector(h, Word) << 16;
  Word sign = w & 0x80000000, twice = w + w;
  Word normal = bits_as<Word>(bits_as<Float>((twice >> 4) + (0xe0u << 23)) * 0x1p-112f);
  Word denormal = bits_as<Word>(bits_as<Float>((twice >> 17) | (126u << 23)) - 0.5f);
  return bits_as<Float>(sign | (twice < (1u << 27) ? denormal : normal));
#endif
}

inline HalfWord to_fp16(Float v) {
#if defined(__AVX512F__)
  return bits_as<HalfWord>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bits_as<HalfWord>(_mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  Word bits = bits_as<Word>(v), sign = bits & 0x80000000, twice = bits + bits;
  Float base = bits_as<Float>(bits ^ sign) * 0x1p112f * 0x1p-110f;
  Word bias = twice & 0xff000000;
  bias = bias < 0x71000000 ? Word{} + 0x71000000 : bias;
  Word sum = bits_as<Word>(bits_as<Float>((bias >> 1) + 0x07800000) + base);
  Word half = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  return __builtin_convertvector((sign >> 16) | (twice > 0xff000000 ? Word{} + 0x7e00 : half),
                                 HalfWord);
#endif
}

}  // namespace detail

// --- Loads and stores ----------------------------------------------------------------------------

inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const bf16* p) {
  auto wide = __builtin_convertvector(detail::load_half_words(p), detail::Word);
  return detail::bits_as<Vec<float>>(wide << 16);
}
inline Vec<float> load(const fp16* p) { return detail::from_fp16(detail::load_half_words(p)); }

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Vec<float> v) {
  auto bits = detail::to_bf16(v);
  std::memcpy(p, &bits, sizeof bits);
}
inline void store(fp16* p, Vec<float> v) {
  auto bits = detail::to_fp16(v);
  std::memcpy(p, &bits, sizeof bits);
}

// `count` is a std::integral_constant for a whole vector, an int for the end of a row.
template <class T, int lanes>
inline auto load(const T* p, std::integral_constant<int, lanes>) {
  return load(p);
}
template <class T>
inline auto load(const T* p, int count) {
  T rest[kLanes<acc_t<T>>] = {};
  std::memcpy(rest, p, count * sizeof(T));
  return load(rest);
}
template <class T, int lanes>
inline void store(T* p, Vec<acc_t<T>> v, std::integral_constant<int, lanes>) {
  store(p, v);
}
template <class T>
inline void store(T* p, Vec<acc_t<T>> v, int count) {
  T rest[kLanes<acc_t<T>>];
  store(rest, v);
  std::memcpy(p, rest, count * sizeof(T));
}

// f(i, count) for every vector of a row of n elements.
template <class A, class F>
inline void for_vectors(int64_t n, F f) {
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, std::integral_constant<int, lanes>{});
  if (i < n) f(i, static_cast<int>(n - i));
}

// --- Row operations ------------------------------------------------------------------------------

// to = from, converted.
template <class To, class From>
inline void convert_row(To* __restrict to, const From* __restrict from, int64_t n) {
  for_vectors<acc_t<To>>(n, [=](int64_t i, auto count) {
    store(to + i, load(from + i, count), count);
  });
}

// to = base + sum_k weight[k] rows[k], or without base where it is null; elementwise, so `base` may
// be `to`.
template <int K, bool with_base, class To, class Base, class From, class A>
inline void weighted_sum_of(To* to, const Base* base, const From* const* rows, const A* weight,
                            int64_t n) {
  Vec<A> w[K];
  const From* row[K];
  for (int k = 0; k < K; ++k) w[k] = Vec<A>{} + weight[k], row[k] = rows[k];
  for_vectors<A>(n, [&](int64_t i, auto count) {
    Vec<A> sum;
    if constexpr (with_base)
      sum = load(base + i, count) + w[0] * load(row[0] + i, count);
    else
      sum = w[0] * load(row[0] + i, count);
    for (int k = 1; k < K; ++k) sum += w[k] * load(row[k] + i, count);
    store(to + i, sum, count);
  });
}

template <bool with_base, class To, class Base, class From, class A>
inline void weighted_sum(To* to, const Base* base, const From* const* rows, const A* weight, int K,
                         int64_t n) {
  switch (K) {
    case 1:
      return weighted_sum_of<1, with_base>(to, base, rows, weight, n);
    case 2:
      return weighted_sum_of<2, with_base>(to, base, rows, weight, n);
    case 3:
      return weighted_sum_of<3, with_base>(to, base, rows, weight, n);
    case 4:
      return weighted_sum_of<4, with_base>(to, base, rows, weight, n);
    case 5:
      return weighted_sum_of<5, with_base>(to, base, rows, weight, n);
    case 6:
      return weighted_sum_of<6, with_base>(to, base, rows, weight, n);
    case 7:
      return weighted_sum_of<7, with_base>(to, base, rows, weight, n);
    case 8:
      return weighted_sum_of<8, with_base>(to, base, rows, weight, n);
  }
}

}  // namespace dfm_fast
