// Laplacian pyramids, one level at a time, by rows.
//
// A plane is [T, H, W * C]: one (n, c) of a contiguous tensor (C = 1), one n of a channels_last one.
// A level streams over it: as soon as the rows of the fine plane are there, a coarse row is gathered
// (vertically from the source, then along W in scratch), spread along W into a ring of fine-width
// rows, and combined vertically into fine rows. So the source is read from memory once.
// A band is a range of coarse rows and the fine rows they own; bands recompute the coarse rows that
// they share, in the same way, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "filters.h"
#include "horizontal.h"
#include "rows.h"

namespace dfm_fast {

struct Grid {
  int64_t T, H, W, C;

  int64_t row() const { return W * C; }
  int64_t plane() const { return T * H * W * C; }
};

// One plane of a tensor with storage type T.
template <class T>
struct Plane {
  T* data = nullptr;
  Grid grid{};

  T* row(int64_t t, int64_t i) const { return data + (t * grid.H + i) * grid.row(); }
};

struct Band {
  int64_t coarse_begin, coarse_end, fine_begin, fine_end;
};

// What a level needs to know: its two grids and the matrices of every axis. The gather matrix
// (fine -> coarse) is `down`, or the adjoint of `up` in a backward; the spread matrix is `up`, or
// the adjoint of `down`. `sign` scales the spread: -1 subtracts it.
template <class A>
struct LevelPlan {
  Grid fine, coarse;
  Taps gather_t, gather_h, spread_t, spread_h;
  std::vector<HorizontalStep<A>> gather_w, spread_w;
  A sign;
  int64_t fine_per_coarse;          // rows
  int64_t ring_frames, ring_rows;   // spread rows alive at a time
  int64_t most_taps;

  LevelPlan(Grid fine, Filter filter, std::array<int, 3> steps, bool backward, A sign)
      : fine(fine), coarse(fine), sign(sign) {
    Matrix gather = backward ? Matrix::up : Matrix::down;
    Matrix spread = backward ? Matrix::down : Matrix::up;
    gather_t = gather_taps(filter, gather, fine.T, steps[0]);
    gather_h = gather_taps(filter, gather, fine.H, steps[1]);
    spread_t = spread_taps(filter, spread, fine.T, steps[0]);
    spread_h = spread_taps(filter, spread, fine.H, steps[1]);
    for (int s = 0; s < steps[2]; ++s) {
      gather_w.emplace_back(filter, gather, coarse.W, fine.C, false);
      spread_w.emplace(spread_w.begin(), filter, spread, coarse.W, fine.C, true);
      coarse.W = half(coarse.W);
    }
    for (int s = 0; s < steps[0]; ++s) coarse.T = half(coarse.T);
    for (int s = 0; s < steps[1]; ++s) coarse.H = half(coarse.H);
    fine_per_coarse = int64_t{1} << steps[1];
    ring_frames = reach(spread_t);
    ring_rows = steps[0] ? coarse.H : reach(spread_h);  // frames in common are needed again
    most_taps = std::max(most(gather_t) * most(gather_h), most(spread_t) * most(spread_h));
  }

  static int64_t reach(const Taps& taps) {
    int64_t rows = 1;
    for (size_t i = 0; i < taps.low.size(); ++i)
      rows = std::max(rows, taps.high[i] - taps.low[i] + 1);
    return rows;
  }
  static int64_t most(const Taps& taps) {
    int64_t count = 1;
    for (size_t i = 0; i + 1 < taps.start.size(); ++i) count = std::max(count, taps.count(i));
    return count;
  }

  Band band(int64_t begin, int64_t end) const {
    return {begin, end, begin * fine_per_coarse, std::min(end * fine_per_coarse, fine.H)};
  }
};

// Scratch rows of one thread, for any level of one operator.
template <class A>
struct Workspace {
  int64_t stride;
  std::unique_ptr<A[]> buffer;
  A *first, *second, *third, *ring;
  std::vector<const void*> rows;
  std::vector<A> weights;

  explicit Workspace(const std::vector<LevelPlan<A>>& plans) {
    int64_t width = 0, slots = 0, taps = 0, C = 1;
    for (const auto& plan : plans) {
      C = plan.fine.C;
      width = std::max(width, plan.fine.row());
      slots = std::max(slots, plan.ring_frames * plan.ring_rows);
      taps = std::max(taps, plan.most_taps);
    }
    auto align = [](int64_t n) { return (n + 15) / 16 * 16; };
    int64_t margin = align(2 * C + kRowMargin);
    stride = align(width + C) + 2 * margin;
    buffer.reset(new A[(slots + 3) * stride + 16]);
    A* start = buffer.get();
    while (reinterpret_cast<uintptr_t>(start) % 64) ++start;
    first = start + margin, second = first + stride, third = second + stride;
    ring = third + stride;
    rows.resize(taps), weights.resize(taps);
  }
};

// The product of the taps of two axes: row pointers into `ws.rows`, weights into `ws.weights`.
template <class A, class Row>
inline int collect_taps(Workspace<A>& ws, const Taps& t_taps, int64_t t, const Taps& h_taps,
                        int64_t i, A scale, Row row) {
  int count = 0;
  for (int64_t p = t_taps.start[t]; p < t_taps.start[t + 1]; ++p)
    for (int64_t q = h_taps.start[i]; q < h_taps.start[i + 1]; ++q, ++count) {
      ws.rows[count] = row(t_taps.column[p], h_taps.column[q]);
      ws.weights[count] = scale * static_cast<A>(t_taps.weight[p] * h_taps.weight[q]);
    }
  return count;
}

// sum = the first `count` collected rows.
template <class From, class A>
inline void sum_rows(Workspace<A>& ws, A* sum, int begin, int count, int64_t n) {
  auto rows = reinterpret_cast<const From* const*>(ws.rows.data());
  const A* weights = ws.weights.data();
  int chunk = std::min(count, 8);
  weighted_sum<false>(sum, sum, rows + begin, weights + begin, chunk, n);
  for (int k = chunk; k < count; k += chunk) {
    chunk = std::min(count - k, 8);
    weighted_sum<true>(sum, sum, rows + begin + k, weights + begin + k, chunk, n);
  }
}

// Coarse row (t, i) of the gather matrix times a fine plane; in ws.first or ws.second.
template <class From, class A>
inline A* gather_row(const LevelPlan<A>& plan, Workspace<A>& ws, Plane<const From> source,
                     int64_t t, int64_t i) {
  int count = collect_taps(ws, plan.gather_t, t, plan.gather_h, i, A(1),
                           [&](int64_t s, int64_t j) { return source.row(s, j); });
  A *row = ws.first, *next = ws.second;
  sum_rows<From>(ws, row, 0, count, plan.fine.row());
  for (const auto& step : plan.gather_w) {
    step.apply(row, next, step.fine);
    std::swap(row, next);
  }
  return row;
}

// The spread coarse rows that fine rows still need.
template <class A>
struct Ring {
  const LevelPlan<A>& plan;
  Workspace<A>& ws;

  A* slot(int64_t t, int64_t i) const {
    return ws.ring + (t % plan.ring_frames * plan.ring_rows + i % plan.ring_rows) * ws.stride;
  }

  // Spread coarse row (t, i) along W; clobbers `row`.
  void push(int64_t t, int64_t i, A* row) const {
    A* to = slot(t, i);
    if (plan.spread_w.empty()) return convert_row(to, row, plan.fine.row());
    for (size_t s = 0; s < plan.spread_w.size(); ++s) {
      const auto& step = plan.spread_w[s];
      A* y = s + 1 == plan.spread_w.size() ? to : ws.third;
      step.apply(row, y, step.coarse);
      row = y;
    }
  }

  // to = base + sign * spread, for fine row (t, j).
  template <class To, class Base>
  void finish(int64_t t, int64_t j, const Base* base, To* to) const {
    int count = collect_taps(ws, plan.spread_t, t, plan.spread_h, j, plan.sign,
                             [&](int64_t s, int64_t i) { return slot(s, i); });
    int begin = 0;
    if (count > 8) {  // all but the last 7 first
      begin = count - 7;
      sum_rows<A>(ws, ws.third, 0, begin, plan.fine.row());
      ws.rows[--begin] = ws.third;
      ws.weights[begin] = 1;
      count = 8;
    }
    auto rows = reinterpret_cast<const A* const*>(ws.rows.data());
    weighted_sum<true>(to, base, rows + begin, ws.weights.data() + begin, count, plan.fine.row());
  }
};

// produce(t, i) for every coarse row that the band's fine rows need, each before the fine rows that
// need it; finish(t, j) for every fine row.
template <class A, class Produce, class Finish>
inline void stream(const LevelPlan<A>& plan, Band band, Produce produce, Finish finish) {
  int64_t frames = 0;  // produced
  for (int64_t t = 0; t < plan.fine.T; ++t) {
    int64_t frames_end = plan.spread_t.high[t] + 1;
    int64_t next = plan.spread_h.low[band.fine_begin];
    for (int64_t j = band.fine_begin; j < band.fine_end; ++j) {
      for (; next <= plan.spread_h.high[j]; ++next)
        for (int64_t s = frames; s < frames_end; ++s) produce(s, next);
      finish(t, j);
    }
    frames = frames_end;
  }
}

// coarse = round(down x), detail = x - up(coarse).
template <class T, class A>
void build_level(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, Plane<const T> x,
                 Plane<T> coarse, Plane<T> detail) {
  Ring<A> ring{plan, ws};
  int64_t n = plan.coarse.row();
  auto produce = [&](int64_t t, int64_t i) {
    A* row = gather_row(plan, ws, x, t, i);
    bool owned = i >= band.coarse_begin && i < band.coarse_end;
    T* rounded = owned ? coarse.row(t, i) : reinterpret_cast<T*>(ws.third);
    convert_row(rounded, row, n);
    if constexpr (!std::is_same_v<T, A>) convert_row(row, rounded, n);
    ring.push(t, i, row);
  };
  auto finish = [&](int64_t t, int64_t j) { ring.finish(t, j, x.row(t, j), detail.row(t, j)); };
  stream(plan, band, produce, finish);
}

// fine = detail + up(coarse).
template <class T, class A>
void collapse_level(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, Plane<const T> coarse,
                    Plane<const T> detail, Plane<T> fine) {
  Ring<A> ring{plan, ws};
  auto produce = [&](int64_t t, int64_t i) {
    convert_row(ws.first, coarse.row(t, i), plan.coarse.row());
    ring.push(t, i, ws.first);
  };
  auto finish = [&](int64_t t, int64_t j) {
    ring.finish(t, j, detail.row(t, j), fine.row(t, j));
  };
  stream(plan, band, produce, finish);
}

// c = grad - up^T(detail), fine = detail + down^T(c).
template <class T, class G, class To, class A>
void build_backward_level(const LevelPlan<A>& plan, Workspace<A>& ws, Band band,
                          Plane<const G> grad, Plane<const T> detail, Plane<To> fine) {
  Ring<A> ring{plan, ws};
  auto produce = [&](int64_t t, int64_t i) {
    A* row = gather_row(plan, ws, detail, t, i);
    const A *rows[1] = {row}, minus = -1;
    weighted_sum<true>(row, grad.row(t, i), rows, &minus, 1, plan.coarse.row());
    ring.push(t, i, row);
  };
  auto finish = [&](int64_t t, int64_t j) {
    ring.finish(t, j, detail.row(t, j), fine.row(t, j));
  };
  stream(plan, band, produce, finish);
}

// exact = up^T(grad), rounded = round(exact).
template <class T, class G, class A>
void collapse_backward_level(const LevelPlan<A>& plan, Workspace<A>& ws, Band band,
                             Plane<const G> grad, Plane<A> exact, Plane<T> rounded) {
  for (int64_t t = 0; t < plan.coarse.T; ++t)
    for (int64_t i = band.coarse_begin; i < band.coarse_end; ++i) {
      const A* row = gather_row(plan, ws, grad, t, i);
      convert_row(rounded.row(t, i), row, plan.coarse.row());
      if (exact.data) convert_row(exact.row(t, i), row, plan.coarse.row());
    }
}

}  // namespace dfm_fast
