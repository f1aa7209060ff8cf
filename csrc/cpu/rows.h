// Rows of tensors in any storage type, handled as SIMD vectors of the arithmetic type.
//
// Arithmetic is in float (double for double). One vector is as wide as the build allows, so the
// same source serves every ISA; intrinsics appear only where a conversion needs them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Loops hand vectors and row pointers to lambdas. A call in between would pass them through memory,
// and wait for it: narrow stores followed by a wide load of the same bytes are not forwarded.
#define DFM_INLINE __attribute__((always_inline))

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

// --- Conversions ---

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

inline Word widen_words(HalfWord h) {
#if defined(__AVX512F__)
  return bits_as<Word>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(h)));
#elif defined(__AVX2__)
  return bits_as<Word>(_mm256_cvtepu16_epi32(bits_as<__m128i>(h)));
#else
  return __builtin_convertvector(h, Word);
#endif
}

// Round to nearest even.
inline HalfWord to_bf16(Float v) {
  Word bits = bits_as<Word>(v);
  Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v != v ? Word{} + 0x7fc0 : rounded, HalfWord);
}

// The float operations round to nearest even in the fp16's last place (fbgemm's and c10's method).
inline Float from_fp16(HalfWord h) {
#if defined(__AVX512F__)
  return bits_as<Float>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(h)));
#elif defined(__F16C__)
  return bits_as<Float>(_mm256_cvtph_ps(bits_as<__m128i>(h)));
#else
  Word w = widen_words(h) << 16;
  Word sign = w & 0x80000000, twice = w + w;
  Word normal = bits_as<Word>(bits_as<Float>((twice >> 4) + (0xe0u << 23)) * 0x1p-112f);
  Word denormal = bits_as<Word>(bits_as<Float>((twice >> 17) | (126u << 23)) - 0.5f);
  return bits_as<Float>(sign | (twice < (1u << 27) ? denormal : normal));
#endif
}

inline HalfWord to_fp16(Float v) {
#if defined(__AVX512F__)
  return bits_as<HalfWord>(
      _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
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

inline Float widen(fp16, HalfWord h) { return from_fp16(h); }
inline Float widen(bf16, HalfWord h) { return bits_as<Float>(widen_words(h) << 16); }

}  // namespace detail

// --- Loads and stores ---

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
inline Vec<float> load(const bf16* p) { return detail::widen(*p, detail::load_half_words(p)); }
inline Vec<float> load(const fp16* p) { return detail::widen(*p, detail::load_half_words(p)); }

// One element. (A masked load would wait for the store of a row that was just written.)
template <class T>
inline acc_t<T> load_one(const T* p) {
  if constexpr (sizeof(T) == 2) {
    detail::HalfWord h{};
    h[0] = p->bits;
    return detail::widen(*p, h)[0];
  } else {
    return *p;
  }
}

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

// `count` is Whole for a whole vector, an int for the end of a row (the other lanes are 0).
template <class A>
using Whole = std::integral_constant<int, kLanes<A>>;

template <class T>
inline auto load(const T* p, Whole<acc_t<T>>) {
  return load(p);
}
template <class T>
inline auto load(const T* p, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  uint32_t mask = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    return detail::bits_as<Vec<float>>(_mm512_maskz_loadu_ps(mask, p));
  else if constexpr (sizeof(T) == 2)
    return detail::widen(T{}, detail::bits_as<detail::HalfWord>(_mm256_maskz_loadu_epi16(mask, p)));
  else
    return detail::bits_as<Vec<double>>(_mm512_maskz_loadu_pd(mask, p));
#else
  T rest[kLanes<acc_t<T>>] = {};
  std::memcpy(rest, p, count * sizeof(T));
  return load(rest);
#endif
}
template <class T>
inline void store(T* p, Vec<acc_t<T>> v, Whole<acc_t<T>>) {
  store(p, v);
}
template <class T>
inline void store(T* p, Vec<acc_t<T>> v, int count) {
  T rest[kLanes<acc_t<T>>];
  store(rest, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 2)
    _mm256_mask_storeu_epi16(p, mask, detail::bits_as<__m256i>(detail::load_half_words(rest)));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, mask, detail::bits_as<__m512>(v));
  else
    _mm512_mask_storeu_pd(p, mask, detail::bits_as<__m512d>(v));
#else
  std::memcpy(p, rest, count * sizeof(T));
#endif
}

// f(i, count) for every vector of a row of n elements.
template <class A, class F>
DFM_INLINE inline void for_vectors(int64_t n, F f) {
  constexpr int lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, Whole<A>{});
  if (i < n) f(i, static_cast<int>(n - i));
}

// --- Row operations ---

// to = from, converted.
template <class To, class From>
inline void convert_row(To* __restrict to, const From* __restrict from, int64_t n) {
  for_vectors<acc_t<To>>(
      n, [=](int64_t i, auto count) DFM_INLINE { store(to + i, load(from + i, count), count); });
}

// K rows and their weights.
template <int K, class From>
struct WeightedRows {
  using A = acc_t<From>;
  const From* row[K];
  A weight[K];

  template <class Count>
  DFM_INLINE Vec<A> sum(int64_t i, Count count) const {
    Vec<A> sum = weight[0] * load(row[0] + i, count);
    for (int k = 1; k < K; ++k) sum += weight[k] * load(row[k] + i, count);
    return sum;
  }
  A sum_one(int64_t i) const {
    A sum = weight[0] * load_one(row[0] + i);
    for (int k = 1; k < K; ++k) sum += weight[k] * load_one(row[k] + i);
    return sum;
  }
};

// f(WeightedRows<K, From>) for a number of rows K = 1 .. most; make_row(k) names them.
template <int most, class From, class MakeRow, class F>
DFM_INLINE inline void with_rows(int K, const MakeRow& make_row, const acc_t<From>* weights,
                                 const F& f) {
  if (K == most) {
    WeightedRows<most, From> rows;
    for (int k = 0; k < most; ++k) rows.row[k] = make_row(k), rows.weight[k] = weights[k];
    return f(rows);
  }
  if constexpr (most > 1) with_rows<most - 1, From>(K, make_row, weights, f);
}

// to = sum_k weight[k] row[k]
template <class To, int K, class From>
DFM_INLINE inline void weighted_sum(To* to, const WeightedRows<K, From>& rows, int64_t n) {
  for_vectors<acc_t<From>>(
      n, [&](int64_t i, auto count) DFM_INLINE { store(to + i, rows.sum(i, count), count); });
}

// to = base + sum_k weight[k] row[k]; `base` may be `to`.
template <class To, class Base, int K, class From>
DFM_INLINE inline void add_weighted_sum(To* to, const Base* base, const WeightedRows<K, From>& rows,
                                        int64_t n) {
  for_vectors<acc_t<From>>(n, [&](int64_t i, auto count) DFM_INLINE {
    store(to + i, load(base + i, count) + rows.sum(i, count), count);
  });
}

// Ask for what lies a little after p[0 .. n), as whole planes are worked through in order. Several
// streams of short rows are too much for the hardware's prefetchers (measured: 1.5 to 2 times
// slower without).
template <bool write, class T>
inline void prefetch(const T* p, int64_t n) {
  constexpr int64_t line = 64, distance = write ? 2048 : 4096;
  auto at = reinterpret_cast<uintptr_t>(p) + distance;
  for (auto end = at + n * sizeof(T); at < end; at += line)
    __builtin_prefetch(reinterpret_cast<const void*>(at), write);
}

// --- Lanes ---

namespace detail {

template <class V, size_t... I>
inline V every_second(V a, V b, std::index_sequence<I...>, int odd) {
  return odd ? __builtin_shufflevector(a, b, (2 * I + 1)...)
             : __builtin_shufflevector(a, b, (2 * I)...);
}
template <class V, size_t... I>
inline V zipped(V a, V b, std::index_sequence<I...>, int upper) {
  constexpr size_t n = sizeof...(I);
  return upper ? __builtin_shufflevector(a, b, (n / 2 + I / 2 + I % 2 * n)...)
               : __builtin_shufflevector(a, b, (I / 2 + I % 2 * n)...);
}

template <class V, size_t... I>
inline V lanes_from(V a, V b, std::index_sequence<I...>, int last) {
  return last ? __builtin_shufflevector(a, b, (sizeof...(I) - 1 + I)...)
              : __builtin_shufflevector(a, b, (1 + I)...);
}

}  // namespace detail

// The lanes of neighbouring vectors one place to the left, and to the right, of the second one's
// and the first one's.
template <class A>
inline Vec<A> before(Vec<A> previous, Vec<A> v) {
  return detail::lanes_from(previous, v, std::make_index_sequence<kLanes<A>>{}, 1);
}
template <class A>
inline Vec<A> after(Vec<A> v, Vec<A> next) {
  return detail::lanes_from(v, next, std::make_index_sequence<kLanes<A>>{}, 0);
}

template <class A>
struct Split {
  Vec<A> even{}, odd{};
};

// a[0] a[2] ... b[0] b[2] ... and a[1] a[3] ... b[1] b[3] ...
template <class A>
inline Split<A> unzip(Vec<A> a, Vec<A> b) {
  std::make_index_sequence<kLanes<A>> lanes;
  return {detail::every_second(a, b, lanes, 0), detail::every_second(a, b, lanes, 1)};
}

// to = even[0] odd[0] even[1] odd[1] ...
template <class A>
inline void store_zipped(A* to, Vec<A> even, Vec<A> odd) {
  std::make_index_sequence<kLanes<A>> lanes;
  store(to, detail::zipped(even, odd, lanes, 0));
  store(to + kLanes<A>, detail::zipped(even, odd, lanes, 1));
}

}  // namespace dfm_fast
