// "nearest" and "bilinear" halving height and width, one channel, coarse rows of whole vectors:
// what latents are. Nothing but registers between a fine plane and its level: `pyramids.h` is
// general, but its scratch rows, their borders and its loops over taps cost more than the
// arithmetic (measured on 8x16x128x128, AVX-512: 1.7 to 3 times slower). Results do not depend on
// bands: a row is always computed alike.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pyramids.h"

namespace dfm_fast {

// v rounded to T and back.
template <class T>
inline Vec<acc_t<T>> rounded(Vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, bf16>)
    return detail::widen(T{}, detail::to_bf16(v));
  else if constexpr (std::is_same_v<T, fp16>)
    return detail::widen(T{}, detail::to_fp16(v));
  else
    return v;
}

// Four coarse rows in scratch, (i - 1 .. i + 2) % 4, each continued by one pixel on either side.
template <class A>
struct CoarseRows {
  A* rows[4];
  int64_t m;  // columns
  int64_t last;

  CoarseRows(const LevelPlan<A>& plan, Workspace<A>& ws) : m(plan.coarse.W), last(plan.coarse.H) {
    for (int k = 0; k < 4; ++k) rows[k] = ws.row(plan, k);
    --last;
  }
  A* operator()(int64_t i) const { return rows[std::clamp<int64_t>(i, 0, last) & 3]; }
  void pad(int64_t i) const {
    A* row = (*this)(i);
    row[-1] = row[0], row[m] = row[m - 1];
  }
};

// Two vectors: to = base + scale * (even[0] odd[0] even[1] odd[1] ...).
template <class To, class Base, class A>
DFM_INLINE inline void add_zipped(To* to, const Base* base, Vec<A> even, Vec<A> odd, A scale) {
  constexpr int64_t lanes = kLanes<A>;
  std::make_index_sequence<kLanes<A>> order;
  store(to, load(base) + scale * detail::zipped(even, odd, order, 0));
  store(to + lanes, load(base + lanes) + scale * detail::zipped(even, odd, order, 1));
}

// Two fine rows: to = base + scale * repeat(c); 2 m columns.
template <class To, class Base, class A>
inline void add_repeated(const A* c, int64_t m, const Base* base, To* to, A scale) {
  for (int64_t j = 0; j < m; j += kLanes<A>) {
    Vec<A> v = load(c + j);
    for (int r = 0; r < 2; ++r)
      add_zipped(to + 2 * (r * m + j), base + 2 * (r * m + j), v, v, scale);
  }
}

// Two fine rows: to = base + sign * bilinear; above, here, below are coarse rows. Weights are 1 and
// 3, and 1/16 at the end: exact, and one operation less a tap.
template <class To, class Base, class A>
inline void add_bilinear(const A* above, const A* here, const A* below, int64_t m, const Base* base,
                         To* to, A sign) {
  const A three = 3, scale = sign / 16;
  for (int64_t j = 0; j < m; j += kLanes<A>) {
    Vec<A> left = three * load(here + j - 1), middle = three * load(here + j),
           right = three * load(here + j + 1);
    for (int r = 0; r < 2; ++r) {
      const A* other = r ? below : above;
      Vec<A> v = three * (middle + load(other + j));
      Vec<A> even = v + (left + load(other + j - 1)), odd = v + (right + load(other + j + 1));
      add_zipped(to + 2 * (r * m + j), base + 2 * (r * m + j), even, odd, scale);
    }
  }
}

// produce(i) for every coarse row that a band's fine rows need, two rows ahead of the fine rows: a
// row that was just written is slow to read at an offset of one. Then both fine rows of row i.
template <class A, class Produce, class Base, class To>
inline void box_rows(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, Produce produce,
                     const Base* base, To* to, A sign) {
  CoarseRows<A> c(plan, ws);
  int64_t halo = plan.bilinear, row = 2 * plan.fine.row();
  int64_t next = std::max<int64_t>(band.coarse_begin - halo, 0);
  int64_t end = std::min(band.coarse_end + halo, plan.coarse.H);
  for (int64_t i = band.coarse_begin; i < band.coarse_end; ++i) {
    for (; next < std::min(i + 3, end); ++next) {
      produce(next, c(next));
      c.pad(next);
    }
    prefetch<true>(to + i * row, row);
    if (plan.bilinear)
      add_bilinear(c(i - 1), c(i), c(i + 1), c.m, base + i * row, to + i * row, sign);
    else
      add_repeated(c(i), c.m, base + i * row, to + i * row, sign);
  }
}

template <class T, class A>
void box_build(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, const T* x, T* coarse,
               T* detail) {
  int64_t m = plan.coarse.W, row = 2 * plan.fine.row();
  auto produce = [&](int64_t i, A* to) {
    bool owned = i >= band.coarse_begin && i < band.coarse_end;
    const T *top = x + i * row, *bottom = top + 2 * m;
    prefetch<false>(top + row, row);
    for (int64_t j = 0; j < m; j += kLanes<A>) {
      Vec<A> a = load(top + 2 * j) + load(bottom + 2 * j);
      Vec<A> b = load(top + 2 * j + kLanes<A>) + load(bottom + 2 * j + kLanes<A>);
      Split<A> pair = unzip<A>(a, b);
      Vec<A> mean = A(0.25) * (pair.even + pair.odd);
      if (owned) store(coarse + i * m + j, mean);
      store(to + j, rounded<T>(mean));
    }
  };
  box_rows(plan, ws, band, produce, x, detail, A(-1));
}

template <class T, class A>
void box_collapse(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, const T* coarse,
                  const T* detail, T* fine) {
  int64_t m = plan.coarse.W, row = 2 * plan.fine.row();
  auto produce = [&](int64_t i, A* to) {
    prefetch<false>(detail + i * row, row);
    convert_row(to, coarse + i * m, m);
  };
  box_rows(plan, ws, band, produce, detail, fine, A(1));
}

// --- Backward ---

// Coarse row i of up^T y, y a fine plane: rows and columns 2i - 1 .. 2i + 2 with weights 1, 3, 3, 1
// and 1/16 at the end; over the edge the first and last count again, as `up` clamps.
template <class T, class A>
inline void adjoint_row(const LevelPlan<A>& plan, const T* y, int64_t i, A* to) {
  const int64_t lanes = kLanes<A>, m = plan.coarse.W, n = 2 * m;
  const T *b = y + 2 * i * n, *c = b + n;
  const T *a = i > 0 ? b - n : b, *d = i + 1 < plan.coarse.H ? c + n : c;
  const A three = 3;
  auto split = [&](int64_t j) DFM_INLINE {
    auto sum = [&](int64_t k) DFM_INLINE -> Vec<A> {
      Vec<A> inner = load(b + k) + load(c + k);
      if (!plan.bilinear) return inner;
      return three * inner + (load(a + k) + load(d + k));
    };
    return unzip<A>(sum(2 * j), sum(2 * j + lanes));
  };
  Split<A> v = split(0);
  Vec<A> odd_before = Vec<A>{} + v.even[0];
  for (int64_t j = 0; j < m; j += lanes) {
    bool more = j + lanes < m;
    Split<A> next = more ? split(j + lanes) : Split<A>{Vec<A>{} + v.odd[lanes - 1], v.odd};
    Vec<A> sum = v.even + v.odd;
    if (plan.bilinear) {
      sum = three * sum + (before<A>(odd_before, v.odd) + after<A>(v.even, next.even));
      sum *= A(0.0625);
    }
    store(to + j, sum);
    odd_before = v.odd, v = next;
  }
}

// c = grad - up^T(detail), fine = detail + repeat(c) / 4.
template <class T, class G, class To, class A>
void box_build_backward(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, const G* grad,
                        const T* detail, To* fine) {
  int64_t m = plan.coarse.W, row = 2 * plan.fine.row();
  A* c = ws.row(plan, 0);
  for (int64_t i = band.coarse_begin; i < band.coarse_end; ++i) {
    prefetch<false>(detail + (i + 1) * row, row);
    prefetch<true>(fine + i * row, row);
    adjoint_row(plan, detail, i, c);
    for (int64_t j = 0; j < m; j += kLanes<A>) store(c + j, load(grad + i * m + j) - load(c + j));
    add_repeated(c, m, detail + i * row, fine + i * row, A(0.25));
  }
}

// exact = up^T(grad), where it is wanted, and rounded.
template <class T, class G, class A>
void box_collapse_backward(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, const G* grad,
                           A* exact, T* rounded) {
  int64_t m = plan.coarse.W, row = 2 * plan.fine.row();
  for (int64_t i = band.coarse_begin; i < band.coarse_end; ++i) {
    prefetch<false>(grad + (i + 1) * row, row);
    A* to = exact ? exact + i * m : ws.row(plan, 0);
    adjoint_row(plan, grad, i, to);
    convert_row(rounded + i * m, to, m);
  }
}

}  // namespace dfm_fast
