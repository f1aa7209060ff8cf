// Laplacian pyramids, one level at a time, by rows.
//
// A plane is [T, H, W * C]: one (n, c) of a contiguous tensor (C = 1), one n of a channels_last
// one. A level streams over it: as soon as the rows of the fine plane are there, a coarse row is
// gathered (vertically from the source, then along W in scratch), spread along W into a ring of
// fine-width rows, and combined vertically into fine rows. So the source is read from memory once.
// A band is a range of coarse rows and the fine rows they own; bands recompute the coarse rows that
// they share, in the same way, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
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

constexpr int kFewTaps = 5;
constexpr int kRing = 4;  // the scratch row where the ring begins

// The taps of one row of one axis, in one cache line.
template <class A>
struct RowTaps {
  int count;  // at most kFewTaps are here
  A weight[kFewTaps];
  int64_t offset[kFewTaps];  // of the row in its plane or ring, in elements
};

// The taps of one axis, ready for use.
template <class A>
struct AxisTaps {
  std::vector<RowTaps<A>> rows;
  std::vector<int64_t> start, offset;  // all taps: row i has start[i] .. start[i+1]
  std::vector<A> weight;
  std::vector<int64_t> low, high;
  int64_t alive;  // columns in use at a time, going down the rows; a power of 2
  int most = 1;   // entries in a row

  AxisTaps(const Taps& taps, A sign) : start(taps.start), low(taps.low), high(taps.high) {
    int64_t reach = 1;
    for (double w : taps.weight) weight.push_back(sign * static_cast<A>(w));
    for (size_t i = 0; i < low.size(); ++i) {
      most = std::max<int>(most, start[i + 1] - start[i]);
      reach = std::max(reach, high[i] - low[i] + 1);
    }
    alive = std::bit_ceil(static_cast<uint64_t>(reach));
    offset = taps.column;
  }

  // Columns become offsets: column % period, times the stride.
  void place(int64_t period, int64_t stride) {
    for (int64_t& o : offset) o = o % period * stride;
    for (size_t i = 0; i < low.size(); ++i) {
      RowTaps<A> row{};
      row.count = static_cast<int>(start[i + 1] - start[i]);
      for (int k = 0; k < std::min(row.count, kFewTaps); ++k)
        row.weight[k] = weight[start[i] + k], row.offset[k] = offset[start[i] + k];
      rows.push_back(row);
    }
  }
};

// What a level needs to know: its two grids and the matrices of every axis. The gather matrix
// (fine -> coarse) is `down`, or the adjoint of `up` in a backward; the spread matrix is `up`, or
// the adjoint of `down`. `sign` scales the spread: -1 subtracts it.
template <class A>
struct LevelPlan {
  Grid fine, coarse;
  AxisTaps<A> gather_t, gather_h, spread_t, spread_h;
  std::vector<HorizontalStep<A>> gather_w, spread_w;
  bool box, bilinear;       // box: what box.h takes
  int64_t fine_per_coarse;  // rows
  int64_t row_stride;       // of scratch rows
  int64_t ring_rows;        // spread rows alive at a time, per frame; a power of 2

  LevelPlan(Grid fine, Filter filter, std::array<int, 3> steps, bool backward, A sign)
      : LevelPlan(fine, filter, steps, backward ? Matrix::up : Matrix::down,
                  backward ? Matrix::down : Matrix::up, sign) {}

  LevelPlan(Grid fine, Filter filter, std::array<int, 3> steps, Matrix gather, Matrix spread,
            A sign)
      : fine(fine),
        coarse(fine),
        gather_t(gather_taps(filter, gather, fine.T, steps[0]), 1),
        gather_h(gather_taps(filter, gather, fine.H, steps[1]), 1),
        spread_t(spread_taps(filter, spread, fine.T, steps[0]), 1),
        spread_h(spread_taps(filter, spread, fine.H, steps[1]), sign) {
    for (int s = 0; s < steps[2]; ++s) {
      gather_w.emplace_back(filter, gather, coarse.W, fine.C, false);
      spread_w.emplace(spread_w.begin(), filter, spread, coarse.W, fine.C, true);
      coarse.W = half(coarse.W);
    }
    for (int s = 0; s < steps[0]; ++s) coarse.T = half(coarse.T);
    for (int s = 0; s < steps[1]; ++s) coarse.H = half(coarse.H);
    bilinear = filter == Filter::bilinear;
    box = (bilinear || filter == Filter::nearest) && steps == std::array{0, 1, 1} && fine.C == 1 &&
          coarse.W % kLanes<A> == 0;
    fine_per_coarse = int64_t{1} << steps[1];
    // Where T is halved, a later frame needs the same rows again.
    ring_rows = steps[0] ? std::bit_ceil(static_cast<uint64_t>(coarse.H)) : spread_h.alive;
    row_stride = align(fine.row() + fine.C) + 2 * margin();
    gather_t.place(fine.T, fine.H * fine.row());
    gather_h.place(fine.H, fine.row());
    spread_t.place(spread_t.alive, ring_rows * row_stride);
    spread_h.place(ring_rows, row_stride);
  }

  static int64_t align(int64_t n) { return (n + 15) / 16 * 16; }
  int64_t margin() const { return align(2 * fine.C + kRowMargin); }
  int64_t scratch_rows() const { return spread_t.alive * ring_rows + kRing; }
  int64_t most_taps() const {
    return std::max(gather_t.most * gather_h.most, spread_t.most * spread_h.most);
  }
  bool by_rows() const { return !gather_w.empty() && gather_w[0].by_rows(); }
  Band band(int64_t begin, int64_t end) const {
    return {begin, end, begin * fine_per_coarse, std::min(end * fine_per_coarse, fine.H)};
  }
};

// Scratch of one thread, for any level of one operator.
template <class A>
struct Workspace {
  std::unique_ptr<A[]> buffer;
  A* start;  // aligned to vectors
  std::vector<const void*> rows;
  std::vector<A> weights;

  explicit Workspace(const std::vector<LevelPlan<A>>& plans) {
    int64_t size = 0, taps = 0;
    for (const auto& plan : plans) {
      size = std::max(size, plan.scratch_rows() * plan.row_stride);
      taps = std::max(taps, plan.most_taps());
    }
    buffer.reset(new A[size + 16]);
    start = buffer.get();
    while (reinterpret_cast<uintptr_t>(start) % 64) ++start;
    rows.resize(taps), weights.resize(taps);
  }

  A* row(const LevelPlan<A>& plan, int k) const {  // k = 0 .. 3, then the ring
    return start + plan.margin() + k * plan.row_stride;
  }
};

// to = the first `count` of ws.rows, weighted.
template <class From, class A>
inline void sum_rows(const Workspace<A>& ws, A* to, int count, int64_t n) {
  constexpr int most = 8;
  for (int begin = 0; begin < count; begin += most) {
    auto row = [&](int k) DFM_INLINE { return static_cast<const From*>(ws.rows[begin + k]); };
    const A* weights = ws.weights.data() + begin;
    with_rows<most, From>(std::min(count - begin, most), row, weights,
                          [&](const auto& rows) DFM_INLINE {
                            if (begin == 0)
                              weighted_sum(to, rows, n);
                            else
                              add_weighted_sum(to, to, rows, n);
                          });
  }
}

// f(weighted rows) for the product of the taps of row t and row i of two axes, at `base`. Few rows
// come as they are, many summed, in `scratch`.
template <class From, class A, class F>
DFM_INLINE inline void with_taps(Workspace<A>& ws, const AxisTaps<A>& t_taps, int64_t t,
                                 const AxisTaps<A>& h_taps, int64_t i, const From* base, A* scratch,
                                 int64_t n, const F& f) {
  const auto &frame = t_taps.rows[t], &taps = h_taps.rows[i];
  if (frame.count == 1 && frame.weight[0] == 1 && taps.count <= kFewTaps) {
    base += frame.offset[0];
    auto row = [&](int k) DFM_INLINE { return base + taps.offset[k]; };
    return with_rows<kFewTaps, From>(taps.count, row, taps.weight, f);
  }
  int count = 0;
  for (int64_t p = t_taps.start[t]; p < t_taps.start[t + 1]; ++p)
    for (int64_t q = h_taps.start[i]; q < h_taps.start[i + 1]; ++q, ++count) {
      ws.rows[count] = base + t_taps.offset[p] + h_taps.offset[q];
      ws.weights[count] = t_taps.weight[p] * h_taps.weight[q];
    }
  if (count <= kFewTaps) {
    auto row = [&](int k) DFM_INLINE { return static_cast<const From*>(ws.rows[k]); };
    return with_rows<kFewTaps, From>(count, row, ws.weights.data(), f);
  }
  sum_rows<From>(ws, scratch, count, n);
  f(WeightedRows<1, A>{{scratch}, {A(1)}});
}

// Coarse row (t, i) of the gather matrix times a fine plane, in scratch.
template <class From, class A>
inline A* gather_row(const LevelPlan<A>& plan, Workspace<A>& ws, Plane<const From> source,
                     int64_t t, int64_t i) {
  A *row = ws.row(plan, 1), *next = ws.row(plan, 2);
  bool by_rows = plan.by_rows();
  with_taps<From>(ws, plan.gather_t, t, plan.gather_h, i, source.data, ws.row(plan, 0),
                  plan.fine.row(), [&](const auto& rows) DFM_INLINE {
                    if (by_rows)
                      plan.gather_w[0].gather_rows(rows, row);
                    else
                      weighted_sum(row, rows, plan.fine.row());
                  });
  for (size_t step = by_rows; step < plan.gather_w.size(); ++step, std::swap(row, next)) {
    if (by_rows)
      plan.gather_w[step].gather_rows(WeightedRows<1, A>{{row}, {A(1)}}, next);
    else
      plan.gather_w[step].gather(row, next);
  }
  return row;
}

// The spread coarse rows that fine rows still need.
template <class A>
struct Ring {
  const LevelPlan<A>& plan;
  Workspace<A>& ws;

  A* slot(int64_t t, int64_t i) const {
    int64_t frame = t & (plan.spread_t.alive - 1), row = i & (plan.ring_rows - 1);
    return ws.row(plan, kRing) + (frame * plan.ring_rows + row) * plan.row_stride;
  }

  // Spread coarse row (t, i) along W.
  template <class From>
  void push(int64_t t, int64_t i, const From* row) const {
    const auto& steps = plan.spread_w;
    A* to = slot(t, i);
    if (steps.empty()) return convert_row(to, row, plan.fine.row());
    if (plan.by_rows()) {
      if (steps.size() == 1) return steps[0].spread_row(row, to);
      steps[0].spread_row(row, ws.row(plan, 0));
      return steps[1].spread_row(ws.row(plan, 0), to);
    }
    A *x = ws.row(plan, 0), *y = ws.row(plan, 1);
    convert_row(x, row, plan.coarse.row());
    for (size_t s = 0; s < steps.size(); ++s, std::swap(x, y))
      steps[s].spread(x, s + 1 == steps.size() ? to : y);
  }

  // to = base + spread, for fine row (t, j).
  template <class To, class Base>
  void finish(int64_t t, int64_t j, const Base* base, To* to) const {
    int64_t n = plan.fine.row();
    with_taps<A>(ws, plan.spread_t, t, plan.spread_h, j, ws.row(plan, kRing), ws.row(plan, 0), n,
                 [&](const auto& rows) DFM_INLINE { add_weighted_sum(to, base, rows, n); });
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

// The fine rows that the coarse rows after the next one gather first.
template <class From, class A>
inline void prefetch_rows(const LevelPlan<A>& plan, Plane<From> source, int64_t t, int64_t i) {
  int64_t j = (i + 2) * plan.fine_per_coarse;
  prefetch<false>(source.row(t, j), plan.fine_per_coarse * plan.fine.row());
}

// coarse = round(down x), detail = x - up(coarse).
template <class T, class A>
void build_level(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, Plane<const T> x,
                 Plane<T> coarse, Plane<T> detail) {
  Ring<A> ring{plan, ws};
  int64_t n = plan.coarse.row();
  auto produce = [&](int64_t t, int64_t i) {
    prefetch_rows(plan, x, t, i);
    const A* row = gather_row(plan, ws, x, t, i);
    bool owned = i >= band.coarse_begin && i < band.coarse_end;
    T* rounded = owned ? coarse.row(t, i) : reinterpret_cast<T*>(ws.row(plan, 3));
    convert_row(rounded, row, n);
    if constexpr (std::is_same_v<T, A>)
      ring.push(t, i, row);
    else
      ring.push(t, i, rounded);
  };
  auto finish = [&](int64_t t, int64_t j) {
    prefetch<true>(detail.row(t, j), plan.fine.row());
    ring.finish(t, j, x.row(t, j), detail.row(t, j));
  };
  stream(plan, band, produce, finish);
}

// fine = detail + up(coarse).
template <class T, class A>
void collapse_level(const LevelPlan<A>& plan, Workspace<A>& ws, Band band, Plane<const T> coarse,
                    Plane<const T> detail, Plane<T> fine) {
  Ring<A> ring{plan, ws};
  auto produce = [&](int64_t t, int64_t i) { ring.push(t, i, coarse.row(t, i)); };
  auto finish = [&](int64_t t, int64_t j) {
    prefetch<false>(detail.row(t, j), plan.fine.row());
    prefetch<true>(fine.row(t, j), plan.fine.row());
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
    prefetch_rows(plan, detail, t, i);
    A* row = gather_row(plan, ws, detail, t, i);
    add_weighted_sum(row, grad.row(t, i), WeightedRows<1, A>{{row}, {A(-1)}}, plan.coarse.row());
    ring.push(t, i, row);
  };
  auto finish = [&](int64_t t, int64_t j) {
    prefetch<true>(fine.row(t, j), plan.fine.row());
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
      prefetch_rows(plan, grad, t, i);
      const A* row = gather_row(plan, ws, grad, t, i);
      convert_row(rounded.row(t, i), row, plan.coarse.row());
      if (exact.data) convert_row(exact.row(t, i), row, plan.coarse.row());
    }
}

}  // namespace dfm_fast
