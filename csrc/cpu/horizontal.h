// The 2x filters along W, on scratch rows of W pixels of C channels (C = 1: contiguous planes).
//
// Everything here handles whole vectors and runs over the end of a row: buffers have kRowMargin
// elements and two pixels of slack on either side.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "filters.h"
#include "rows.h"

namespace dfm_fast {

constexpr int64_t kRowMargin = 32;

// --- One channel ---
//
// Neighbours come from the vectors before and after, in registers: reading a row that was just
// written at an offset of one element would wait for the stores.

template <class A, size_t... I>
inline Vec<A> lane_numbers(std::index_sequence<I...>) {
  return Vec<A>{A(I)...};
}

// row[i] += value, as the vector that i was stored in: a vector that is read after the store of one
// of its elements waits for it.
template <class A>
DFM_INLINE inline void add_lane(A* row, int64_t i, A value) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t lane = i & (lanes - 1);
  Vec<A> here =
      lane_numbers<A>(std::make_index_sequence<lanes>{}) == A(lane) ? Vec<A>{} + value : Vec<A>{};
  store(row + i - lane, load(row + i - lane) + here);
}

// The offsets first .. last of a stencil that are not zero.
template <int first_, int last_>
struct Window {
  static constexpr int first = first_, last = last_;
};

// f(even and odd elements 2i .. 2i + 2 lanes) of a sum of rows of n elements, for i = 0, lanes, ...
template <class A, class Rows, class F>
DFM_INLINE inline void for_split_vectors(const Rows& rows, int64_t n, F f) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes)
    f(unzip<A>(rows.sum(i, Whole<A>{}), rows.sum(i + lanes, Whole<A>{})));
  if (i == n) return;
  int first = std::min(n - i, lanes), second = n - i - first;
  f(unzip<A>(rows.sum(i, first), second ? rows.sum(i + lanes, second) : Vec<A>{}));
}

using Box = Window<0, 1>;

// y[i] = sum_k p[k] x[2i+k] for a sum of rows x of n elements.
template <class A, class Rows>
DFM_INLINE inline void gather_single(Box, const Rows& rows, int64_t n, A* y, const A* p) {
  for_split_vectors<A>(rows, n, [=, p2 = p[2], p3 = p[3]](Split<A> v) mutable DFM_INLINE {
    store(y, p2 * v.even + p3 * v.odd);
    y += kLanes<A>;
  });
}
template <class W, class A, class Rows>
DFM_INLINE inline void gather_single(W, const Rows& rows, int64_t n, A* y, const A* p) {
  const A p0 = p[0], p1 = p[1], p2 = p[2], p3 = p[3], p4 = p[4];
  Split<A> previous, v;
  y -= kLanes<A>;  // the first vector goes to the margin
  auto push = [&](Split<A> next) DFM_INLINE {
    Vec<A> sum = p2 * v.even + p3 * v.odd + p1 * before<A>(previous.odd, v.odd);
    if constexpr (W::first < -1) sum += p0 * before<A>(previous.even, v.even);
    sum += p4 * after<A>(v.even, next.even);
    store(y, sum);
    y += kLanes<A>;
    previous = v, v = next;
  };
  for_split_vectors<A>(rows, n, push);
  push(Split<A>{});
}

// y[2i], y[2i+1] from x[i-1], x[i], x[i+1]; m inputs, 2m outputs.
template <class From, class A>
inline void spread_single(Box, const From* x, int64_t m, A* y, const A* p) {
  for_vectors<A>(m, [=, p2 = p[2], p3 = p[3]](int64_t i, auto count) DFM_INLINE {
    Vec<A> v = load(x + i, count);
    store_zipped<A>(y + 2 * i, p2 * v, p3 * v);
  });
}
template <class W, class From, class A>
inline void spread_single(W, const From* x, int64_t m, A* y, const A* p) {
  const A p0 = p[0], p1 = p[1], p2 = p[2], p3 = p[3], p4 = p[4];
  Vec<A> previous{}, v{};
  y -= 2 * kLanes<A>;  // the first vectors go to the margin
  auto push = [&](Vec<A> next) DFM_INLINE {
    Vec<A> left = before<A>(previous, v), right = after<A>(v, next);
    Vec<A> even = p2 * v + p4 * left, odd = p3 * v + p1 * right;
    if constexpr (W::first < -1) even += p0 * right;
    store_zipped<A>(y, even, odd);
    y += 2 * kLanes<A>;
    previous = v, v = next;
  };
  for_vectors<A>(m, [&](int64_t i, auto count) DFM_INLINE { push(load(x + i, count)); });
  push(Vec<A>{});
}

// --- C channels: a vector V per step, whose excess the next pixel overwrites ---

template <class A>
using Small = Vec<A, 4 * sizeof(A)>;

template <class V, class A>
DFM_INLINE inline V load_as(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class W, class A>
inline void gather_pixels(W, const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  for (int64_t i = 0; i < m; ++i, x += 2 * C, y += C)
    for (int64_t c = 0; c < C; c += lanes) {
      V sum = p[2] * load_as<V>(x + c) + p[3] * load_as<V>(x + C + c);
      if constexpr (W::first < 0) sum += p[1] * load_as<V>(x - C + c);
      if constexpr (W::first < -1) sum += p[0] * load_as<V>(x - 2 * C + c);
      if constexpr (W::last > 1) sum += p[4] * load_as<V>(x + 2 * C + c);
      std::memcpy(y + c, &sum, sizeof sum);
    }
}

template <class V, class W, class A>
inline void spread_pixels(W, const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  for (int64_t i = 0; i < m; ++i, x += C, y += 2 * C) {
    for (int64_t c = 0; c < C; c += lanes) {
      V even = p[2] * load_as<V>(x + c);
      if constexpr (W::first < -1) even += p[0] * load_as<V>(x + C + c);
      if constexpr (W::last > 1) even += p[4] * load_as<V>(x - C + c);
      std::memcpy(y + c, &even, sizeof even);
    }
    for (int64_t c = 0; c < C; c += lanes) {
      V odd = p[3] * load_as<V>(x + c);
      if constexpr (W::first < 0) odd += p[1] * load_as<V>(x + C + c);
      std::memcpy(y + C + c, &odd, sizeof odd);
    }
  }
}

// --- "dct": p is the [4][8] block ---

// y[i * C ..] = sum_k weight(i, k) x[k * C ..].
template <class V, int outputs, int inputs, class A, class Weight>
DFM_INLINE inline void mix_pixels(const A* x, A* y, int64_t C, const Weight& weight) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  for (int i = 0; i < outputs; ++i)
    for (int64_t c = 0; c < C; c += lanes) {
      V sum = weight(i, 0) * load_as<V>(x + c);
      for (int k = 1; k < inputs; ++k) sum += weight(i, k) * load_as<V>(x + k * C + c);
      std::memcpy(y + i * C + c, &sum, sizeof sum);
    }
}

template <class A>
inline void gather_blocks(const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  using Four = Small<A>;
  Four column[8];
  for (int k = 0; k < 8; ++k) column[k] = Four{p[k], p[8 + k], p[16 + k], p[24 + k]};
  for (int64_t b = 0; b < m / 4; ++b, x += 8 * C, y += 4 * C) {
    if (C > 1) {
      auto weight = [p](int r, int k) { return p[8 * r + k]; };
      mix_pixels<Vec<A>, 4, 8>(x, y, C, weight);
      continue;
    }
    Four sum = column[0] * x[0];
    for (int k = 1; k < 8; ++k) sum += column[k] * x[k];
    std::memcpy(y, &sum, sizeof sum);
  }
}

template <class A>
inline void spread_blocks(const A* __restrict x, A* __restrict y, int64_t m, int64_t C,
                          const A* p) {
  using Four = Small<A>;
  for (int64_t b = 0; b < m / 4; ++b, x += 4 * C, y += 8 * C) {
    if (C > 1) {
      auto weight = [p](int k, int r) { return p[8 * r + k]; };
      mix_pixels<Vec<A>, 8, 4>(x, y, C, weight);
      continue;
    }
    for (int k = 0; k < 8; k += 4) {
      Four sum = load_as<Four>(p + k) * x[0];
      for (int r = 1; r < 4; ++r) sum += load_as<Four>(p + 8 * r + k) * x[r];
      std::memcpy(y + k, &sum, sizeof sum);
    }
  }
}

// --- One 2x step ---

template <class A>
struct HorizontalStep {
  int64_t fine, coarse, C;
  std::array<A, 32> p{};         // the stencil, or the block
  std::vector<Tap> corrections;  // (row of the result, column of the source)
  int reach;                     // the stencil's first offset, negated; 3: blocks

  HorizontalStep(Filter kind, Matrix matrix, int64_t n, int64_t C, bool spread)
      : fine(n), coarse(half(n)), C(C) {
    std::vector<Tap> inside;
    entries(kind, matrix, n, inside, corrections);
    if (spread)
      for (Tap& tap : corrections) std::swap(tap.row, tap.column);
    if (kind == Filter::dct) {
      auto block = dct_block(matrix);
      std::copy(block.begin(), block.end(), p.begin());
      reach = 3;
    } else {
      auto weights = stencil(kind, matrix);
      std::copy(weights.begin(), weights.end(), p.begin());
      reach = p[0] != 0 ? 2 : p[1] != 0 ? 1 : 0;
    }
  }

  bool by_rows() const { return C == 1 && reach < 3; }  // gather_rows, spread_row

  // y = the gather of a sum of rows; one channel.
  template <class Rows>
  DFM_INLINE void gather_rows(const Rows& rows, A* y) const {
    with_window([&](auto window) DFM_INLINE { gather_single(window, rows, fine, y, p.data()); });
    for (const Tap& tap : corrections)
      add_lane(y, tap.row, static_cast<A>(tap.weight) * rows.sum_one(tap.column));
  }
  // y = the spread of a row x; one channel.
  template <class From>
  void spread_row(const From* x, A* y) const {
    with_window([&](auto window) DFM_INLINE { spread_single(window, x, coarse, y, p.data()); });
    for (const Tap& tap : corrections)
      add_lane(y, tap.row, static_cast<A>(tap.weight) * load_one(x + tap.column));
  }

  // The same for C channels or blocks. Two pixels on either side of x are overwritten with zeros.
  void gather(A* x, A* y) const {
    if (reach == 3) return gather_blocks(x, y, coarse, C, p.data());
    zero_ends(x, fine);
    with_window([&](auto window) DFM_INLINE {
      if (C <= 4)
        gather_pixels<Small<A>>(window, x, y, coarse, C, p.data());
      else
        gather_pixels<Vec<A>>(window, x, y, coarse, C, p.data());
    });
    correct(x, y);
  }
  void spread(A* x, A* y) const {
    if (reach == 3) return spread_blocks(x, y, coarse, C, p.data());
    zero_ends(x, coarse);
    with_window([&](auto window) DFM_INLINE {
      if (C <= 4)
        spread_pixels<Small<A>>(window, x, y, coarse, C, p.data());
      else
        spread_pixels<Vec<A>>(window, x, y, coarse, C, p.data());
    });
    correct(x, y);
  }

 private:
  template <class F>
  DFM_INLINE void with_window(const F& f) const {
    if (reach == 0) return f(Box{});
    if (reach == 1) return f(Window<-1, 2>{});
    f(Window<-2, 2>{});
  }
  void zero_ends(A* x, int64_t sources) const {
    std::fill_n(x - 2 * C, 2 * C, A(0));
    std::fill_n(x + sources * C, 2 * C, A(0));
  }
  void correct(const A* x, A* y) const {
    for (const Tap& tap : corrections)
      for (int64_t c = 0; c < C; ++c)
        y[tap.row * C + c] += static_cast<A>(tap.weight) * x[tap.column * C + c];
  }
};

}  // namespace dfm_fast
