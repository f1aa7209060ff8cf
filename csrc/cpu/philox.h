// The library's random stream, dfm_fast/ops/_philox.py: Philox4x32-10 and Box-Muller.
//
// Compilers vectorise neither well, so both are written for vectors: of 64-bit lanes whose low
// words count for Philox (its products are of 32 by 32 bits), of floats for Box-Muller. Every
// product that is added to is a `mul_add`: what the compiler contracted by itself could differ from
// one copy of the code to the next, and a normal must not depend on where in a loop it falls.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dfm_fast {

// a b + c, in one rounding where the CPU has that.
template <class A>
DFM_INLINE inline Vec<A> mul_add(Vec<A> a, Vec<A> b, Vec<A> c) {
  constexpr bool wide = std::is_same_v<A, double>;
#if defined(__AVX512F__)
  using detail::bits_as;
  if constexpr (wide)
    return bits_as<Vec<A>>(
        _mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
  else
    return bits_as<Vec<A>>(
        _mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__FMA__)
  using detail::bits_as;
  if constexpr (wide)
    return bits_as<Vec<A>>(
        _mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(c)));
  else
    return bits_as<Vec<A>>(
        _mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#else
  static_cast<void>(wide);
  return a * b + c;
#endif
}

namespace detail {

using Wide = Vec<uint64_t>;

// Products of the low words.
DFM_INLINE inline Wide multiply(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return bits_as<Wide>(_mm512_maskz_mul_epu32(0xff, bits_as<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bits_as<Wide>(_mm256_mul_epu32(bits_as<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bits_as<Wide>(_mm_mul_epu32(bits_as<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffff) * b;
#endif
}

DFM_INLINE inline Float square_root(Float v) {
#if defined(__AVX512F__)
  return bits_as<Float>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(v)));
#elif defined(__AVX2__)
  return bits_as<Float>(_mm256_sqrt_ps(bits_as<__m256>(v)));
#elif defined(__SSE2__)
  return bits_as<Float>(_mm_sqrt_ps(bits_as<__m128>(v)));
#else
  for (int i = 0; i < kFloats; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// float32(words) 2^-32 + 2^-33
DFM_INLINE inline Float uniform(Word words) {
#if defined(__AVX512F__)
  Float v = bits_as<Float>(_mm512_maskz_cvtepu32_ps(0xffff, bits_as<__m512i>(words)));
#else
  using Int = Vec<int32_t>;
  auto half = [](Word w) { return __builtin_convertvector(bits_as<Int>(w), Float); };
  Float v = mul_add<float>(half(words >> 16), Float{} + 0x1p16f, half(words & 0xffff));
#endif
  return mul_add<float>(v, Float{} + 0x1p-32f, Float{} + 0x1p-33f);
}

// sqrt(-2 ln u). With u = 2^e (1 + f), 3/4 <= 1 + f < 3/2, -2 ln(1 + f) is f (-2 + f p(f)), p the
// minimax polynomial (3e-8 of the result): right near u = 1, too, where e is 0 and f exact.
DFM_INLINE inline Float radius(Float u) {
  constexpr float p[] = {-0.108272217f, 0.241321862f, -0.299645334f, 0.336448878f,
                         -0.399544299f, 0.499869734f, -0.666670918f, 1.00000119f};
#if defined(__AVX512F__)
  auto mantissa = _mm512_maskz_getmant_ps(0xffff, bits_as<__m512>(u), _MM_MANT_NORM_p75_1p5,
                                          _MM_MANT_SIGN_zero);
  Float f = bits_as<Float>(mantissa) - 1;
  // 4/3 rounded up: 3/2 becomes 2, and what is below it less.
  Float exponent = bits_as<Float>(_mm512_maskz_getexp_ps(0xffff, bits_as<__m512>(u * 1.33333337f)));
#else
  using Int = Vec<int32_t>;
  Int bits = bits_as<Int>(u), e = (bits - 0x3f400000) >> 23;
  Float f = bits_as<Float>(bits - (e << 23)) - 1;
  Float exponent = __builtin_convertvector(e, Float);
#endif
  Float sum = Float{} + p[0];
  for (int k = 1; k < 8; ++k) sum = mul_add<float>(sum, f, Float{} + p[k]);
  sum = f * mul_add<float>(sum, f, Float{} - 2);
  return square_root(mul_add<float>(exponent, Float{} - 1.38629436f, sum));
}

// r (sin 2 pi u, cos 2 pi u): 2 u = q + h exactly, q whole and |h| <= 1/2; minimax polynomials
// (3e-9 and 2e-10) of sin and cos pi h, with the sign (-1)^q.
DFM_INLINE inline std::array<Float, 2> polar(Float r, Float u) {
  constexpr float round = 0x1.8p23f;  // its unit in the last place is 1
  constexpr float p[] = {0.078020148f, -0.598516941f, 2.55012584f, -5.16771412f, 3.14159274f};
  constexpr float q[] = {-0.0239637811f, 0.234683752f, -1.33516157f, 4.05870533f, -4.93480206f, 1};
  Float shifted = mul_add<float>(u, Float{} + 2, Float{} + round);
  Float h = mul_add<float>(u, Float{} + 2, round - shifted), h2 = h * h;
  Float s = Float{} + p[0], c = Float{} + q[0];
  for (int k = 1; k < 5; ++k) s = mul_add<float>(s, h2, Float{} + p[k]);
  for (int k = 1; k < 6; ++k) c = mul_add<float>(c, h2, Float{} + q[k]);
  r = bits_as<Float>(bits_as<Word>(r) ^ (bits_as<Word>(shifted) << 31));
  return {r * (h * s), r * c};
}

template <class V, size_t... I>
DFM_INLINE inline V unpacked(V a, V b, std::index_sequence<I...>, int upper) {
  // Of every 16 bytes the lower or the upper lanes of a and b in turn.
  constexpr size_t each = 16 / sizeof(a[0]), n = sizeof...(I);
  constexpr auto lane = [](size_t i, size_t upper) {
    return i / each * each + upper * each / 2 + i % each / 2 + i % 2 * n;
  };
  return upper ? __builtin_shufflevector(a, b, lane(I, 1)...)
               : __builtin_shufflevector(a, b, lane(I, 0)...);
}

// even[0] odd[0] even[2] odd[2] ...
template <class V, size_t... I>
DFM_INLINE inline V low_words(V even, V odd, std::index_sequence<I...>) {
  return __builtin_shufflevector(even, odd, (I / 2 * 2 + I % 2 * sizeof...(I))...);
}

}  // namespace detail

// Normals of one stream.
class Normals {
 public:
  Normals(uint64_t key, uint64_t first) : first(first) {
    uint32_t low = key, high = key >> 32;
    for (int r = 0; r < 10; ++r, low += 0x9E3779B9, high += 0xBB67AE85)
      keys_[2 * r] = low, keys_[2 * r + 1] = high;
  }

  uint64_t first;  // of a tensor: its element i is normal first + i

  // Four normals of each of kLanes<float> counters, in order.
  DFM_INLINE std::array<Vec<float>, 4> operator()(uint64_t counter) const {
    using namespace detail;
    Word x[4];
    // The vector rounds want counters that differ in their low words only, and no carry.
    if (static_cast<uint32_t>(counter) <= 0xffffffff - (kFloats - 1))
      words(counter, x, std::make_index_sequence<kFloats / 2>{});
    else
      words_one_by_one(counter, x);
    Float z[4];
    for (int k = 0; k < 4; k += 2) {
      auto pair = polar(radius(uniform(x[k])), uniform(x[k + 1]));
      z[k] = pair[0], z[k + 1] = pair[1];
    }
    return in_order(z);
  }

  // The same of one counter in float64.
  std::array<double, 4> wide(uint64_t counter) const {
    auto x = words(counter);
    std::array<double, 4> z;
    for (int k = 0; k < 4; k += 2) {
      double r = std::sqrt(-2 * std::log(x[k] * 0x1p-32 + 0x1p-33));
      double angle = 2 * M_PI * (x[k + 1] * 0x1p-32 + 0x1p-33);
      z[k] = r * std::sin(angle), z[k + 1] = r * std::cos(angle);
    }
    return z;
  }

 private:
  static constexpr uint32_t kMultipliers[] = {0xD2511F53, 0xCD9E8D57};
  static constexpr uint32_t kHigh = 0x3fffffff;  // counters are 62 bits: normals wrap at 2^64

  // Which counter a lane holds, so that `in_order` need not cross the 16-byte parts of a vector.
  static constexpr uint64_t counter_of(size_t lane) {
    return detail::kFloats / 4 * (lane % 4) + lane / 4;
  }

  std::array<uint32_t, 4> words(uint64_t counter) const {
    uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32) & kHigh};
    for (int r = 0; r < 10; ++r) {
      uint64_t p = uint64_t{c[0]} * kMultipliers[0], q = uint64_t{c[2]} * kMultipliers[1];
      c[0] = (q >> 32) ^ c[1] ^ keys_[2 * r], c[1] = q;
      c[2] = (p >> 32) ^ c[3] ^ keys_[2 * r + 1], c[3] = p;
    }
    return {c[0], c[1], c[2], c[3]};
  }

  __attribute__((noinline)) void words_one_by_one(uint64_t counter, detail::Word x[4]) const {
    for (int lane = 0; lane < detail::kFloats; ++lane) {
      auto one = words(counter + counter_of(lane));
      for (int k = 0; k < 4; ++k) x[k][lane] = one[k];
    }
  }

  // Even lanes, odd lanes in vectors of 64 bits. Two words of four are the same in all lanes in the
  // first two rounds, and the first products differ by constants.
  template <size_t... I>
  DFM_INLINE void words(uint64_t counter, detail::Word x[4], std::index_sequence<I...>) const {
    using namespace detail;
    constexpr uint64_t m = kMultipliers[0];
    const Wide products[2] = {{(counter_of(2 * I) * m)...}, {(counter_of(2 * I + 1) * m)...}};
    uint64_t p1 = static_cast<uint32_t>(counter) * m;
    uint64_t p2 = (static_cast<uint32_t>(counter >> 32 & kHigh) ^ keys_[0]) * m;
    Wide halves[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      Wide* c = halves[odd];
      Wide p = products[odd] + p1;
      Wide q = multiply((p >> 32) ^ keys_[1], kMultipliers[1]);
      c[0] = (q >> 32) ^ keys_[2], c[1] = q;
      c[2] = p ^ (p2 >> 32 ^ keys_[3]), c[3] = Wide{} + p2;
    }
    for (int r = 2; r < 10; ++r)
      for (auto& c : halves) {
        Wide p = multiply(c[0], kMultipliers[0]), q = multiply(c[2], kMultipliers[1]);
        c[0] = (q >> 32) ^ c[1] ^ keys_[2 * r], c[1] = q;
        c[2] = (p >> 32) ^ c[3] ^ keys_[2 * r + 1], c[3] = p;
      }
    for (int k = 0; k < 4; ++k)
      x[k] = low_words(bits_as<Word>(halves[0][k]), bits_as<Word>(halves[1][k]),
                       std::make_index_sequence<kFloats>{});
  }

  DFM_INLINE static std::array<Vec<float>, 4> in_order(const detail::Float z[4]) {
    using namespace detail;
    std::make_index_sequence<kFloats> floats;
    std::make_index_sequence<kFloats / 2> pairs;
    std::array<Float, 4> out;
    for (int upper = 0; upper < 2; ++upper) {
      Wide a = bits_as<Wide>(unpacked(z[0], z[1], floats, upper));
      Wide b = bits_as<Wide>(unpacked(z[2], z[3], floats, upper));
      for (int k = 0; k < 2; ++k) out[2 * upper + k] = bits_as<Float>(unpacked(a, b, pairs, k));
    }
    return out;
  }

  uint64_t keys_[20];  // low words
};

}  // namespace dfm_fast
