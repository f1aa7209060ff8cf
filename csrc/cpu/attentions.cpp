// CPU operators of the family `attentions`; the definition is dfm_fast/ops/attentions.py.
//
// A key head with all queries that attend to it is a pair. Its keys and values are packed once, in
// the arithmetic type and only those that the mask leaves; then blocks of queries go through them
// in chunks, scores staying in the cache.
#include "attentions.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

namespace dfm_fast {
namespace {

// --- Forward ---

// A block of queries: rows first .. first + count of a pair, row = token * group + head of it.
struct Block {
  int64_t first, count;

  Block(const Sizes& n, int64_t block)
      : first(block * kBlock), count(std::min(kBlock, n.queries() - first)) {}
  int64_t tiles() const { return round_up(count, kTile); }
  template <class T>
  static T* row(const Rows<T>& x, const Sizes& n, int64_t pair, int64_t i) {
    int64_t head = pair % n.heads * n.group + i % n.group;
    return x.at(pair / n.heads, i / n.group, head);
  }
  template <class T, class A>
  void pack(const Rows<const T>& x, const Sizes& n, int64_t pair, A scale,
            const Panels<A>& to) const {
    for (int64_t i = 0; i < count; ++i) pack_row(row(x, n, pair, first + i), n.d, scale, to, i);
  }
};

// What a thread works in. Rows that a block does not have are 0, or left from another one: finite.
template <class A>
struct Scratch {
  std::vector<A> memory;
  Panels<A> q, y, p, dy, g;  // those of forward; two more of backward

  Scratch(const Sizes& n, bool backward) {
    int64_t width = panels<A>(n.d) * kPanel<A>, keys = std::min(kChunk, round_up(n.S, kPanel<A>));
    int64_t narrow = kBlock * width, wide = kBlock * keys;
    memory.resize(2 * narrow + wide + (backward ? narrow + wide : 0));
    A* at = memory.data();
    q = {at, kBlock}, y = {at += narrow, kBlock}, p = {at += narrow, kBlock};
    if (backward) dy = {at += wide, kBlock}, g = {at += narrow, kBlock};
  }
};

// The running softmax of a row (Milakov and Gimelshein 2018): its scores, to base 2, become
// exp(score - most), and what was summed before is to be scaled by what comes back.
template <class A>
struct Softmax {
  A most = std::numeric_limits<A>::lowest(), sum = 0;

  DFM_INLINE A add(const Panels<A>& p, int64_t i, int64_t n) {
    Vec<A> most_of = Vec<A>{} + most, sum_of{};
    for_row(p, i, n, [&](A* at) DFM_INLINE {
      Vec<A> v = load(at);
      most_of = v > most_of ? v : most_of;
    });
    A now = max_lanes<A>(most_of), before = exp2_of(Vec<A>{} + (most - now))[0];
    for_row(p, i, n, [&](A* at) DFM_INLINE {
      Vec<A> v = exp2_of(load(at) - now);
      sum_of += v;
      store(at, v);
    });
    sum = sum * before + sum_lanes<A>(sum_of);
    most = now;
    return before;
  }
};

// One block of one pair, from s.q to s.y.
template <class A>
void attend(const Sizes& n, const Packed<A>& packed, int64_t keys, const Block& block,
            const Scratch<A>& s, Softmax<A>* rows) {
  each_chunk<A>(keys, [&](const Chunk<A>& chunk) {
    int64_t count = chunk.count;
    product<Left::plain, false>(s.q, chunk.columns(packed.k_columns), s.p, block.tiles(), count,
                                n.d);
    hide_columns(s.p, block.tiles(), count);
    for (int64_t i = 0; i < block.count; ++i) {
      A before = rows[i].add(s.p, i, count);
      if (chunk.first > 0)
        for_row(s.y, i, n.d, [&](A* at) DFM_INLINE { store(at, load(at) * before); });
    }
    Panels<A> values = chunk.rows(packed.v_rows);
    if (chunk.first == 0)
      product<Left::plain, false>(s.p, values, s.y, block.tiles(), n.d, count);
    else
      product<Left::plain, true>(s.p, values, s.y, block.tiles(), n.d, count);
  });
}

template <class T, class A = acc_t<T>>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Keys& keys, A scale,
             const Tensor& y, const Tensor& lse) {
  Sizes n(q, k);
  Rows<const T> q_rows(q);
  Rows<T> y_rows(y);
  A* lse_rows = lse.numel() ? mutable_data<A>(lse) : nullptr;
  Packing<A> packing(n, false, true, false);
  each_item<T>(
      n, keys, k, v, packing, n.blocks(),
      [&](int64_t begin, int64_t end, auto at) {
        Scratch<A> s(n, false);
        for (int64_t item = begin; item < end; ++item)
          at(item, [&](int64_t pair, const Packed<A>& packed, int64_t index) {
            Block block(n, index);
            int64_t b = pair / n.heads, count = keys.count(b);
            Softmax<A> rows[kBlock];
            block.pack(q_rows, n, pair, scale * static_cast<A>(kLog2E), s.q);
            attend(n, packed, count, block, s, rows);
            for (int64_t i = 0; i < block.count; ++i) {
              T* to = Block::row(y_rows, n, pair, block.first + i);
              A scale = count ? 1 / rows[i].sum : 0;
              for_vectors<A>(n.d, [&](int64_t j, auto width) DFM_INLINE {
                Vec<A> sums = load(s.y.at(i, j / kPanel<A>) + j % kPanel<A>);
                store(to + j, count ? sums * scale : Vec<A>{}, width);
              });
              if (!lse_rows) continue;
              int64_t row = (to - y_rows.data) / n.d;
              lse_rows[row] = count ? rows[i].most + std::log2(rows[i].sum)
                                    : -std::numeric_limits<A>::infinity();
            }
          });
      },
      [](int64_t, int64_t) {});
}

// --- Backward ---
//
// A pair's queries are divided into at most kSums parts, each with sums of dk and dv of its own,
// which are then added in order: the same values for any number of threads.

// What backward is given, and dq.
template <class T>
struct Given {
  using A = acc_t<T>;
  Rows<const T> q, y, dy;
  const A* lse;  // [B, T, H], to base 2
  Rows<T> dq;
  A scale;
};

// p = exp(p - lse), to base 2, and g = p (g - sum p g) of row i, where g holds dp. The sum is known
// where a row has several chunks. Of one, p is divided by its own sum: lse is rounded, which would
// weigh in the difference.
template <class A>
DFM_INLINE inline void score_gradients(const Panels<A>& p, const Panels<A>& g, int64_t i, int64_t n,
                                       A lse, bool whole, A sum) {
  int64_t apart = g.data - p.data;
  if (!whole)
    return for_row(p, i, n, [&](A* at) DFM_INLINE {
      Vec<A> v = exp2_of(load(at) - lse);
      store(at, v);
      store(at + apart, v * (load(at + apart) - sum));
    });
  Vec<A> sums{}, products{};
  for_row(p, i, n, [&](A* at) DFM_INLINE {
    Vec<A> v = exp2_of(load(at) - lse);
    sums += v;
    products += v * load(at + apart);
    store(at, v);
  });
  A scale = 1 / sum_lanes<A>(sums);
  sum = sum_lanes<A>(products) * scale;
  for_row(p, i, n, [&](A* at) DFM_INLINE {
    Vec<A> v = load(at) * scale;
    store(at, v);
    store(at + apart, v * (load(at + apart) - sum));
  });
}

// One block of one pair: dq, and what it adds to dk (by scale log2 e too much) and dv.
template <class T, class A = acc_t<T>>
void block_gradients(const Sizes& n, const Given<T>& x, int64_t pair, const Packed<A>& packed,
                     int64_t keys, const Block& block, const Scratch<A>& s, const Panels<A>& dk,
                     const Panels<A>& dv) {
  block.pack(x.q, n, pair, x.scale * static_cast<A>(kLog2E), s.q);
  block.pack(x.dy, n, pair, A(1), s.dy);
  A lse[kBlock], sum[kBlock] = {};
  for (int64_t i = 0; i < block.count; ++i) {
    const T* y = Block::row(x.y, n, pair, block.first + i);
    lse[i] = x.lse[(y - x.y.data) / n.d];
    if (keys <= kChunk) continue;
    const T* dy = Block::row(x.dy, n, pair, block.first + i);
    Vec<A> sums{};
    for_vectors<A>(n.d, [&](int64_t j, auto count)
                            DFM_INLINE { sums += load(y + j, count) * load(dy + j, count); });
    sum[i] = sum_lanes<A>(sums);
  }
  int64_t tiles = block.tiles();
  each_chunk<A>(keys, [&](const Chunk<A>& chunk) {
    int64_t count = chunk.count, key_tiles = round_up(count, kTile);
    product<Left::plain, false>(s.q, chunk.columns(packed.k_columns), s.p, tiles, count, n.d);
    product<Left::plain, false>(s.dy, chunk.columns(packed.v_columns), s.g, tiles, count, n.d);
    hide_columns(s.p, tiles, count);
    for (int64_t i = 0; i < block.count; ++i)
      score_gradients(s.p, s.g, i, count, lse[i], keys <= kChunk, sum[i]);
    Panels<A> rows = chunk.rows(packed.k_rows);
    if (chunk.first == 0)
      product<Left::plain, false>(s.g, rows, s.y, tiles, n.d, count);
    else
      product<Left::plain, true>(s.g, rows, s.y, tiles, n.d, count);
    product<Left::transposed, true>(s.p, s.dy, chunk.rows(dv), key_tiles, n.d, block.count);
    product<Left::transposed, true>(s.g, s.q, chunk.rows(dk), key_tiles, n.d, block.count);
  });
  for (int64_t i = 0; i < block.count; ++i) {
    T* dq = Block::row(x.dq, n, pair, block.first + i);
    for_vectors<A>(n.d, [&](int64_t j, auto width) DFM_INLINE {
      Vec<A> v = load(s.y.at(i, j / kPanel<A>) + j % kPanel<A>);
      store(dq + j, keys ? v * x.scale : Vec<A>{}, width);
    });
  }
}

// dx of a pair = scale times the parts' sums, which lie `apart`; 0 for keys that nobody attends to.
template <class T, class A = acc_t<T>>
void add_parts(const Sizes& n, const Keys& keys, int64_t pair, const A* sums, int64_t apart,
               int64_t parts, int64_t rows, A scale, const Rows<T>& dx) {
  int64_t b = pair / n.heads, head = pair % n.heads, at = 0;
  for (int64_t s = 0; s < n.S; ++s) {
    bool there = at < keys.count(b) && keys.of(b)[at] == s;
    Panels<A> first{const_cast<A*>(sums), rows};
    T* to = dx.at(b, s, head);
    for_vectors<A>(n.d, [&](int64_t j, auto width) DFM_INLINE {
      Vec<A> sum{};
      const A* part = first.at(at, j / kPanel<A>) + j % kPanel<A>;
      for (int64_t i = 0; there && i < parts; ++i) sum += load(part + i * apart);
      store(to + j, sum * scale, width);
    });
    at += there;
  }
}

template <class T, class A = acc_t<T>>
void backward(const Tensor& q, const Tensor& k, const Tensor& v, const Keys& keys,
              const Given<T>& x, const Tensor& dk, const Tensor& dv) {
  Sizes n(q, k);
  Rows<T> dk_rows(dk), dv_rows(dv);
  Packing<A> packing(n, true, false, true);
  int64_t each = std::max<int64_t>(4, (n.blocks() + kSums - 1) / kSums);  // blocks of a part
  int64_t parts = (n.blocks() + each - 1) / each, rows = packing.keys();
  int64_t one = rows * panels<A>(n.d) * kPanel<A>, apart = 2 * one;
  int64_t at_once = std::min(packing.most(), n.pairs());
  std::vector<A> sums(at_once * parts * apart);
  each_item<T>(
      n, keys, k, v, packing, parts,
      [&](int64_t begin, int64_t end, auto at) {
        Scratch<A> s(n, true);
        for (int64_t item = begin; item < end; ++item)
          at(item, [&](int64_t pair, const Packed<A>& packed, int64_t part) {
            A* sum = sums.data() + item * apart;
            std::fill_n(sum, apart, A(0));
            int64_t last = std::min((part + 1) * each, n.blocks());
            for (int64_t i = part * each; i < last; ++i)
              block_gradients(n, x, pair, packed, keys.count(pair / n.heads), Block(n, i), s,
                              Panels<A>{sum, rows}, Panels<A>{sum + one, rows});
          });
      },
      [&](int64_t i, int64_t pair) {
        const A* sum = sums.data() + i * parts * apart;
        A scale = 1 / static_cast<A>(kLog2E);  // q came with the rest of it
        add_parts(n, keys, pair, sum, apart, parts, rows, scale, dk_rows);
        add_parts(n, keys, pair, sum + one, apart, parts, rows, A(1), dv_rows);
      });
}

// --- Operators ---

void check_rows(const char* argument, const Tensor& x, at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK(x.sizes() == sizes && x.scalar_type() == like.scalar_type() &&
                  (x.numel() == 0 || x.stride(-1) == 1 || x.size(-1) == 1),
              "multi_query_attention: expected ", argument, " of sizes ", sizes,
              " with contiguous rows, got ", x.sizes(), " with strides ", x.strides());
}

void check_given(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask) {
  check_rows("q", q, q.sizes(), q);
  check_rows("k", k, {q.size(0), k.size(1), k.size(2), q.size(3)}, q);
  check_rows("v", v, k.sizes(), q);
  TORCH_CHECK(!mask || (mask->scalar_type() == at::kBool && mask->dim() == 2 &&
                        mask->size(0) == q.size(0) && mask->size(1) == k.size(1)),
              "multi_query_attention: expected a mask of bool [B, S]");
}

Tensor empty_like(const Tensor& x) {
  return at::empty(x.sizes(), x.options(), at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> multi_query_attention_cpu(const Tensor& q,  // [B, T, H, d]
                                                     const Tensor& k,  // [B, S, Hkv, d]
                                                     const Tensor& v,
                                                     const Optional& mask,  // [B, S]
                                                     double scale, bool save) {
  check_given(q, k, v, mask);
  Tensor y = empty_like(q);
  auto sizes = save ? q.sizes().slice(0, 3).vec() : std::vector<int64_t>{0};
  Tensor lse = at::empty(sizes, q.options().dtype(accumulation(q)));
  if (q.numel() == 0) return {y, lse};
  Keys keys(Sizes(q, k), mask);
  dispatch(q.scalar_type(), "multi_query_attention", [&](auto zero) {
    using T = decltype(zero);
    forward<T>(q, k, v, keys, static_cast<acc_t<T>>(scale), y, lse);
  });
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> multi_query_attention_backward_cpu(
    const Tensor& dy,  // [B, T, H, d]
    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask, const Tensor& y,
    const Tensor& lse,  // [B, T, H]
    double scale) {
  check_given(q, k, v, mask);
  check_rows("dy", dy, q.sizes(), q);
  check_rows("y", y, q.sizes(), q);
  TORCH_CHECK(y.is_contiguous() && lse.is_contiguous() && lse.sizes() == q.sizes().slice(0, 3) &&
                  lse.scalar_type() == accumulation(q),
              "multi_query_attention: expected y and lse as forward gave them");
  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  if (q.size(0) == 0) return {dq, dk, dv};
  Keys keys(Sizes(q, k), mask);
  dispatch(q.scalar_type(), "multi_query_attention_backward", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Given<T> x{q, y, dy, data<A>(lse), dq, static_cast<A>(scale)};
    backward<T>(q, k, v, keys, x, dk, dv);
  });
  return {dq, dk, dv};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("multi_query_attention_backward", multi_query_attention_backward_cpu);
  m.impl("multi_query_attention", multi_query_attention_cpu);
}

}  // namespace
}  // namespace dfm_fast
