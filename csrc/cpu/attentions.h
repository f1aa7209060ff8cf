// What attention reads and packs: the keys that count, blocks of queries, chunks of keys.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "functions.h"
#include "panels.h"
#include "tensors.h"

namespace dfm_fast {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kBlock = 64;                 // queries of a block
constexpr int64_t kChunk = 256;                // keys of a chunk
constexpr int64_t kSums = 16;                  // partial sums of dk and dv of a pair, at most
constexpr int64_t kPackedBytes = 64ll << 20;   // of pairs that are packed at a time
constexpr double kLog2E = 1.4426950408889634;  // exp(x) = 2^(x log2 e)

// --- Where things are ---

// A tensor [B, N, heads, d] with any strides but the last, which is 1.
template <class T>
struct Rows {
  T* data;
  int64_t stride[3];

  Rows(const Tensor& x) : stride{x.stride(0), x.stride(1), x.stride(2)} {
    if constexpr (std::is_const_v<T>)
      data = static_cast<T*>(x.const_data_ptr());
    else
      data = static_cast<T*>(x.mutable_data_ptr());
  }
  T* at(int64_t b, int64_t n, int64_t h) const {
    return data + b * stride[0] + n * stride[1] + h * stride[2];
  }
};

struct Sizes {
  int64_t B, T, S, H, heads, d, group;  // heads of k and v, each with `group` of q

  Sizes(const Tensor& q, const Tensor& k)
      : B(q.size(0)),
        T(q.size(1)),
        S(k.size(1)),
        H(q.size(2)),
        heads(k.size(2)),
        d(q.size(3)),
        group(H / heads) {}
  int64_t pairs() const { return B * heads; }
  int64_t queries() const { return T * group; }  // of a pair
  int64_t blocks() const { return (queries() + kBlock - 1) / kBlock; }
};

// The keys that the queries of every sample attend to.
struct Keys {
  std::vector<int64_t> index, start;  // [B + 1]; those of sample b are start[b] .. start[b + 1]

  Keys(const Sizes& n, const Optional& mask) : start(n.B + 1) {
    Tensor held = mask ? mask->contiguous() : Tensor();
    const bool* given = mask ? held.const_data_ptr<bool>() : nullptr;
    index.reserve(n.B * n.S);
    for (int64_t b = 0; b < n.B; ++b) {
      for (int64_t s = 0; s < n.S; ++s)
        if (!given || given[b * n.S + s]) index.push_back(s);
      start[b + 1] = static_cast<int64_t>(index.size());
    }
  }
  int64_t count(int64_t b) const { return start[b + 1] - start[b]; }
  const int64_t* of(int64_t b) const { return index.data() + start[b]; }
};

// --- Packing ---

// Row i of x = scale * row.
template <class T, class A = acc_t<T>>
DFM_INLINE inline void pack_row(const T* row, int64_t d, A scale, const Panels<A>& x, int64_t i) {
  for_vectors<A>(d, [&](int64_t j, auto count) DFM_INLINE {
    store(x.at(i, j / kPanel<A>) + j % kPanel<A>, load(row + j, count) * scale);
  });
}

// Column i of x = row.
template <class T, class A = acc_t<T>>
inline void pack_column(const T* row, int64_t d, const Panels<A>& x, int64_t i) {
  A* to = x.at(0, i / kPanel<A>) + i % kPanel<A>;
  for_vectors<A>(d, [&](int64_t j, auto count) DFM_INLINE {
    Vec<A> v = load(row + j, count);
    for (int l = 0; l < count; ++l) to[(j + l) * kPanel<A>] = v[l];
  });
}

// A pair's keys or values as factors: as rows, [keys, d], and as columns, [d, keys]. The memory
// must be 0 before.
template <class A>
struct Packed {
  Panels<A> k_columns, k_rows, v_columns, v_rows;
};

// One pair's part of memory that holds several.
template <class A>
class Packing {
 public:
  Packing(const Sizes& n, bool k_rows, bool v_rows, bool v_columns)
      : keys_(round_up(std::max<int64_t>(1, n.S), kPanel<A>)),
        d_(n.d),
        rows_(keys_ * panels<A>(n.d) * kPanel<A>),
        columns_(keys_ * n.d),
        wants_{k_rows, v_rows, v_columns},
        size_(columns_ * (1 + v_columns) + rows_ * (k_rows + v_rows)) {
    most_ = std::clamp<int64_t>(kPackedBytes / (size_ * static_cast<int64_t>(sizeof(A))), 1,
                                std::max<int64_t>(1, n.pairs()));
    memory_.resize(most_ * size_);
  }
  int64_t most() const { return most_; }
  int64_t keys() const { return keys_; }

  Packed<A> pair(int64_t i) {
    A* at = memory_.data() + i * size_;
    auto next = [&](bool wanted, int64_t rows, int64_t size) {
      Panels<A> x{wanted ? at : nullptr, rows};
      if (wanted) at += size;
      return x;
    };
    Panels<A> k_columns = next(true, d_, columns_), k_rows = next(wants_[0], keys_, rows_);
    Panels<A> v_columns = next(wants_[2], d_, columns_), v_rows = next(wants_[1], keys_, rows_);
    return {k_columns, k_rows, v_columns, v_rows};
  }

  template <class T>
  void fill(int64_t i, const Sizes& n, int64_t pair, const Rows<const T>& k, const Rows<const T>& v,
            const Keys& keys) {
    std::fill_n(memory_.data() + i * size_, size_, A(0));
    Packed<A> to = this->pair(i);
    int64_t b = pair / n.heads, head = pair % n.heads;
    const int64_t* index = keys.of(b);
    for (int64_t s = 0; s < keys.count(b); ++s) {
      const T *key = k.at(b, index[s], head), *value = v.at(b, index[s], head);
      pack_column(key, n.d, to.k_columns, s);
      if (to.k_rows.data) pack_row(key, n.d, A(1), to.k_rows, s);
      if (to.v_columns.data) pack_column(value, n.d, to.v_columns, s);
      if (to.v_rows.data) pack_row(value, n.d, A(1), to.v_rows, s);
    }
  }

 private:
  int64_t keys_, d_, rows_, columns_;
  bool wants_[3];
  int64_t size_, most_ = 1;
  std::vector<A> memory_;
};

// f(begin, end, at) for ranges of the items of as many pairs as are packed at a time, where
// at(item, g) calls g(pair, its keys packed, which of its items); then done(i, pair) for the i-th
// of these.
template <class T, class A, class F, class Done>
void each_item(const Sizes& n, const Keys& keys, const Tensor& k, const Tensor& v,
               Packing<A>& packing, int64_t items, const F& f, const Done& done) {
  Rows<const T> k_rows(k), v_rows(v);
  for (int64_t first = 0; first < n.pairs(); first += packing.most()) {
    int64_t count = std::min(packing.most(), n.pairs() - first);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        packing.template fill<T>(i, n, first + i, k_rows, v_rows, keys);
    });
    at::parallel_for(0, count * items, 1, [&](int64_t begin, int64_t end) {
      f(begin, end, [&](int64_t item, auto&& g) {
        int64_t i = item / items;
        g(first + i, packing.pair(i), item % items);
      });
    });
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) done(i, first + i);
    });
  }
}

// --- Chunks of keys ---

template <class A>
struct Chunk {
  int64_t first, count;

  // Of a factor with keys as columns, and as rows.
  Panels<A> columns(const Panels<A>& x) const { return {x.at(0, first / kPanel<A>), x.rows}; }
  Panels<A> rows(const Panels<A>& x) const { return {x.at(first, 0), x.rows}; }
};

template <class A, class F>
inline void each_chunk(int64_t keys, F f) {
  for (int64_t first = 0; first < keys; first += kChunk)
    f(Chunk<A>{first, std::min(kChunk, keys - first)});
}

// f(vector's place in row i) for the vectors that hold n columns.
template <class A, class F>
DFM_INLINE inline void for_row(const Panels<A>& x, int64_t i, int64_t n, F f) {
  for (int64_t j = 0; j < n; j += kPanel<A>) {
    A* p = x.at(i, j / kPanel<A>);
    f(p);
    if (j + kLanes<A> < n) f(p + kLanes<A>);
  }
}

// Columns past n of the last vectors, so low that they count for nothing.
template <class A>
inline void hide_columns(const Panels<A>& x, int64_t rows, int64_t n) {
  int64_t last = n - n % kLanes<A>;
  if (last == n) return;
  for (int64_t i = 0; i < rows; ++i) {
    A* p = x.at(i, last / kPanel<A>) + last % kPanel<A>;
    for (int64_t l = n - last; l < kLanes<A>; ++l) p[l] = std::numeric_limits<A>::lowest() / 4;
  }
}

template <class A>
inline A max_lanes(Vec<A> v) {
  A most = v[0];
  for (int l = 1; l < kLanes<A>; ++l) most = v[l] > most ? v[l] : most;
  return most;
}

}  // namespace
}  // namespace dfm_fast
