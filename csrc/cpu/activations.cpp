// CPU operators of the family `activations`; the definition is dfm_fast/ops/activations.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "functions.h"
#include "tensors.h"

namespace dfm_fast {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements of a task, about
constexpr int64_t kBlock = 32;       // rows of a partial sum: fixed, whatever the threads

// Bytes: a row of x is two streams, each too short for the hardware to run ahead of (measured: 1.1
// to 1.7 times slower without).
constexpr int64_t kAhead = 2048;

// --- Functions of one vector: value, and derivative ---

template <class V>
using lane_t = std::remove_cvref_t<decltype(V{}[0])>;

template <class V>
struct Both {
  V value, slope;
};

struct Gelu {
  template <class V>
  static V value(V x) {
    return x * normal(x).cdf;
  }
  template <class V>
  static Both<V> both(V x) {
    auto [cdf, bell] = normal(x);
    return {x * cdf, cdf + x * bell * lane_t<V>(0.39894228040143267794)};  // 1 / √(2π)
  }
};

// x s with s = sigmoid(u); slope s + x s (1 - s) u'. Neither s nor 1 - s cancels.
template <class V>
Both<V> gated(V x, V u, V u_slope) {
  V e = exp(u > 0 ? -u : u), large = 1 / (1 + e), small = e * large;
  V s = u > 0 ? large : small;
  return {x * s, s + x * (large * small) * u_slope};
}

struct GeluTanh {
  template <class V>
  static V value(V x) {
    return x * sigmoid(argument(x, x * x));
  }
  template <class V>
  static Both<V> both(V x) {
    using A = lane_t<V>;
    V square = x * x;
    return gated(x, argument(x, square), A(kLinear) + A(3 * kCubic) * square);
  }

 private:
  static constexpr double kLinear = 1.59576912160573071176;  // 2 √(2/π)
  static constexpr double kCubic = 0.044715 * kLinear;
  template <class V>
  static V argument(V x, V square) {
    using A = lane_t<V>;
    return x * (A(kLinear) + A(kCubic) * square);
  }
};

struct Silu {
  template <class V>
  static V value(V x) {
    return x * sigmoid(x);
  }
  template <class V>
  static Both<V> both(V x) {
    return gated(x, x, V{} + 1);
  }
};

// --- Rows ---

// [a | b] -> a f(b)
template <class F, class T>
void glu_row(T* y, const T* a, const T* b, int64_t D) {
  for_vectors<acc_t<T>>(D, [=](int64_t i, auto count) DFM_INLINE {
    __builtin_prefetch(reinterpret_cast<const char*>(a + i) + kAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(b + i) + kAhead);
    store(y + i, load(a + i, count) * F::value(load(b + i, count)), count);
  });
}

template <class F, class T>
void glu_backward_row(T* da, T* db, const T* dy, const T* a, const T* b, int64_t D) {
  for_vectors<acc_t<T>>(D, [=](int64_t i, auto count) DFM_INLINE {
    auto g = load(dy + i, count);
    auto [value, slope] = F::both(load(b + i, count));
    store(da + i, g * value, count);
    store(db + i, g * load(a + i, count) * slope, count);
  });
}

template <bool biased, class T, class Count>
DFM_INLINE inline auto load_sum(const T* x, const T* bias, int64_t i, Count count) {
  auto v = load(x + i, count);
  if constexpr (biased) v += load(bias + i, count);
  return v;
}

template <bool biased, class F, class T>
void activate_row(T* y, const T* x, const T* bias, int64_t D) {
  for_vectors<acc_t<T>>(D, [=](int64_t i, auto count) DFM_INLINE {
    store(y + i, F::value(load_sum<biased>(x, bias, i, count)), count);
  });
}

// Sums over rows are in double: what many rows add up to is then rounded once.
template <class A>
using Sum = Vec<double, kLanes<A> * sizeof(double)>;

// sum += dx; sum has whole vectors.
template <bool biased, bool summed, class F, class T>
void activate_backward_row(T* dx, double* sum, const T* dy, const T* x, const T* bias, int64_t D) {
  using A = acc_t<T>;
  for_vectors<A>(D, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> v = load(dy + i, count) * F::both(load_sum<biased>(x, bias, i, count)).slope;
    store(dx + i, v, count);
    if constexpr (summed) {
      Sum<A> total;
      std::memcpy(&total, sum + i, sizeof total);
      total += __builtin_convertvector(v, Sum<A>);
      std::memcpy(sum + i, &total, sizeof total);
    }
  });
}

// --- Tensors ---

// [..., D] as rows at one stride.
struct Rows {
  int64_t count, size, stride;
};

Rows rows_of(const char* op, const char* argument, const Tensor& x) {
  int64_t n = x.dim(), size = x.size(-1), count = 1;
  for (int64_t i = 0; i + 1 < n; ++i) count *= x.size(i);
  if (x.is_contiguous()) return {count, size, size};
  bool even = x.stride(-1) == 1;
  for (int64_t i = 0; i + 2 < n; ++i) even = even && x.stride(i) == x.stride(i + 1) * x.size(i + 1);
  TORCH_CHECK(even, op, ": expected ", argument, " with rows at one stride, got sizes ", x.sizes(),
              " with strides ", x.strides());
  return {count, size, x.stride(-2)};
}

// Rows of a task.
int64_t grain(int64_t size) { return kGrain / (size + 1) + 1; }

// f(Gelu{}) or another.
template <class F>
void with_activation(const char* op, std::string_view name, F f) {
  if (name == "gelu") return f(Gelu{});
  if (name == "gelu_tanh") return f(GeluTanh{});
  TORCH_CHECK(name == "silu", op, ": expected activation gelu, gelu_tanh or silu, got ", name);
  f(Silu{});
}

Tensor glu_cpu(const Tensor& x, std::string_view activation) {
  Rows in = rows_of("glu", "x", x);
  auto sizes = x.sizes().vec();
  int64_t D = sizes.back() /= 2;
  Tensor y = at::empty(sizes, x.options());
  dispatch(x.scalar_type(), "glu", [&](auto t) {
    using T = decltype(t);
    with_activation("glu", activation, [&](auto f) {
      const T* from = data<T>(x);
      T* to = mutable_data<T>(y);
      at::parallel_for(0, in.count, grain(D), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          glu_row<decltype(f)>(to + r * D, from + r * in.stride, from + r * in.stride + D, D);
      });
    });
  });
  return y;
}

Tensor glu_backward_cpu(const Tensor& dy, const Tensor& x, std::string_view activation) {
  Rows in = rows_of("glu_backward", "x", x), grad = rows_of("glu_backward", "dy", dy);
  int64_t D = in.size / 2;
  Tensor dx = at::empty(x.sizes(), x.options());
  dispatch(x.scalar_type(), "glu_backward", [&](auto t) {
    using T = decltype(t);
    with_activation("glu_backward", activation, [&](auto f) {
      const T *from = data<T>(x), *dy_ = data<T>(dy);
      T* to = mutable_data<T>(dx);
      at::parallel_for(0, in.count, grain(2 * D), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          T* da = to + 2 * r * D;
          const T* a = from + r * in.stride;
          glu_backward_row<decltype(f)>(da, da + D, dy_ + r * grad.stride, a, a + D, D);
        }
      });
    });
  });
  return dx;
}

// f(integral_constant<bool>) for a condition.
template <class F>
void with_bool(bool value, F f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x) {
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == x.size(-1) &&
                        bias->scalar_type() == x.scalar_type()),
              op, ": expected bias [", x.size(-1), "] of ", x.scalar_type(), ", got ",
              bias->sizes(), " of ", bias->scalar_type());
}

Tensor gelu_tanh_cpu(const Tensor& x, const std::optional<Tensor>& bias_) {
  check_bias("gelu_tanh", bias_, x);
  Rows in = rows_of("gelu_tanh", "x", x);
  Tensor y = at::empty(x.sizes(), x.options()), bias = bias_ ? bias_->contiguous() : Tensor();
  dispatch(x.scalar_type(), "gelu_tanh", [&](auto t) {
    using T = decltype(t);
    const T *from = data<T>(x), *b = bias_ ? data<T>(bias) : nullptr;
    T* to = mutable_data<T>(y);
    with_bool(b, [&](auto biased) {
      at::parallel_for(0, in.count, grain(in.size), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          activate_row<biased, GeluTanh>(to + r * in.size, from + r * in.stride, b, in.size);
      });
    });
  });
  return y;
}

// sum = the partial sums of all blocks [blocks, stride], in their order.
template <class T>
void add_blocks(T* sum, const double* partial, int64_t blocks, int64_t D, int64_t stride) {
  using A = acc_t<T>;
  at::parallel_for(0, stride / kLanes<A>, grain(blocks * kLanes<A>),
                   [&](int64_t begin, int64_t end) {
                     int64_t first = begin * kLanes<A>, last = std::min(end * kLanes<A>, D);
                     for_vectors<A>(last - first, [&](int64_t i, auto count) DFM_INLINE {
                       Sum<A> total{}, part;
                       for (int64_t b = 0; b < blocks; ++b) {
                         std::memcpy(&part, partial + b * stride + first + i, sizeof part);
                         total += part;
                       }
                       store(sum + first + i, __builtin_convertvector(total, Vec<A>), count);
                     });
                   });
}

std::tuple<Tensor, Tensor> gelu_tanh_backward_cpu(const Tensor& dy, const Tensor& x,
                                                  const std::optional<Tensor>& bias_,
                                                  bool need_dbias) {
  const char* op = "gelu_tanh_backward";
  check_bias(op, bias_, x);
  Rows in = rows_of(op, "x", x), grad = rows_of(op, "dy", dy);
  int64_t D = in.size, blocks = (in.count + kBlock - 1) / kBlock;
  Tensor bias = bias_ ? bias_->contiguous() : Tensor();
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dbias = at::empty({need_dbias ? D : 0}, x.options());
  int64_t stride = (D + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
  Tensor partial = at::empty({need_dbias ? blocks : 0, stride}, x.options().dtype(at::kDouble));
  dispatch(x.scalar_type(), op, [&](auto t) {
    using T = decltype(t);
    const T *from = data<T>(x), *b = bias_ ? data<T>(bias) : nullptr, *dy_ = data<T>(dy);
    T* to = mutable_data<T>(dx);
    double* sums = mutable_data<double>(partial);
    with_bool(b, [&](auto biased) {
      with_bool(need_dbias, [&](auto summed) {
        auto block = [&](int64_t k) {
          double* sum = summed ? sums + k * stride : nullptr;
          if (summed) std::fill(sum, sum + stride, 0.0);
          for (int64_t r = k * kBlock; r < std::min((k + 1) * kBlock, in.count); ++r)
            activate_backward_row<biased, summed, GeluTanh>(to + r * D, sum, dy_ + r * grad.stride,
                                                            from + r * in.stride, b, D);
        };
        at::parallel_for(0, blocks, grain(kBlock * D), [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) block(k);
        });
      });
    });
    if (need_dbias) add_blocks(mutable_data<T>(dbias), sums, blocks, D, stride);
  });
  return {dx, dbias};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("glu", glu_cpu);
  m.impl("glu_backward", glu_backward_cpu);
  m.impl("gelu_tanh", gelu_tanh_cpu);
  m.impl("gelu_tanh_backward", gelu_tanh_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
