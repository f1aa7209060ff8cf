// The 2x filters of a pyramid as sparse matrices, one per axis (see dfm_fast/ops/pyramids.py).
//
// Away from the borders a matrix is a stencil p over offsets -2..2 (or, for "dct", 4x8 blocks):
//     gather, n -> n/2:  y[i] = sum_k p[k] x[2i+k]
//     spread, n/2 -> n:  its transpose: x[2i] from p[-2], p[0], p[2]; x[2i+1] from p[-1], p[1]
// down and the adjoint of up gather; up and the adjoint of down spread. Beyond the borders x is
// zero; the taps that fall there come back as explicit corrections.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace dfm_fast {

enum class Filter { nearest, bilinear, binomial, dct };
enum class Matrix { down, up };

inline int64_t half(int64_t n) { return (n + 1) / 2; }

struct Tap {
  int64_t row, column;
  double weight;
};

using Stencil = std::array<double, 5>;  // p[-2..2]

inline Stencil stencil(Filter filter, Matrix matrix) {
  bool down = matrix == Matrix::down;
  if (filter == Filter::binomial) {
    double s = down ? 1. / 16 : 1. / 8;
    return {s, 4 * s, 6 * s, 4 * s, s};
  }
  if (down) return {0, 0, .5, .5, 0};
  return filter == Filter::nearest ? Stencil{0, 0, 1, 1, 0} : Stencil{0, .25, .75, .75, .25};
}

// down as [4][8]: the low half of an orthonormal 8-point DCT, inverted at 4 points; up is twice its
// transpose.
inline std::array<double, 32> dct_block(Matrix matrix) {
  auto basis = [](int n, int k, int m) {
    return std::sqrt((k ? 2. : 1.) / n) * std::cos(M_PI * (m + .5) * k / n);
  };
  double scale = matrix == Matrix::down ? std::sqrt(.5) : std::sqrt(2.);
  std::array<double, 32> block{};
  for (int r = 0; r < 4; ++r)
    for (int m = 0; m < 8; ++m)
      for (int k = 0; k < 4; ++k) block[8 * r + m] += scale * basis(4, k, r) * basis(8, k, m);
  return block;
}

// Where a tap beyond the border falls: down of n reads column j, up reads coarse row i of m.
inline int64_t reflect_101(int64_t j, int64_t n) {
  if (n == 1) return 0;
  int64_t period = 2 * n - 2;
  j = (j % period + period) % period;
  return j < n ? j : period - j;
}
inline int64_t up_border(Filter filter, int64_t i, int64_t m) {
  if (i < 0 && filter == Filter::binomial) return std::min<int64_t>(1, m - 1);
  return std::clamp<int64_t>(i, 0, m - 1);
}

// Entries (coarse row, fine column, weight) of down, or of up's transpose, on a fine side n.
// A tap beyond the border is a correction: `inside` gets the others.
inline void entries(Filter filter, Matrix matrix, int64_t n, std::vector<Tap>& inside,
                    std::vector<Tap>& corrections) {
  int64_t m = half(n);
  if (filter == Filter::dct) {
    auto block = dct_block(matrix);
    for (int64_t i = 0; i < m; ++i)
      for (int k = 0; k < 8; ++k) inside.push_back({i, i / 4 * 8 + k, block[i % 4 * 8 + k]});
    return;
  }
  Stencil p = stencil(filter, matrix);
  for (int64_t i = -1; i <= m; ++i)
    for (int k = -2; k <= 2; ++k) {
      int64_t j = 2 * i + k;
      double weight = p[k + 2];
      bool row_in = i >= 0 && i < m, column_in = j >= 0 && j < n;
      if (weight == 0) continue;
      if (row_in && column_in)
        inside.push_back({i, j, weight});
      else if (row_in && matrix == Matrix::down)
        corrections.push_back({i, reflect_101(j, n), weight});
      else if (column_in && matrix == Matrix::up)
        corrections.push_back({up_border(filter, i, m), j, weight});
    }
}

// A sparse matrix by rows.
struct Taps {
  std::vector<int64_t> start, column;  // row i has entries start[i] .. start[i+1]
  std::vector<double> weight;
  std::vector<int64_t> low, high;  // columns that rows >= i need from, rows <= i need up to

  int64_t count(int64_t i) const { return start[i + 1] - start[i]; }
};

inline Taps sort_taps(std::vector<Tap> taps, int64_t rows) {
  std::stable_sort(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) {
    return a.row != b.row ? a.row < b.row : a.column < b.column;
  });
  Taps t;
  t.start.assign(rows + 1, 0);
  const Tap* last = nullptr;
  for (const Tap& tap : taps) {
    if (last && last->row == tap.row && last->column == tap.column) {
      t.weight.back() += tap.weight;
    } else {
      ++t.start[tap.row + 1];
      t.column.push_back(tap.column);
      t.weight.push_back(tap.weight);
    }
    last = &tap;
  }
  std::partial_sum(t.start.begin(), t.start.end(), t.start.begin());
  t.low.resize(rows), t.high.resize(rows);
  for (int64_t i = 0; i < rows; ++i)
    t.low[i] = t.column[t.start[i]], t.high[i] = t.column[t.start[i + 1] - 1];
  for (int64_t i = rows - 1; i > 0; --i) t.low[i - 1] = std::min(t.low[i - 1], t.low[i]);
  for (int64_t i = 1; i < rows; ++i) t.high[i] = std::max(t.high[i], t.high[i - 1]);
  return t;
}

inline Taps identity_taps(int64_t n) {
  std::vector<Tap> taps(n);
  for (int64_t i = 0; i < n; ++i) taps[i] = {i, i, 1.};
  return sort_taps(std::move(taps), n);
}

// a b
inline Taps product(const Taps& a, const Taps& b) {
  std::vector<Tap> taps;
  int64_t rows = static_cast<int64_t>(a.start.size()) - 1;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = a.start[i]; p < a.start[i + 1]; ++p)
      for (int64_t q = b.start[a.column[p]]; q < b.start[a.column[p] + 1]; ++q)
        taps.push_back({i, b.column[q], a.weight[p] * b.weight[q]});
  return sort_taps(std::move(taps), rows);
}

// One 2x step as gather (transposed = false) or spread.
inline Taps step_taps(Filter filter, Matrix matrix, int64_t n, bool transposed) {
  std::vector<Tap> taps;
  entries(filter, matrix, n, taps, taps);
  if (transposed)
    for (Tap& tap : taps) std::swap(tap.row, tap.column);
  return sort_taps(std::move(taps), transposed ? n : half(n));
}

// The axis of a level: `steps` halvings of side n.
inline Taps gather_taps(Filter filter, Matrix matrix, int64_t n, int steps) {
  if (steps == 0) return identity_taps(n);
  Taps first = step_taps(filter, matrix, n, false);
  return steps == 1 ? first : product(step_taps(filter, matrix, half(n), false), first);
}
inline Taps spread_taps(Filter filter, Matrix matrix, int64_t n, int steps) {
  if (steps == 0) return identity_taps(n);
  Taps last = step_taps(filter, matrix, n, true);
  return steps == 1 ? last : product(last, step_taps(filter, matrix, half(n), true));
}

}  // namespace dfm_fast
