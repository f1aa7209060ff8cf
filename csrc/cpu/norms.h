// Rows of norms, forward and backward; dfm_fast/ops/norms.py has the formulas.
//
// A row is read from memory once and from the first cache after that, so its statistics are taken
// in passes of their own: first the mean, then the centred squares.
#pragma once

#include <algorithm>
#include <cmath>

#include "functions.h"

namespace dfm_fast {

enum class Norm { none, rms, layer };

// Lanes of a row's end that are no elements become 0.
template <class A>
inline Vec<A> only(Vec<A> v, Whole<A>) {
  return v;
}
template <class A>
inline Vec<A> only(Vec<A> v, int count) {
  Vec<A> lane{};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<A>(i);
  return lane < static_cast<A>(count) ? v : Vec<A>{};
}

// K sums over a row.
template <class A, int K>
struct Sums {
  Vec<A> v[K]{};
  DFM_INLINE void operator+=(const Sums& other) {
    for (int k = 0; k < K; ++k) v[k] += other.v[k];
  }
  A operator[](int k) const { return sum_lanes<A>(v[k]); }
};

// term(i, count) -> Sums<A, K> of one vector. Four chains of additions, as one waits for itself.
template <class A, int K, class F>
DFM_INLINE inline Sums<A, K> sum_row(int64_t n, F term) {
  constexpr int lanes = kLanes<A>;
  Sums<A, K> a, b, c, d;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a += term(i, Whole<A>{});
    b += term(i + lanes, Whole<A>{});
    c += term(i + 2 * lanes, Whole<A>{});
    d += term(i + 3 * lanes, Whole<A>{});
  }
  for (; i + lanes <= n; i += lanes) a += term(i, Whole<A>{});
  if (i < n) b += term(i, static_cast<int>(n - i));
  a += b, c += d, a += c;
  return a;
}

// --- Forward ---

// to = x + gate y
template <class T, class M>
inline void gate_row(T* to, const T* x, const T* y, const M* gate, int64_t n) {
  for_vectors<acc_t<T>>(n, [=](int64_t i, auto count) DFM_INLINE {
    store(to + i, load(x + i, count) + load(gate + i, count) * load(y + i, count), count);
  });
}

// to = x rstd weight; returns rstd. `weight` may be null.
template <class T, class M>
inline acc_t<T> rms_row(T* to, const T* x, const M* weight, int64_t n, acc_t<T> eps) {
  using A = acc_t<T>;
  auto sums = sum_row<A, 1>(n, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> v = load(x + i, count);
    return Sums<A, 1>{v * v};
  });
  A rstd = 1 / std::sqrt(sums[0] / n + eps);
  if (weight)
    for_vectors<A>(n, [=](int64_t i, auto count) DFM_INLINE {
      store(to + i, load(x + i, count) * rstd * load(weight + i, count), count);
    });
  else
    for_vectors<A>(n, [=](int64_t i, auto count)
                          DFM_INLINE { store(to + i, load(x + i, count) * rstd, count); });
  return rstd;
}

template <class A>
struct Moments {
  A mean, rstd;
};

// to = xhat (1 + scale) + shift. `rest` is what the rounding of the mean left in x - mean; its
// square is taken from the variance too (Chan, Golub, LeVeque 1983).
template <class T, class M>
inline Moments<acc_t<T>> layer_row(T* to, const T* x, const M* shift, const M* scale, int64_t n,
                                   acc_t<T> eps) {
  using A = acc_t<T>;
  auto sum = sum_row<A, 1>(
      n, [=](int64_t i, auto count) DFM_INLINE { return Sums<A, 1>{Vec<A>(load(x + i, count))}; });
  A mean = sum[0] / n;
  auto centred = sum_row<A, 2>(n, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> d = only<A>(load(x + i, count) - mean, count);
    return Sums<A, 2>{d, d * d};
  });
  A rest = centred[0] / n;
  A rstd = 1 / std::sqrt(std::max(A(0), centred[1] / n - rest * rest) + eps);
  for_vectors<A>(n, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> xhat = (load(x + i, count) - mean - rest) * rstd;
    store(to + i, xhat * (1 + load(scale + i, count)) + load(shift + i, count), count);
  });
  return {mean, rstd};
}

// --- Backward ---

// What one row reads and writes; what a kind of norm has no use for is null. Gradients of the
// modulation: sums over rows, or rows of their own where every token has its own modulation.
template <class T, class M, class D>
struct BackwardRow {
  using A = acc_t<T>;
  const T *dresidual, *dnormed, *x, *y;
  const M *gate, *scale;
  T *dx, *dy;
  D *dgate, *dshift, *dscale;
  A mean, rstd;
  int64_t n;
};

// add: to += v, else to = v.
template <bool add, class D, class V, class Count>
DFM_INLINE inline void put(D* to, V v, Count count) {
  if constexpr (add)
    store(to, load(to, count) + v, count);
  else
    store(to, v, count);
}

// dy and dgate, given dr.
template <bool add, class Row, class V, class Count>
DFM_INLINE inline void branch(const Row& r, int64_t i, V dr, Count count) {
  store(r.dy + i, load(r.gate + i, count) * dr, count);
  put<add>(r.dgate + i, dr * load(r.y + i, count), count);
}

template <bool add, class Row>
inline void gate_backward_row(const Row r) {
  for_vectors<typename Row::A>(r.n, [=](int64_t i, auto count) DFM_INLINE {
    branch<add>(r, i, load(r.dresidual + i, count), count);
  });
}

// `scaled`: there is a weight; its gradient is dscale.
template <bool scaled, bool add, class Row>
inline void rms_backward_row(const Row r) {
  using A = typename Row::A;
  auto g = [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> dy = load(r.dnormed + i, count);
    if constexpr (scaled) dy *= load(r.scale + i, count);
    return dy;
  };
  auto sums = sum_row<A, 1>(r.n, [=](int64_t i, auto count) DFM_INLINE {
    return Sums<A, 1>{g(i, count) * load(r.x + i, count)};
  });
  A slope = sums[0] * r.rstd / r.n;
  for_vectors<A>(r.n, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> xhat = load(r.x + i, count) * r.rstd;
    if constexpr (scaled) put<add>(r.dscale + i, load(r.dnormed + i, count) * xhat, count);
    store(r.dx + i, r.rstd * (g(i, count) - xhat * slope), count);
  });
}

// `gated`: x is a residual x' + gate y, which may have a gradient of its own.
template <bool gated, bool add, class Row>
inline void layer_backward_row(const Row r) {
  using A = typename Row::A;
  auto g = [=](int64_t i, auto count) DFM_INLINE {
    return Vec<A>(load(r.dnormed + i, count) * (1 + load(r.scale + i, count)));
  };
  auto sums = sum_row<A, 3>(r.n, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> d = only<A>(load(r.x + i, count) - r.mean, count), v = g(i, count);
    return Sums<A, 3>{v, v * d, d};
  });
  A rest = sums[2] / r.n, level = sums[0] / r.n;
  A slope = (sums[1] / r.n - rest * level) * r.rstd;
  for_vectors<A>(r.n, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> xhat = (load(r.x + i, count) - r.mean - rest) * r.rstd;
    Vec<A> dn = load(r.dnormed + i, count);
    Vec<A> dr = r.rstd * (dn * (1 + load(r.scale + i, count)) - level - xhat * slope);
    put<add>(r.dshift + i, dn, count);
    put<add>(r.dscale + i, dn * xhat, count);
    if constexpr (gated) {
      if (r.dresidual) dr += load(r.dresidual + i, count);
      branch<add>(r, i, dr, count);
    }
    store(r.dx + i, dr, count);
  });
}

}  // namespace dfm_fast
