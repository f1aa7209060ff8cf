// Statistics of channels, and what the norm of their groups makes of them: shared by the operators
// that normalise a map. Everything is centred; E[x²] - m² is nowhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "functions.h"

namespace dfm_fast {

// Mean and M2 of `count` values, in double: merging is rare and must not wear the mean.
struct Moments {
  double mean = 0, m2 = 0, count = 0;

  // n values more (Chan, Golub and LeVeque 1979).
  DFM_INLINE void merge(double n, double other, double other_m2) {
    double delta = other - mean, share = n / (count + n);
    mean += delta * share;
    m2 += other_m2 + delta * delta * (count * share);
    count += n;
  }
  // The same from sums of values, and of d and d², d = value - centre. The centre is their mean but
  // for rounding, so the difference below cancels nothing. Where it is small beside the values, the
  // d are rounded all alike: then their sum says less than the first one.
  DFM_INLINE void add(double n, double sum, double centre, double d, double squares) {
    double rest = d / n, found = squares - d * rest;
    merge(n, centre * centre * n > squares ? centre + rest : sum / n, found < 0 ? 0 : found);
  }
};

#if defined(__AVX512F__)

// 2^(j / 32)
alignas(64) inline constexpr float kPowers[32] = {
    1.00000000f, 1.02189720f, 1.04427373f, 1.06714046f, 1.09050775f, 1.11438680f, 1.13878858f,
    1.16372490f, 1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.57598090f, 1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.83400810f, 1.87416768f, 1.91520655f, 1.95714414f,
};

// e^-z up to 2e-7 of it, |z| bounded by 200: n is a multiple of 1/32, whose last five bits find 2
// to its fraction in two registers, and what is left is a polynomial of degree 2. Half the
// instructions of one polynomial.
inline Vec<float> exp_of_minus(Vec<float> z) {
  using V = Vec<float>;
  V bounded = detail::bits_as<V>(
      _mm512_maskz_range_ps(0xffff, detail::bits_as<__m512>(z), _mm512_set1_ps(200), 2));
  constexpr float magic = 0x1.8p18f;  // adding it rounds to multiples of 1/32
  V sum = bounded * -1.44269504f + magic, n = sum - magic, f = bounded * -1.44269504f - n;
  V power = detail::bits_as<V>(_mm512_permutex2var_ps(
      _mm512_load_ps(kPowers), detail::bits_as<__m512i>(sum), _mm512_load_ps(kPowers + 16)));
  V p = power * f * (f * 0.240226507f + 0.693147181f) + power;
  return detail::bits_as<V>(
      _mm512_maskz_scalef_ps(0xffff, detail::bits_as<__m512>(p), detail::bits_as<__m512>(n)));
}

#else

// e^-z up to 3e-7 of it: 2^n 2^f, n = round(x), and a minimax polynomial.
inline Vec<float> exp_of_minus(Vec<float> z) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  V x = z * -1.44269504f;
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

// 1 + e^-z: its error, |z| e^-z 6e-8, is below one rounding of z / (1 + e^-z), and this is what the
// passes wait for: half the time of `exp`, which is exact to the last place far from 0 as well.
inline Vec<float> one_and_exp(Vec<float> z) { return 1 + exp_of_minus(z); }
inline Vec<double> one_and_exp(Vec<double> z) { return 1 + exp(-z); }

// Whole vectors as they are, other lanes of the last one 0.
template <class A>
inline Vec<A> keep(Vec<A> v, Whole<A>) {
  return v;
}
template <class A>
inline Vec<A> keep(Vec<A> v, int count) {
  using I = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  Vec<I> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane < count ? v : Vec<A>{};
}

// Sums of K functions of a row: f(i, count, sum) adds to Vec<A> sum[K] what lies at i. Several
// accumulators, added in a fixed order.
template <int K, class A>
struct Sums {
  A of[K];
};
template <int K, class A, class F>
DFM_INLINE inline Sums<K, A> sum_row(int64_t n, F f) {
  constexpr int lanes = kLanes<A>, unrolled = 4;
  Vec<A> sum[unrolled][K] = {};
  int64_t i = 0;
  for (; i + unrolled * lanes <= n; i += unrolled * lanes)
    for (int u = 0; u < unrolled; ++u) f(i + u * lanes, Whole<A>{}, sum[u]);
  for (; i + lanes <= n; i += lanes) f(i, Whole<A>{}, sum[0]);
  if (i < n) f(i, static_cast<int>(n - i), sum[1]);
  Sums<K, A> total;
  for (int k = 0; k < K; ++k)
    total.of[k] = sum_lanes<A>((sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]));
  return total;
}

// Sums of x, and of d and d², d = x - centre.
template <class T, class A = acc_t<T>>
DFM_INLINE inline Sums<3, A> centred_sums(const T* x, int64_t n, A centre) {
  return sum_row<3, A>(n, [=](int64_t i, auto count, Vec<A>(&s)[3]) DFM_INLINE {
    Vec<A> v = load(x + i, count), d = keep<A>(v - centre, count);
    s[0] += v;  // 0 in the lanes over the end
    s[1] += d;
    s[2] += d * d;
  });
}

// Of a contiguous row, in blocks. The first is read twice, from the first-level cache the second
// time, and so is every block that the mean so far centres badly: where more than three quarters of
// its squares would cancel. The others are read once.
constexpr int64_t kRowBlock = 1024;
template <class T>
inline Moments row_moments(const T* x, int64_t n) {
  using A = acc_t<T>;
  Moments moments;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    int64_t size = std::min(kRowBlock, n - begin);
    const T* p = x + begin;
    A centre = moments.mean;
    auto sums = centred_sums(p, size, centre);
    auto [sum, d, squares] = sums.of;
    if (begin == 0 || !(squares < 4 * (squares - d * (d / size)))) {
      centre = sum / size;
      sums = centred_sums(p, size, centre);
    }
    moments.add(size, sum, centre, sums.of[1], sums.of[2]);
  }
  return moments;
}

// What of a norm belongs to one sample's channels, or to those of a group: null where not given.
template <class A>
struct NormParameters {
  const A *weight, *bias, *shift;  // [C], [C], [C] of the sample

  NormParameters from(int64_t c) const {
    return {weight ? weight + c : weight, bias ? bias + c : bias, shift ? shift + c : shift};
  }
};

// Per channel of a group: z = scale (x - centre) + offset, h = (x - centre) rstd. Returns rstd. The
// offset has what the centre lost when it was rounded, so that a large mean costs no digits.
template <class A>
inline A group_affine(int64_t count, int64_t channels, const A* mean, const A* m2,
                      const NormParameters<A>& given, double eps, A* scale, A* offset, A* centre) {
  auto moved = [&](int64_t c) { return double(mean[c]) + (given.shift ? given.shift[c] : 0); };
  double m = 0, squares = 0;
  for (int64_t c = 0; c < channels; ++c) m += moved(c);
  m /= channels;
  for (int64_t c = 0; c < channels; ++c) {
    double d = moved(c) - m;
    squares += m2[c] + count * (d * d);
  }
  double rstd = 1 / std::sqrt(squares / (double(count) * channels) + eps);
  for (int64_t c = 0; c < channels; ++c) {
    double middle = m - (given.shift ? given.shift[c] : 0);
    scale[c] = rstd * (given.weight ? given.weight[c] : 1);
    centre[c] = middle;
    offset[c] = (given.bias ? given.bias[c] : 0) - scale[c] * (middle - centre[c]);
  }
  return rstd;
}

}  // namespace dfm_fast
