// Products of matrices whose left side is made, and whose result is used, band by band in the
// caches.
//
// c [rows, columns] = a [rows, K] b [K, columns], b in panels of kPanel columns. A tile of c is
// kTileRows x kPanel sums in registers: for every k it loads a row of the panel once and one number
// of each row of a. A last panel of fewer columns has fewer vectors, and taller tiles. Sums run
// over kChainOf numbers in registers and are then added up in memory, so that their rounding error
// does not grow with K as that of one long chain does (measured against oneDNN's, K = 512: a
// third).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <new>

#if defined(__AVX512F__)
#include <cpuid.h>
#endif

#include "tensors.h"

namespace dfm_fast {

constexpr int kPanelVectors = 4;
constexpr int kTileSums = kVectorBytes == 64 ? 24 : 12;  // vectors, as registers allow
constexpr int kTileRows = kTileSums / kPanelVectors;
constexpr int64_t kChainOf = 128;

template <class A>
constexpr int64_t kPanel = kPanelVectors * kLanes<A>;

inline int64_t panels_of(int64_t columns, int64_t panel) { return (columns + panel - 1) / panel; }

// Scratch that begins with a line of the caches, and is not zeroed: large ones would take longer to
// zero than to fill.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t n) : memory(new (std::align_val_t(64)) T[n]) {}
  T* data() const { return memory.get(); }
  T& operator[](int64_t i) const { return memory[i]; }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Delete> memory;
};

// c (+)= a b for one tile, of `vectors` of a panel; ldc is a multiple of kPanel, and whole vectors
// are written.
template <int vectors, int rows, bool add, class A>
void multiply_tile(int64_t K, const A* a, int64_t lda, const A* panel, A* c, int64_t ldc) {
  Vec<A> sum[rows][vectors] = {};
  for (int64_t k = 0; k < K; ++k, panel += kPanel<A>) {
    Vec<A> b[vectors];
#pragma GCC unroll 24
    for (int v = 0; v < vectors; ++v) b[v] = load(panel + v * kLanes<A>);
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) {
      const Vec<A> left = Vec<A>{} + a[r * lda + k];
#pragma GCC unroll 24
      for (int v = 0; v < vectors; ++v) sum[r][v] += left * b[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 24
    for (int v = 0; v < vectors; ++v) {
      A* to = c + r * ldc + v * kLanes<A>;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

#if defined(__AVX512F__)
// bfloat16 without being widened: pairs of numbers, of which an instruction adds up the products. K
// is even, and a panel has pairs side by side: [K / 2, kPanel, 2].
template <int vectors, int rows, bool add>
__attribute__((target("avx512bf16"))) void multiply_tile(int64_t K, const bf16* a, int64_t lda,
                                                         const bf16* panel, float* c, int64_t ldc) {
  constexpr int lanes = kLanes<float>;
  __m512 sum[rows][vectors];
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 24
    for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2, panel += 2 * kPanel<float>) {
    __m512i b[vectors];
#pragma GCC unroll 24
    for (int v = 0; v < vectors; ++v) b[v] = _mm512_loadu_si512(panel + 2 * v * lanes);
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) {
      int pair;
      std::memcpy(&pair, a + r * lda + k, sizeof pair);
      const __m512i left = _mm512_set1_epi32(pair);
#pragma GCC unroll 24
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)left, (__m512bh)b[v]);
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 24
    for (int v = 0; v < vectors; ++v) {
      float* to = c + r * ldc + v * lanes;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
    }
}
#endif

#if defined(__AVX512F__)
// Whether this CPU has the instruction of that.
inline bool has_products_of_bf16() { return __builtin_cpu_supports("avx512bf16"); }
#endif

// Whether products of whole maps are made so. A CPU with AMX leaves them to oneDNN, which is
// faster.
inline bool multiplies_bf16() {
#if defined(__AVX512F__)
  static const bool found = [] {
    unsigned a, b, c, d, amx_bf16 = 1u << 22;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && !(d & amx_bf16) && has_products_of_bf16();
  }();
  return found;
#else
  return false;
#endif
}

// Tiles of the last rows, of which there are fewer.
template <int vectors, bool add, int most, class E, class A>
void multiply_rest(int64_t rows, int64_t K, const E* a, int64_t lda, const E* panel, A* c,
                   int64_t ldc) {
  if (rows >= most) {
    multiply_tile<vectors, most, add>(K, a, lda, panel, c, ldc);
    rows -= most, a += most * lda, c += most * ldc;
  }
  if constexpr (most > 1)
    multiply_rest<vectors, add, most <= kTileRows ? most - 1 : most / 2>(rows, K, a, lda, panel, c,
                                                                         ldc);
}

struct Nothing {
  void operator()(int64_t, int64_t) const {}
};

template <bool add, int vectors = kPanelVectors, class E, class A, class Before = Nothing>
void multiply_chain(int64_t rows, int64_t K, const E* a, int64_t lda, const E* panel, A* c,
                    int64_t ldc, Before before = {}) {
  constexpr int some = kTileSums / vectors;
  int64_t row = 0;
  for (; row + some <= rows; row += some, a += some * lda, c += some * ldc) {
    before(row, row + some);
    multiply_tile<vectors, some, add>(K, a, lda, panel, c, ldc);
  }
  before(row, rows);
  multiply_rest<vectors, add, (some <= kTileRows ? some - 1 : some / 2)>(rows - row, K, a, lda,
                                                                         panel, c, ldc);
}

// c [rows, vectors] = a [rows, K] panel [K, kPanel], of numbers of type A, or bf16. before(first,
// end) is called once for every few rows, to ask memory for what comes after the product.
template <int vectors = kPanelVectors, class E, class A, class Before = Nothing>
void multiply_panel(int64_t rows, int64_t K, const E* a, int64_t lda, const E* panel, A* c,
                    int64_t ldc, Before before = {}) {
  multiply_chain<false, vectors>(rows, std::min(K, kChainOf), a, lda, panel, c, ldc, before);
  for (int64_t k = kChainOf; k < K; k += kChainOf)
    multiply_chain<true, vectors>(rows, std::min(K - k, kChainOf), a + k, lda,
                                  panel + k * kPanel<A>, c, ldc);
}

// f(integral_constant vectors) for the columns that are left of a panel.
template <class A, class F>
DFM_INLINE inline void with_vectors(int64_t columns, F f) {
  if (columns <= kLanes<A>) return f(std::integral_constant<int, 1>{});
  if (columns <= 2 * kLanes<A>) return f(std::integral_constant<int, 2>{});
  if (columns <= 3 * kLanes<A>) return f(std::integral_constant<int, 3>{});
  f(std::integral_constant<int, kPanelVectors>{});
}

// --- Transposition ---

// Of kLanes vectors: halves are interleaved, as often as lanes are halved.
template <class A>
DFM_INLINE inline void transpose(Vec<A> (&v)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  std::make_index_sequence<lanes> every;
#pragma GCC unroll 4
  for (int stage = 1; stage < lanes; stage *= 2) {
    Vec<A> t[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      t[2 * i] = detail::zipped(v[i], v[i + lanes / 2], every, 0);
      t[2 * i + 1] = detail::zipped(v[i], v[i + lanes / 2], every, 1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = t[i];
  }
}

// f(j, k, rows, columns) for blocks of at most kLanes x kLanes, both counts as `load` takes them.
template <class A, class F>
DFM_INLINE inline void for_blocks(int64_t rows, int64_t columns, F f) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t j = 0; j < rows; j += lanes)
    for (int64_t k = 0; k < columns; k += lanes) {
      const int down = std::min(rows - j, lanes), across = std::min(columns - k, lanes);
      if (down == lanes && across == lanes)
        f(j, k, Whole<A>{}, Whole<A>{});
      else
        f(j, k, down, across);
    }
}

// to [columns, rows] = the transpose of from [rows, columns]
template <class To, class From>
void transpose_rows(const From* from, int64_t ld, int64_t rows, int64_t columns, To* to,
                    int64_t to_ld) {
  using A = acc_t<To>;
  for_blocks<A>(rows, columns, [=](int64_t j, int64_t k, auto down, auto across) DFM_INLINE {
    Vec<A> v[kLanes<A>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      v[i] = i < down ? load(from + (j + i) * ld + k, across) : Vec<A>{};
    transpose<A>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      if (i < across) store(to + (k + i) * to_ld + j, v[i], down);
  });
}

// A panel [K, kPanel] of the transpose of b [columns, K], whose rows are ld apart; columns that b
// has not are 0.
template <class A, class T>
void pack_panel(int64_t K, int64_t columns, const T* b, int64_t ld, A* panel) {
  if (columns < kPanel<A>) std::fill(panel, panel + K * kPanel<A>, A(0));
  transpose_rows(b, ld, std::min(columns, kPanel<A>), K, panel, kPanel<A>);
}

// The same for products of bfloat16, K even: pairs of numbers move as one. Where K is odd in b it
// is one less there.
inline void pack_pairs(int64_t K, int64_t columns, const bf16* b, int64_t ld, bf16* panel) {
  columns = std::min(columns, kPanel<float>);
  Aligned<bf16> even(ld % 2 ? columns * K : 0);
  if (ld % 2) {
    for (int64_t j = 0; j < columns; ++j) {
      std::copy_n(b + j * ld, ld, &even[j * K]);
      even[j * K + ld] = bf16{};
    }
    b = even.data(), ld = K;
  }
  pack_panel(K / 2, columns, reinterpret_cast<const float*>(b), ld / 2,
             reinterpret_cast<float*>(panel));
}

// --- Whole matrices ---

// [rows, columns], rows `ld` apart; or, turned, the transpose of that in memory.
template <class T>
struct Matrix {
  const T* at;
  int64_t rows, columns, ld;
  bool turned;

  Matrix transpose() const { return {at, columns, rows, ld, !turned}; }
};

// The rows of a matrix as numbers of type A, one after the other: in place where they are.
template <class T>
class RowsOf {
  using A = acc_t<T>;
  Aligned<A> own;

 public:
  const A* at;
  int64_t ld;

  explicit RowsOf(const Matrix<T>& m)
      : own(in_place(m) ? 0 : m.rows * padded(m)), at(own.data()), ld(padded(m)) {
    if constexpr (std::is_same_v<T, A>)
      if (in_place(m)) {
        at = m.at, ld = m.ld;
        return;
      }
    const int64_t few = kLanes<A>, many = 4 * few;
    const int64_t some = m.rows < many * at::get_num_threads() ? few : many;
    at::parallel_for(0, panels_of(m.rows, some), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * some; row < std::min(end * some, m.rows); row += some)
        fill(m, row, std::min(some, m.rows - row));
    });
  }

 private:
  static bool in_place(const Matrix<T>& m) { return std::is_same_v<T, A> && !m.turned; }
  void fill(const Matrix<T>& m, int64_t first, int64_t rows) {
    A* to = &own[first * ld];
    if (m.turned) return transpose_rows(m.at + first, m.ld, m.columns, rows, to, ld);
    for (int64_t r = 0; r < rows; ++r)
      convert_row(to + r * ld, m.at + (first + r) * m.ld, m.columns);
  }
  // A power of two between rows would put those of a tile into the same sets of the caches.
  static int64_t padded(const Matrix<T>& m) { return m.columns + kLanes<A>; }
};

// Asks memory for rows of some numbers, of whose lines the share [done, next) of all.
template <class T>
inline void ask_for(const T* at, int64_t rows, int64_t numbers, int64_t ld, int64_t done,
                    int64_t next, int64_t all) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = (numbers + line - 1) / line, total = rows * lines;
  for (int64_t l = total * done / all; l < total * next / all; ++l)
    __builtin_prefetch(at + l / lines * ld + l % lines * line, 0, 2);
}

// What is added to a product: a row of numbers for all rows (ld 0), a matrix, or nothing (null).
template <class T>
struct Addend {
  const T* at = nullptr;
  int64_t ld = 0;
};

// c [rows of a, columns of b] = a b + plus, which may be c itself. A task is some rows times a
// panel, which changes no sum; it goes over the terms once, and what it needs of b for a chain of
// them stays in the nearest cache.
template <class T, class To>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const Addend<To>& plus, To* c) {
  using A = acc_t<T>;
  const int64_t M = a.rows, K = a.columns, N = b.columns, panels = panels_of(N, kPanel<A>);
  // Parts alike, of rows that stay in the second-level cache while all panels pass; enough of them
  // for all threads, but each packs a panel, which is not to take its time.
  const int64_t wanted = panels_of(2 * at::get_num_threads(), panels);
  const int64_t most =
      std::clamp(panels_of(M, wanted), 3 * int64_t(kTileRows), 64 * int64_t(kTileRows));
  const int64_t tiles = panels_of(panels_of(M, panels_of(M, most)), kTileRows);
  const int64_t part = tiles * kTileRows, parts = panels_of(M, part);
  const RowsOf<T> left(a);
  at::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    Aligned<A> panel(kChainOf * kPanel<A>), tile(part * kPanel<A>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % panels * kPanel<A>, columns = std::min(N - first, kPanel<A>);
      const int64_t row = i / panels * part, rows = std::min(part, M - row);
      for (int64_t k = 0; k < K; k += kChainOf) {
        const int64_t terms = std::min(K - k, kChainOf);
        if (b.turned)
          pack_panel(terms, columns, b.at + first * b.ld + k, b.ld, panel.data());
        else
          for (int64_t t = 0; t < terms; ++t)
            convert_row(&panel[t * kPanel<A>], b.at + (k + t) * b.ld + first, columns);
        const A* from = left.at + row * left.ld + k;
        const bool last = k + kChainOf >= K;
        // What is packed next, as it lies in memory.
        const int64_t at_k = last ? 0 : k + kChainOf;
        const int64_t at_column = last ? (i + 1) % panels * kPanel<A> : first;
        const int64_t down = b.turned ? at_column : at_k, across = b.turned ? at_k : at_column;
        const int64_t terms_soon = std::min(K - at_k, kChainOf);
        const int64_t columns_soon = std::min(N - at_column, kPanel<A>);
        const auto ask = [=, soon = b.at + down * b.ld + across, ld = b.ld, turned = b.turned](
                             int64_t done, int64_t next) {
          ask_for(soon, turned ? columns_soon : terms_soon, turned ? terms_soon : columns_soon, ld,
                  done, next, rows);
        };
        with_vectors<A>(columns, [&](auto vectors) {
          const auto times = k ? multiply_chain<true, vectors, A, A, decltype(ask)>
                               : multiply_chain<false, vectors, A, A, decltype(ask)>;
          times(rows, terms, from, left.ld, panel.data(), tile.data(), kPanel<A>, ask);
        });
      }
      for (int64_t r = 0; r < rows; ++r) {
        To* to = c + (row + r) * N + first;
        const To* more = plus.at ? plus.at + (row + r) * plus.ld + first : nullptr;
        const A* from = &tile[r * kPanel<A>];
        for_vectors<A>(columns, [=](int64_t j, auto count) DFM_INLINE {
          Vec<A> v = load(from + j, count);
          store(to + j, more ? v + load(more + j, count) : v, count);
        });
      }
    }
  });
}

}  // namespace dfm_fast
