// CPU operators of the family `rotaries`; the definition is dfm_fast/ops/rotaries.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "functions.h"
#include "tensors.h"

namespace dfm_fast {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kTokens = 16;      // of a block: what a thread takes, and what dw is summed over
constexpr int64_t kGrain = 1 << 14;  // elements that are worth another thread

enum class Turn { none, pairs, halves };

// --- Rows ---
//
// A row is one head of one token, d elements. Weights and tables are padded to whole vectors.

template <class A>
int64_t padded(int64_t d) {
  return (d + 2 * kLanes<A> - 1) / (2 * kLanes<A>)*2 * kLanes<A>;
}

// The lanes of every pair exchanged.
template <class V, size_t... I>
inline V exchanged(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}

// A token's angles, as its rows want them. Turned back with sign = -1.
//   pairs: y = x cos + exchanged(x) sin, where cos = c0 c0 c1 c1 ... and sin = -s0 s0 -s1 s1 ...
//   halves: as they are
template <Turn turn, class A>
void spread_angles(const A* cos, const A* sin, int64_t d, A sign, A* cos_row, A* sin_row) {
  for_vectors<A>(d / 2, [&](int64_t i, auto count) DFM_INLINE {
    Vec<A> c = load(cos + i, count), s = sign * load(sin + i, count);
    if constexpr (turn == Turn::pairs) {
      store_zipped(cos_row + 2 * i, c, c);
      store_zipped(sin_row + 2 * i, -s, s);
    } else {
      store(cos_row + i, c);
      store(sin_row + i, s);
    }
  });
}

template <class A>
struct Angles {
  const A *cos, *sin;

  DFM_INLINE Vec<A> turned(Vec<A> v, int64_t i) const {
    Vec<A> partner = exchanged(v, std::make_index_sequence<kLanes<A>>{});
    return v * load(cos + i) + partner * load(sin + i);
  }
  DFM_INLINE void turn(Vec<A>& a, Vec<A>& b, int64_t i) const {
    Vec<A> c = load(cos + i), s = load(sin + i), first = a;
    a = a * c - b * s;
    b = b * c + first * s;
  }
};

// f(i, count, v) for every vector of a row, turned; read(i, count) gives those before.
template <Turn turn, class A, class Read, class F>
DFM_INLINE inline void for_turned(int64_t d, const Angles<A>& angles, Read read, F f) {
  if constexpr (turn == Turn::halves) {
    int64_t half = d / 2;
    for_vectors<A>(half, [&](int64_t i, auto count) DFM_INLINE {
      Vec<A> a = read(i, count), b = read(half + i, count);
      angles.turn(a, b, i);
      f(i, count, a);
      f(half + i, count, b);
    });
  } else {
    for_vectors<A>(d, [&](int64_t i, auto count) DFM_INLINE {
      Vec<A> v = read(i, count);
      if constexpr (turn == Turn::pairs) v = angles.turned(v, i);
      f(i, count, v);
    });
  }
}

template <class T, class A = acc_t<T>>
DFM_INLINE inline A sum_of_squares(const T* x, int64_t d) {
  Vec<A> sum{};
  for_vectors<A>(d, [&](int64_t i, auto count) DFM_INLINE {
    Vec<A> v = load(x + i, count);
    sum += v * v;
  });
  return sum_lanes<A>(sum);
}

// y = turned(w x rstd)
template <Turn turn, bool norm, class T, class A = acc_t<T>>
DFM_INLINE inline void forward_row(const T* x, T* y, const A* weight, const Angles<A>& angles,
                                   int64_t d, A rstd) {
  auto normed = [&](int64_t i, auto count) DFM_INLINE {
    Vec<A> v = load(x + i, count);
    return norm ? v * rstd * load(weight + i, count) : v;
  };
  for_turned<turn>(d, angles, normed,
                   [&](int64_t i, auto count, Vec<A> v) DFM_INLINE { store(y + i, v, count); });
}

// sum g x, where g = w dn and dn is dy turned back.
template <Turn turn, class T, class A = acc_t<T>>
DFM_INLINE inline A sum_of_products(const T* dy, const T* x, const A* weight,
                                    const Angles<A>& angles, int64_t d) {
  Vec<A> sum{};
  auto read = [&](int64_t i, auto count) DFM_INLINE { return load(dy + i, count); };
  for_turned<turn>(d, angles, read, [&](int64_t i, auto count, Vec<A> dn) DFM_INLINE {
    sum += dn * load(weight + i, count) * load(x + i, count);
  });
  return sum_lanes<A>(sum);
}

// dx = (g - x slope) rstd,  dw += dn x rstd,  where slope = mean(g x) rstd^2
template <Turn turn, bool norm, bool weights, class T, class A = acc_t<T>>
DFM_INLINE inline void backward_row(const T* dy, const T* x, T* dx, const A* weight, A* dw,
                                    const Angles<A>& angles, int64_t d, A rstd, A slope) {
  auto read = [&](int64_t i, auto count) DFM_INLINE { return load(dy + i, count); };
  for_turned<turn>(d, angles, read, [&](int64_t i, auto count, Vec<A> dn) DFM_INLINE {
    if constexpr (norm) {
      Vec<A> v = load(x + i, count);
      store(dx + i, (dn * load(weight + i, count) - v * slope) * rstd, count);
      // Whole vectors: the lanes past the end are 0, and a masked load would wait for the store.
      if constexpr (weights) store(dw + i, load(dw + i) + dn * (v * rstd));
    } else {
      store(dx + i, dn, count);
    }
  });
}

// --- Tokens ---

template <class A>
struct Token {
  int64_t block, b, t;
  Angles<A> angles;
  A* dw;            // scratch: a row
  A *rstd, *slope;  // scratch: one of each head
};

// Rows of a tensor [B, T, heads, d] with any strides but the last, which is 1.
template <class T>
struct Rows {
  const T* data;
  int64_t stride[3], tokens, heads;

  Rows(const Tensor& x)
      : data(static_cast<const T*>(x.const_data_ptr())),
        stride{x.stride(0), x.stride(1), x.stride(2)},
        tokens(x.size(1)),
        heads(x.size(2)) {}
  const T* at(const Token<acc_t<T>>& token, int64_t h) const {
    return data + token.b * stride[0] + token.t * stride[1] + h * stride[2];
  }
};

// A weight or table in the arithmetic type; null where there is none.
template <class A>
struct Values {
  Tensor held;
  const A* data = nullptr;

  Values(const Optional& given) {
    if (!given) return;
    held = given->to(c10::CppTypeToScalarType<A>::value).contiguous();
    data = held.const_data_ptr<A>();
  }
};

// What forward and backward have in common: the tokens in blocks, each with its angles.
template <class A>
struct Work {
  int64_t batch, tokens, heads, d;  // the longer of q and k; heads of both
  A eps, sign;
  Values<A> q_weight, k_weight, cos, sin;
  int64_t table_stride;  // from sample to sample: 0 where all share the table

  int64_t blocks() const { return (batch * tokens + kTokens - 1) / kTokens; }

  // f(token) for all tokens
  template <Turn turn, class F>
  void each_token(const F& f) const {
    int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kTokens * heads * d));
    at::parallel_for(0, blocks(), grain, [&](int64_t begin, int64_t end) {
      int64_t row = padded<A>(d), last = std::min(end * kTokens, batch * tokens);
      std::vector<A> rows(3 * row + 2 * heads);
      A *cos_row = rows.data(), *sin_row = cos_row + row, *dw = sin_row + row, *rstd = dw + row;
      for (int64_t n = begin * kTokens; n < last; ++n) {
        int64_t b = n / tokens, t = n % tokens;
        if constexpr (turn != Turn::none) {
          int64_t at = b * table_stride + t * (d / 2);
          spread_angles<turn>(cos.data + at, sin.data + at, d, sign, cos_row, sin_row);
        }
        f(Token<A>{n / kTokens, b, t, {cos_row, sin_row}, dw, rstd, rstd + heads});
      }
    });
  }
};

template <class F>
void with_turn(bool rotated, bool interleaved, F f) {
  if (!rotated)
    f(std::integral_constant<Turn, Turn::none>{});
  else if (interleaved)
    f(std::integral_constant<Turn, Turn::pairs>{});
  else
    f(std::integral_constant<Turn, Turn::halves>{});
}

template <class A>
Work<A> make_work(const Tensor& q, const Tensor& k, const Optional& q_weight,
                  const Optional& k_weight, const Optional& cos, const Optional& sin, double eps,
                  int sign) {
  int64_t d = q.size(3);
  return {q.size(0),
          std::max(q.size(1), k.size(1)),
          q.size(2) + k.size(2),
          d,
          static_cast<A>(eps),
          static_cast<A>(sign),
          q_weight,
          k_weight,
          cos,
          sin,
          cos && cos->dim() == 3 ? q.size(1) * (d / 2) : 0};
}

void check_rows(const char* op, const char* argument, const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.dim() == 4 && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() &&
                  (x.stride(3) == 1 || x.numel() == 0),
              op, ": expected ", argument, " of sizes ", like.sizes(),
              " with contiguous rows, got ", x.sizes(), " with strides ", x.strides());
}

Tensor empty_like(const Tensor& x) {
  return at::empty(x.sizes(), x.options(), at::MemoryFormat::Contiguous);
}

// 1 / sqrt(mean square + eps) of all heads, from their sums of squares: the square roots of several
// at once, and none is waited for.
template <class A>
void finish_rstd(A* rstd, int64_t heads, int64_t d, A eps) {
  A scale = A(1) / static_cast<A>(d);
  for (int64_t h = 0; h < heads; ++h) rstd[h] = 1 / std::sqrt(rstd[h] * scale + eps);
}

// --- Forward ---

// q or k: its rows, and where they go.
template <class T>
struct Forward {
  using A = acc_t<T>;
  Rows<T> x;
  T* y;
  const A* weight;  // null: no norm

  template <Turn turn>
  void token(const Token<A>& token, int64_t d, A eps) const {
    if (token.t >= x.tokens) return;
    T* to = y + (token.b * x.tokens + token.t) * x.heads * d;
    auto rows = [&](auto norm) DFM_INLINE {
      for (int64_t h = 0; h < x.heads; ++h)
        forward_row<turn, norm()>(x.at(token, h), to + h * d, weight, token.angles, d,
                                  token.rstd[h]);
    };
    if (!weight) return rows(std::false_type{});
    for (int64_t h = 0; h < x.heads; ++h) token.rstd[h] = sum_of_squares(x.at(token, h), d);
    finish_rstd(token.rstd, x.heads, d, eps);
    rows(std::true_type{});
  }
};

std::tuple<Tensor, Tensor> qk_norm_rope_cpu(const Tensor& q, const Tensor& k,
                                            const Optional& q_weight, const Optional& k_weight,
                                            const Optional& cos, const Optional& sin, double eps,
                                            bool interleaved) {
  check_rows("qk_norm_rope", "q", q, q);
  check_rows("qk_norm_rope", "k", k, k);
  Tensor q_out = empty_like(q), k_out = empty_like(k);
  dispatch(q.scalar_type(), "qk_norm_rope", [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    auto work = make_work<A>(q, k, q_weight, k_weight, cos, sin, eps, 1);
    Forward<T> of_q{q, static_cast<T*>(q_out.mutable_data_ptr()), work.q_weight.data};
    Forward<T> of_k{k, static_cast<T*>(k_out.mutable_data_ptr()), work.k_weight.data};
    with_turn(cos.has_value(), interleaved, [&](auto turn) {
      work.template each_token<turn()>([&](const Token<A>& token) {
        of_q.template token<turn()>(token, work.d, work.eps);
        of_k.template token<turn()>(token, work.d, work.eps);
      });
    });
  });
  return {q_out, k_out};
}

// --- Backward ---

// Sums over blocks [blocks, d], in order. In double: blocks may be many.
template <class A>
Tensor sum_of_blocks(const Tensor& partial, const Optional& weight, const Tensor& like) {
  int64_t d = partial.size(1);
  Tensor out = at::empty({d}, like.options().dtype(c10::CppTypeToScalarType<A>::value));
  std::vector<double> sum(d);
  const A* row = partial.const_data_ptr<A>();
  for (int64_t block = 0; block < partial.size(0); ++block, row += d)
    for (int64_t i = 0; i < d; ++i) sum[i] += row[i];
  std::copy(sum.begin(), sum.end(), out.mutable_data_ptr<A>());
  return out.to(weight->scalar_type());
}

// q or k: its rows and their gradients, and the sums of its dw by block.
template <class T>
struct Backward {
  using A = acc_t<T>;
  Rows<T> dy, x;
  T* dx;
  const A* weight;
  Tensor partial;  // [blocks, d] or undefined

  Backward(const Tensor& dy, const Tensor& x, Tensor& out, const A* weight, bool weights,
           int64_t blocks)
      : dy(dy), x(x), dx(static_cast<T*>(out.mutable_data_ptr())), weight(weight) {
    auto dtype = c10::CppTypeToScalarType<A>::value;
    if (weight && weights)
      partial = at::empty({blocks, x.size(3)}, x.options().dtype(dtype)).zero_();
  }

  // dw of a token is summed by itself first: errors grow less.
  template <Turn turn, bool norm, bool weights>
  void rows(const Token<A>& token, int64_t d, A eps) const {
    T* to = dx + (token.b * x.tokens + token.t) * x.heads * d;
    if constexpr (norm) {
      for (int64_t h = 0; h < x.heads; ++h) {
        token.rstd[h] = sum_of_squares(x.at(token, h), d);
        token.slope[h] =
            sum_of_products<turn>(dy.at(token, h), x.at(token, h), weight, token.angles, d);
      }
      finish_rstd(token.rstd, x.heads, d, eps);
      for (int64_t h = 0; h < x.heads; ++h)
        token.slope[h] *= token.rstd[h] * token.rstd[h] / static_cast<A>(d);
    }
    if constexpr (weights) std::fill_n(token.dw, padded<A>(d), A(0));
    for (int64_t h = 0; h < x.heads; ++h)
      backward_row<turn, norm, weights>(dy.at(token, h), x.at(token, h), to + h * d, weight,
                                        token.dw, token.angles, d, token.rstd[h], token.slope[h]);
    if constexpr (weights) {
      A* sums = static_cast<A*>(partial.data_ptr()) + token.block * d;
      for (int64_t i = 0; i < d; ++i) sums[i] += token.dw[i];
    }
  }

  template <Turn turn>
  void token(const Token<A>& token, int64_t d, A eps) const {
    if (token.t >= x.tokens) return;
    if (!weight)
      rows<turn, false, false>(token, d, eps);
    else if (!partial.defined())
      rows<turn, true, false>(token, d, eps);
    else
      rows<turn, true, true>(token, d, eps);
  }

  Tensor weight_gradient(const Optional& given, const Tensor& like) const {
    if (partial.defined()) return sum_of_blocks<A>(partial, given, like);
    return at::empty({0}, like.options().dtype(given ? given->scalar_type() : at::kFloat));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward_cpu(
    const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k, const Optional& q_weight,
    const Optional& k_weight, const Optional& cos, const Optional& sin, double eps,
    bool interleaved, bool weights) {
  const char* op = "qk_norm_rope_backward";
  check_rows(op, "q", q, q);
  check_rows(op, "k", k, k);
  check_rows(op, "dq", dq, q);
  check_rows(op, "dk", dk, k);
  Tensor q_out = empty_like(q), k_out = empty_like(k), q_weight_out, k_weight_out;
  dispatch(q.scalar_type(), op, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    auto work = make_work<A>(q, k, q_weight, k_weight, cos, sin, eps, -1);
    int64_t d = work.d;
    Backward<T> of_q(dq, q, q_out, work.q_weight.data, weights, work.blocks());
    Backward<T> of_k(dk, k, k_out, work.k_weight.data, weights, work.blocks());
    with_turn(cos.has_value(), interleaved, [&](auto turn) {
      work.template each_token<turn()>([&](const Token<A>& token) {
        of_q.template token<turn()>(token, d, work.eps);
        of_k.template token<turn()>(token, d, work.eps);
      });
    });
    q_weight_out = of_q.weight_gradient(q_weight, q);
    k_weight_out = of_k.weight_gradient(k_weight, k);
  });
  return {q_out, k_out, q_weight_out, k_weight_out};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("qk_norm_rope", qk_norm_rope_cpu);
  m.impl("qk_norm_rope_backward", qk_norm_rope_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
