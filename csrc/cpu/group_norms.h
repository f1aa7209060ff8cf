// Statistics of channels, and what the norm of their groups makes of them: shared by the operators
// that normalise a map. Everything is centred; E[x²] - m² is nowhere.
#pragma once

#include <algorithm>
#include <cmath>

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

// 1 + e^-z: its error, |z| e^-z 6e-8, is below one rounding of z / (1 + e^-z), and this is what the
// passes wait for: half the time of `exp`, which is exact to the last place far from 0 as well.
inline Vec<float> one_and_exp(Vec<float> z) { return 1 + exp2_of(z * -1.44269504f); }
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
