// The 2x filters along W, on scratch rows of W pixels of C channels (C = 1: contiguous planes).
//
// Rows may be overrun: buffers have kRowMargin elements and two pixels of slack on either side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "filters.h"
#include "rows.h"

namespace dfm_fast {

constexpr int64_t kRowMargin = 16;

template <class A>
using RowFilter = void (*)(const A* x, A* y, int64_t m, int64_t C, const A* p);

// y[i] = sum_k p[k] x[2i+k], k = first..last; m outputs; one channel.
template <int first, int last, class A>
inline void gather_single(const A* __restrict x, A* __restrict y, int64_t m, int64_t, const A* p) {
  const A a = p[0], b = p[1], c = p[2], d = p[3], e = p[4];
  for (int64_t i = 0; i < m; ++i) {
    A sum = c * x[2 * i] + d * x[2 * i + 1];
    if constexpr (first < 0) sum += b * x[2 * i - 1];
    if constexpr (first < -1) sum += a * x[2 * i - 2];
    if constexpr (last > 1) sum += e * x[2 * i + 2];
    y[i] = sum;
  }
}

// y[2i], y[2i+1] from x[i-1], x[i], x[i+1]; m inputs, 2m outputs; one channel.
template <int first, int last, class A>
inline void spread_single(const A* __restrict x, A* __restrict y, int64_t m, int64_t, const A* p) {
  const A a = p[0], b = p[1], c = p[2], d = p[3], e = p[4];
  for (int64_t i = 0; i < m; ++i) {
    A even = c * x[i], odd = d * x[i];
    if constexpr (first < 0) odd += b * x[i + 1];
    if constexpr (first < -1) even += a * x[i + 1];
    if constexpr (last > 1) even += e * x[i - 1];
    y[2 * i] = even;
    y[2 * i + 1] = odd;
  }
}

// The same for C channels: a vector of V per step, whose excess the next pixel overwrites.
template <int first, int last, class V, class A>
inline void gather_pixels(const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  auto at = [](const A* q) {
    V v;
    std::memcpy(&v, q, sizeof v);
    return v;
  };
  for (int64_t i = 0; i < m; ++i, x += 2 * C, y += C)
    for (int64_t c = 0; c < C; c += lanes) {
      V sum = p[2] * at(x + c) + p[3] * at(x + C + c);
      if constexpr (first < 0) sum += p[1] * at(x - C + c);
      if constexpr (first < -1) sum += p[0] * at(x - 2 * C + c);
      if constexpr (last > 1) sum += p[4] * at(x + 2 * C + c);
      std::memcpy(y + c, &sum, sizeof sum);
    }
}

template <int first, int last, class V, class A>
inline void spread_pixels(const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  auto at = [](const A* q) {
    V v;
    std::memcpy(&v, q, sizeof v);
    return v;
  };
  for (int64_t i = 0; i < m; ++i, x += C, y += 2 * C) {
    for (int64_t c = 0; c < C; c += lanes) {
      V even = p[2] * at(x + c);
      if constexpr (first < -1) even += p[0] * at(x + C + c);
      if constexpr (last > 1) even += p[4] * at(x - C + c);
      std::memcpy(y + c, &even, sizeof even);
    }
    for (int64_t c = 0; c < C; c += lanes) {
      V odd = p[3] * at(x + c);
      if constexpr (first < 0) odd += p[1] * at(x + C + c);
      std::memcpy(y + C + c, &odd, sizeof odd);
    }
  }
}

// "dct": p is the [4][8] block.
template <class A>
inline void gather_blocks(const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  for (int64_t b = 0; b < m / 4; ++b, x += 8 * C, y += 4 * C)
    for (int64_t c = 0; c < C; ++c)
      for (int r = 0; r < 4; ++r) {
        A sum = 0;
        for (int k = 0; k < 8; ++k) sum += p[8 * r + k] * x[k * C + c];
        y[r * C + c] = sum;
      }
}

template <class A>
inline void spread_blocks(const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  for (int64_t b = 0; b < m / 4; ++b, x += 4 * C, y += 8 * C)
    for (int64_t c = 0; c < C; ++c)
      for (int k = 0; k < 8; ++k) {
        A sum = 0;
        for (int r = 0; r < 4; ++r) sum += p[8 * r + k] * x[r * C + c];
        y[k * C + c] = sum;
      }
}

template <int first, int last, class A>
RowFilter<A> pick_filter(bool spread, int64_t C) {
  constexpr int least = 4 * sizeof(A);
  if (C == 1) return spread ? spread_single<first, last, A> : gather_single<first, last, A>;
  if (C <= 4)
    return spread ? spread_pixels<first, last, Vec<A, least>, A>
                  : gather_pixels<first, last, Vec<A, least>, A>;
  return spread ? spread_pixels<first, last, Vec<A>, A> : gather_pixels<first, last, Vec<A>, A>;
}

// One 2x step along W.
template <class A>
struct HorizontalStep {
  int64_t fine, coarse, C;
  std::vector<A> p;
  std::vector<Tap> corrections;  // (row of the result, column of the source)
  RowFilter<A> filter;

  HorizontalStep(Filter kind, Matrix matrix, int64_t n, int64_t C, bool spread)
      : fine(n), coarse(half(n)), C(C) {
    std::vector<Tap> inside;
    entries(kind, matrix, n, inside, corrections);
    if (spread)
      for (Tap& tap : corrections) std::swap(tap.row, tap.column);
    if (kind == Filter::dct) {
      auto block = dct_block(matrix);
      p.assign(block.begin(), block.end());
      filter = spread ? spread_blocks<A> : gather_blocks<A>;
      return;
    }
    auto weights = stencil(kind, matrix);
    p.assign(weights.begin(), weights.end());
    if (kind == Filter::binomial)
      filter = pick_filter<-2, 2, A>(spread, C);
    else if (kind == Filter::bilinear && matrix == Matrix::up)
      filter = pick_filter<-1, 2, A>(spread, C);
    else
      filter = pick_filter<0, 1, A>(spread, C);
  }

  // x has `sources` pixels; two pixels on either side are overwritten with zeros.
  void apply(A* x, A* y, int64_t sources) const {
    std::fill_n(x - 2 * C, 2 * C, A(0));
    std::fill_n(x + sources * C, 2 * C, A(0));
    filter(x, y, coarse, C, p.data());
    for (const Tap& tap : corrections)
      for (int64_t c = 0; c < C; ++c)
        y[tap.row * C + c] += static_cast<A>(tap.weight) * x[tap.column * C + c];
  }
};

}  // namespace dfm_fast
