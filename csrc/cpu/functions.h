// Functions of vectors: what the compiler does not vectorise by itself.
//
// Those of float are within 1 ulp where nothing else is said; those of double call the C library
// lane by lane.
#pragma once

#include <cmath>
#include <limits>

#include "rows.h"

namespace dfm_fast {

namespace detail {

template <int half, class A, size_t... I>
inline A sum_of_halves(Vec<A> v, std::index_sequence<I...> lanes) {
  v += __builtin_shufflevector(v, v, (I ^ half)...);
  if constexpr (half > 1)
    return sum_of_halves<half / 2, A>(v, lanes);
  else
    return v[0];
}

}  // namespace detail

// The lanes, added pairwise: the same order on every ISA of one width.
template <class A>
inline A sum_lanes(Vec<A> v) {
  return detail::sum_of_halves<kLanes<A> / 2, A>(v, std::make_index_sequence<kLanes<A>>{});
}

// f of every lane.
template <class F>
inline Vec<double> by_lane(Vec<double> v, F f) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = f(v[i]);
  return v;
}

// 2^n for whole n from -126 to 127.
inline Vec<float> power_of_two(Vec<float> n) {
  return detail::bits_as<Vec<float>>((__builtin_convertvector(n, Vec<int32_t>) + 127) << 23);
}

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2) / 2; ln 2 in two parts (Cody and Waite) and the
// polynomial of Cephes' expf. Its limits become 0, denormals and infinity by two factors of 2.
inline Vec<float> exp(Vec<float> x) {
  Vec<float> bounded = x > 128 ? Vec<float>{} + 128 : (x < -128 ? Vec<float>{} - 128 : x);
  constexpr float magic = 0x1.8p23f;  // adding it rounds to a whole number
  Vec<float> n = bounded * 1.44269504f + magic - magic;
  Vec<float> r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  Vec<float> half = n * 0.5f + magic - magic;
  return p * power_of_two(half) * power_of_two(n - half);
}
inline Vec<double> exp(Vec<double> x) {
  return by_lane(x, [](double v) { return std::exp(v); });
}

#if defined(__AVX512F__)

// 2^(j / 32)
alignas(64) inline constexpr float kPowers[32] = {
    1.00000000f, 1.02189720f, 1.04427373f, 1.06714046f, 1.09050775f, 1.11438680f, 1.13878858f,
    1.16372490f, 1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.57598090f, 1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.83400810f, 1.87416768f, 1.91520655f, 1.95714414f,
};

// 2^x up to 2e-7 of it, |x| bounded by 200: n is a multiple of 1/32, whose last five bits find 2 to
// its fraction in two registers, and what is left is a polynomial of degree 2. Half the
// instructions of one polynomial.
inline Vec<float> exp2_of(Vec<float> x) {
  using V = Vec<float>;
  x = detail::bits_as<V>(
      _mm512_maskz_range_ps(0xffff, detail::bits_as<__m512>(x), _mm512_set1_ps(200), 2));
  constexpr float magic = 0x1.8p18f;  // adding it rounds to multiples of 1/32
  V sum = x + magic, n = sum - magic, f = x - n;
  V power = detail::bits_as<V>(_mm512_permutex2var_ps(
      _mm512_load_ps(kPowers), detail::bits_as<__m512i>(sum), _mm512_load_ps(kPowers + 16)));
  V p = power * f * (f * 0.240226507f + 0.693147181f) + power;
  return detail::bits_as<V>(
      _mm512_maskz_scalef_ps(0xffff, detail::bits_as<__m512>(p), detail::bits_as<__m512>(n)));
}

#else

// 2^x up to 3e-7 of it, x bounded by -126 from below: 2^n 2^f, n = round(x), and a minimax
// polynomial.
inline Vec<float> exp2_of(Vec<float> x) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  x = x > -126 ? x : V{} - 126;
  V n = x + 0x1.8p23f, f = x - (n - 0x1.8p23f);  // adding it rounds to a whole number
  V p = f * 1.5353362e-4f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1;
  V power = detail::bits_as<V>(detail::bits_as<I>(p) + (detail::bits_as<I>(n) << 23));
  return x > 127 ? V{} + std::numeric_limits<float>::infinity() : power;
}

#endif

inline Vec<double> exp2_of(Vec<double> x) {
  return by_lane(x, [](double v) { return std::exp2(v); });
}

// 1 / (1 + e^-x); 0 where e^-x is infinite.
template <class V>
inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// Of the standard normal distribution.
template <class V>
struct Normal {
  V cdf;   // Φ(x)
  V bell;  // e^(-x²/2), the density times √(2π)
};

// Φ(-z) = e^(-z²/2) R(z) for z = |x| and 1 - Φ(-z) above 0: no cancellation in the tail. R, half of
// erfcx(z / √2), is a rational function: a minimax fit of the relative error on [0, 6] by Lawson's
// iteration, 5e-10 there, 3e-6 at 14, where e^(-z²/2) ends. Its terms are positive: a few
// roundings. Error of Φ: 1.2e-7.
inline Normal<Vec<float>> normal(Vec<float> x) {
  Vec<float> z = x < 0 ? -x : x;
  z = z > 15 ? Vec<float>{} + 15 : z;
  Vec<float> p = z * 3.06563848e-3f + 3.32061425e-2f;
  p = p * z + 1.60538569e-1f;
  p = p * z + 4.06400055e-1f;
  p = p * z + 0.5f;
  Vec<float> q = z * 7.68367015e-3f + 8.32616761e-2f;
  q = q * z + 4.09668028e-1f;
  q = q * z + 1.10621703f;
  q = q * z + 1.61068475f;
  q = q * z + 1;
  Vec<float> bell = exp(z * z * -0.5f), tail = bell * p / q;
  return {x > 0 ? 1 - tail : tail, bell};
}
inline Normal<Vec<double>> normal(Vec<double> x) {
  return {by_lane(x, [](double v) { return 0.5 * std::erfc(v * -0.70710678118654752440); }),
          exp(x * x * -0.5)};
}

}  // namespace dfm_fast
