// Matrix products of small blocks, for operators whose other work lies between two of them.
//
// A matrix is stored in panels: column j of row i is at panel j / kPanel, row i, column j % kPanel,
// panels one after the other. As a left factor it is read element by element, as a right one in
// whole rows of a panel, both with strides that the compiler knows. Rows come in tiles of kTile and
// panels are whole: what is not there is 0.
#pragma once

#include "rows.h"

namespace dfm_fast {

template <class A>
constexpr int kPanel = 2 * kLanes<A>;
#if defined(__AVX512F__)
constexpr int kTile = 8;  // by two vectors: 16 sums in flight, of 8 that the latency asks for
#else
constexpr int kTile = 4;
#endif

// Terms that are added one after the other: a longer sum is one of such sums, which keeps its error
// that of a library's. Whole panels.
constexpr int64_t kTerms = 64;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class A>
inline int64_t panels(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A>;
}

// A matrix of `rows` rows and any number of panels, in memory it does not own.
template <class A>
struct Panels {
  A* data;
  int64_t rows;

  A* at(int64_t i, int64_t panel) const { return data + (panel * rows + i) * kPanel<A>; }
};

// kTile rows of sums, two vectors or one each.
template <class A, int vectors>
struct Sums {
  Vec<A> v[kTile][vectors] = {};

  // += of `depth` terms: a's element i of term k is at a[i * a_row + k * a_term].
  template <int a_row, int a_term>
  DFM_INLINE void add(const A* a, const A* b, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += a_term, b += kPanel<A>) {
      Vec<A> right[vectors];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) right[j] = load(b + j * kLanes<A>);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) v[i][j] += a[i * a_row] * right[j];
    }
  }
  // c = them, or c += them.
  template <bool add>
  DFM_INLINE void store_to(A* c) const {
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) {
        A* to = c + i * kPanel<A> + j * kLanes<A>;
        store(to, add ? load(to) + v[i][j] : v[i][j]);
      }
  }
};

enum class Left { plain, transposed };

// Rows [i, i + kTile) of a panel of c, `vectors` of it wide, of terms from `first` on: = or +=.
template <Left left, bool add, int vectors, class A>
inline void tile_product(const Panels<A>& a, int64_t i, const A* b, int64_t first, int64_t depth,
                         A* c) {
  Sums<A, vectors> sums;
  b += first * kPanel<A>;
  if constexpr (left == Left::transposed) {
    sums.template add<1, kPanel<A>>(a.at(first, i / kPanel<A>) + i % kPanel<A>, b, depth);
  } else {
    for (int64_t k = 0; k < depth; k += kPanel<A>, b += kPanel<A> * kPanel<A>) {
      int64_t terms = depth - k < kPanel<A> ? depth - k : kPanel<A>;
      sums.template add<kPanel<A>, 1>(a.at(i, (first + k) / kPanel<A>), b, terms);
    }
  }
  sums.template store_to<add>(c);
}

// c [rows, columns] = a b, or += a b, with `depth` terms a sum; a transposed is [depth, rows]. A
// last panel of at most one vector is computed as that.
template <Left left, bool add, class A>
inline void product(const Panels<A>& a, const Panels<A>& b, const Panels<A>& c, int64_t rows,
                    int64_t columns, int64_t depth) {
  for (int64_t j = 0; j < panels<A>(columns); ++j) {
    bool half = columns - j * kPanel<A> <= kLanes<A>;
    for (int64_t i = 0; i < rows; i += kTile) {
      const A* right = b.at(0, j);
      A* to = c.at(i, j);
      int64_t terms = depth < kTerms ? depth : kTerms;
      if (half)
        tile_product<left, add, 1>(a, i, right, 0, terms, to);
      else
        tile_product<left, add, 2>(a, i, right, 0, terms, to);
      for (int64_t k = kTerms; k < depth; k += kTerms) {
        terms = depth - k < kTerms ? depth - k : kTerms;
        if (half)
          tile_product<left, true, 1>(a, i, right, k, terms, to);
        else
          tile_product<left, true, 2>(a, i, right, k, terms, to);
      }
    }
  }
}

}  // namespace dfm_fast
