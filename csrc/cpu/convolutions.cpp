// CPU operators of the family `convolutions`; the definition is dfm_fast/ops/convolutions.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "convolution_gradients.h"

namespace dfm_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// --- channels_last ---

// Where rows of x lie: straight from the map.
template <int K, int S, class T, class To>
void forward_direct(const Sizes& s, const T* x, const Weights<acc_t<T>>& weights, To* y) {
  using A = acc_t<T>;
  const Window& g = s.window;
  const int64_t C = s.channels, bands = (g.out_height + kRows - 1) / kRows;
  // Large maps of float gain a fifth by it (256 channels at 64²); smaller ones and bf16 lose some.
  const int64_t map = s.samples * s.in_pixels() * C * sizeof(T);
  const int64_t ahead = sizeof(T) == 4 && map > (4 << 20) ? g.width * C : 0;
  parallel(s.samples * bands, kRows * g.out_width * C, [&](int64_t i) {
    const int64_t n = i / bands, first = i % bands * kRows;
    const T* sample = x + n * s.in_pixels() * C;
    auto row_of = [&](int64_t row) { return sample + row * g.width * C; };
    const Rows<To> to = {y + (n * g.out_height + first) * g.out_width * C, g.out_width * C, C};
    convolve_band<K, S, A>(g, first, std::min(first + kRows, g.out_height), row_of, C, C, weights,
                           to, ahead);
  });
}

template <int K, int S, class T>
void forward_norm(const Sizes& s, const Input<T>& in, const Weights<acc_t<T>>& weights, T* y) {
  using A = acc_t<T>;
  const Window& g = s.window;
  const int64_t C = s.channels;
  const int64_t block = ring_channels<A>(ring_size<K, S>(g, 1), C);
  parallel_bands<A>(
      s, block, ring_size<K, S>(g, block),
      [&](int64_t n, int64_t first, int64_t end, int64_t c, int64_t channels, A* scratch) {
        const Rows<T> to = {y + (n * g.out_height + first) * g.out_width * C + c, g.out_width * C,
                            C};
        norm_silu_convolve_band<K, S>(g, first, end, in.x + n * s.in_pixels() * C + c, C,
                                      in.norms->of(n, c), channels, weights.from(c), to, scratch);
      });
}

// x's rows and columns are those of even number of the window.
template <int K, class T, class To>
void forward_spread(const Sizes& s, const T* x, const Weights<acc_t<T>>& weights, To* y) {
  using A = acc_t<T>;
  const Window& g = s.window;
  const int64_t C = s.channels, rows = (g.height + 1) / 2, cols = (g.width + 1) / 2;
  const int64_t block = ring_channels<A>(ring_size<K, 1>(g, 1), C);
  parallel_bands<A>(
      s, block, ring_size<K, 1>(g, block),
      [&](int64_t n, int64_t first, int64_t end, int64_t c, int64_t channels, A* scratch) {
        const T* sample = x + n * rows * cols * C + c;
        auto fill = [&](int64_t i, A* row) {
          std::fill(row, row + g.width * channels, A(0));
          for (int64_t j = 0; i % 2 == 0 && j < cols; ++j)
            convert_row(row + 2 * j * channels, sample + (i / 2 * cols + j) * C, channels);
        };
        Ring ring{scratch, kRows - 1 + K, g.width * channels, std::max<int64_t>(first - g.pad_h, 0),
                  fill};
        const Rows<To> to = {y + (n * g.out_height + first) * g.out_width * C + c, g.out_width * C,
                             C};
        convolve_band<K, 1, A>(g, first, end, ring, channels, channels, weights.from(c), to);
      });
}

// --- contiguous ---

// Straight from the map.
template <class T, class To>
void forward_map(const Sizes& s, const T* x, const acc_t<T>* weight, const acc_t<T>* bias,
                 bool turned, To* y) {
  using A = acc_t<T>;
  constexpr int rows_in = kPlaneRows + 2;
  const Window& g = s.window;
  const int64_t W = g.width, planes = s.samples * s.channels;
  const int64_t bands =
      planes < 4 * at::get_num_threads() ? parts(g.out_height, 4 * kPlaneRows, 16) : 1;
  const int64_t band =
      ((g.out_height + bands - 1) / bands + kPlaneRows - 1) / kPlaneRows * kPlaneRows;
  const std::vector<T> zeros(W + kLanes<A>);
  parallel(planes * bands, band * W, [&](int64_t i) {
    const int64_t plane = i / bands, c = plane % s.channels, start = i % bands * band;
    const T* from = x + plane * s.in_pixels();
    A taps[9];
    for (int t = 0; t < 9; ++t) taps[t] = weight[c * 9 + (turned ? 8 - t : t)];
    const A b = bias ? bias[c] : A(0);
    for (int64_t out = start; out < std::min(start + band, g.out_height); out += kPlaneRows) {
      const int rows = static_cast<int>(std::min<int64_t>(g.out_height - out, kPlaneRows));
      const T* row[rows_in];
      for (int r = 0; r < rows_in; ++r) {
        const int64_t in = out - g.pad_h + r;
        row[r] = in >= 0 && in < g.height ? from + in * W : zeros.data();
      }
      // The next plane, while this one is convolved: there is nothing else to wait for it behind.
      const T* soon = from + s.in_pixels() + out * W;
      for (int64_t j = 0; j < kPlaneRows * W; j += 64 / sizeof(T))
        __builtin_prefetch(soon + j, 0, 2);
      To* to = y + (plane * g.out_height + out) * W;
      rows == kPlaneRows ? convolve_map_rows<true>(W, row, taps, b, to, rows)
                         : convolve_map_rows<false>(W, row, taps, b, to, rows);
    }
  });
}

template <int K, int S, class T, class To>
void forward_planes(const Sizes& s, const Input<T>& in, const acc_t<T>* weight,
                    const acc_t<T>* bias, bool turned, To* y) {
  using A = acc_t<T>;
  const Window& g = s.window;
  if constexpr (K == 3 && S == 1 && kVectorBytes == 64)
    if (!in.norms && !in.spread && g.pad_w == 1)
      return forward_map(s, in.x, weight, bias, turned, y);
  parallel_planes(s, in, [&](int64_t plane, int64_t first, int64_t end, const auto& padded) {
    constexpr int rows_in = (kPlaneRows - 1) * S + K;
    const int64_t c = plane % s.channels;
    A taps[K * K];
    for (int t = 0; t < K * K; ++t) taps[t] = weight[c * K * K + (turned ? K * K - 1 - t : t)];
    for (int64_t out = first; out < end; out += kPlaneRows) {
      const int rows = static_cast<int>(std::min<int64_t>(end - out, kPlaneRows));
      const A* row[rows_in];
      for (int i = 0; i < rows_in; ++i) {
        const bool wanted = i < (rows - 1) * S + K;
        row[i] = wanted ? padded(out * S - g.pad_h + i) : padded.zeros;
      }
      To* to = y + (plane * g.out_height + out) * g.out_width;
      const A b = bias ? bias[c] : A(0);
      rows == kPlaneRows ? convolve_plane_rows<K, S, true>(g, row, taps, b, to, rows)
                         : convolve_plane_rows<K, S, false>(g, row, taps, b, to, rows);
    }
  });
}

// --- Any of them ---

// f(integral_constant K, integral_constant S)
template <class F>
void with_kernel(int kernel, int stride, const F& f) {
  auto with_stride = [&](auto k) {
    stride == 1 ? f(k, std::integral_constant<int, 1>{}) : f(k, std::integral_constant<int, 2>{});
  };
  if (kernel == 3) return with_stride(std::integral_constant<int, 3>{});
  if (kernel == 5) return with_stride(std::integral_constant<int, 5>{});
  with_stride(std::integral_constant<int, 7>{});
}

template <class T, class To>
void convolve(const Sizes& s, const Input<T>& in, const acc_t<T>* weight, const acc_t<T>* bias,
              bool turned, To* y) {
  using A = acc_t<T>;
  if (!s.last)
    return with_kernel(s.kernel, s.stride, [&](auto k, auto stride) {
      forward_planes<k, stride>(s, in, weight, bias, turned, y);
    });
  const PackedWeights<A> weights(weight, bias, s.channels, s.kernel, turned);
  with_kernel(s.kernel, s.stride, [&](auto k, auto stride) {
    if constexpr (std::is_same_v<T, To>)
      if (in.norms) return forward_norm<k, stride>(s, in, weights, y);
    if (!in.spread) return forward_direct<k, stride>(s, in.x, weights, y);
    if constexpr (stride == 1) forward_spread<k>(s, in.x, weights, y);
  });
}

template <class T>
void gradient(const Sizes& s, const Input<T>& in, const T* dy, acc_t<T>* dweight, acc_t<T>* dbias) {
  with_kernel(s.kernel, s.stride, [&](auto k, auto stride) {
    s.last ? gradient_last<k, stride>(s, in, dy, dweight, dbias)
           : gradient_planes<k, stride>(s, in, dy, dweight, dbias);
  });
}

// --- Operators ---

struct Norm {
  const MaybeTensor &mean, &m2, &weight, &bias, &shift;
  int64_t groups;
  double eps;
};

// In the arithmetic type, kept alive by whoever holds it.
Tensor widened(const MaybeTensor& v, const Tensor& x) {
  return v ? v->to(accumulation(x)).contiguous() : Tensor();
}
template <class A>
const A* maybe(const Tensor& v) {
  return v.defined() ? data<A>(v) : nullptr;
}

// Sizes of the forward pass.
Sizes check(const char* op, const Tensor& x, const Tensor& weight, const Norm& norm, int64_t stride,
            at::IntArrayRef padding) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(layout_of(x)), op,
              ": expected a contiguous or channels_last x [N, C, H, W], got ", x.sizes(),
              " with strides ", x.strides());
  const int64_t k = weight.size(-1);
  TORCH_CHECK(
      weight.sizes() == at::IntArrayRef({x.size(1), 1, k, k}) && (k == 3 || k == 5 || k == 7), op,
      ": expected weight [C, 1, k, k], got ", weight.sizes());
  TORCH_CHECK((stride == 1 || stride == 2) && padding.size() == 2 && padding[0] >= 0 &&
                  padding[1] >= 0 && padding[0] < k && padding[1] < k,
              op, ": expected stride 1 or 2 and padding less than ", k);
  const int64_t h = x.size(2), w = x.size(3), p = padding[0], q = padding[1];
  TORCH_CHECK(h + 2 * p >= k && w + 2 * q >= k, op, ": expected a map of ", k, " or more");
  if (norm.mean) {
    const at::IntArrayRef maps = x.sizes().slice(0, 2), channels = x.sizes().slice(1, 1);
    TORCH_CHECK(norm.m2 && norm.mean->sizes() == maps && norm.m2->sizes() == maps &&
                    norm.groups > 0 && x.size(1) % norm.groups == 0,
                op, ": expected statistics [N, C] of ", norm.groups, " groups");
    for (const MaybeTensor* v : {&norm.mean, &norm.m2})
      TORCH_CHECK((*v)->scalar_type() == accumulation(x), op, ": expected ", accumulation(x));
    for (const MaybeTensor* v : {&norm.weight, &norm.bias})
      TORCH_CHECK(!*v || (*v)->sizes() == channels, op, ": expected a norm of ", channels);
    TORCH_CHECK(!norm.shift || norm.shift->sizes() == maps, op, ": expected a shift of ", maps);
  }
  const int64_t out_h = (h + 2 * p - k) / stride + 1, out_w = (w + 2 * q - k) / stride + 1;
  return {x.size(0), x.size(1),   {h, w, out_h, out_w, p, q},
          int(k),    int(stride), layout_of(x) != at::MemoryFormat::Contiguous};
}

// f(storage type's Input of x)
template <class F>
void with_input(const char* op, const Tensor& x, const Norm& norm, const F& f) {
  const Tensor weight = widened(norm.weight, x), bias = widened(norm.bias, x);
  const Tensor shift = widened(norm.shift, x);
  const Tensor mean = norm.mean ? norm.mean->contiguous() : Tensor();
  const Tensor m2 = norm.m2 ? norm.m2->contiguous() : Tensor();
  dispatch(x.scalar_type(), op, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    Input<T> in{data<T>(x)};
    if (!norm.mean) return f(in);
    const NormParameters<A> given = {maybe<A>(weight), maybe<A>(bias), maybe<A>(shift)};
    const Affines<A> norms(Map(x, norm.groups), data<A>(mean), data<A>(m2), given, norm.eps);
    in.norms = &norms;
    f(in);
  });
}

Tensor depthwise_conv2d_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                            const MaybeTensor& mean, const MaybeTensor& m2,
                            const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                            const MaybeTensor& shift, int64_t num_groups, double eps,
                            int64_t stride, at::IntArrayRef padding) {
  const char* op = "depthwise_conv2d";
  const Norm norm = {mean, m2, norm_weight, norm_bias, shift, num_groups, eps};
  const Sizes s = check(op, x, weight, norm, stride, padding);
  TORCH_CHECK(!bias || bias->sizes() == x.sizes().slice(1, 1), op, ": expected bias [C]");
  Tensor y = at::empty({s.samples, s.channels, s.window.out_height, s.window.out_width},
                       x.options(), layout_of(x));
  const Tensor w = widened(weight, x), b = widened(bias, x);
  with_input(op, x, norm, [&](const auto& in) {
    using T = std::remove_const_t<std::remove_reference_t<decltype(*in.x)>>;
    using A = acc_t<T>;
    convolve(s, in, data<A>(w), maybe<A>(b), false, mutable_data<T>(y));
  });
  return y;
}

// The window in which dy is convolved with the weights turned around.
Sizes turned(const Sizes& s) {
  const Window& g = s.window;
  const int64_t k = s.kernel - 1, h = (g.out_height - 1) * s.stride + 1;
  const int64_t w = (g.out_width - 1) * s.stride + 1;
  return {s.samples, s.channels, {h, w, g.height, g.width, k - g.pad_h, k - g.pad_w},
          s.kernel,  1,          s.last};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
    const MaybeTensor& m2, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
    const MaybeTensor& shift, int64_t num_groups, double eps, int64_t stride,
    at::IntArrayRef padding, bool need_du, bool need_dweight) {
  const char* op = "depthwise_conv2d_backward";
  const Norm norm = {mean, m2, norm_weight, norm_bias, shift, num_groups, eps};
  const Sizes s = check(op, x, weight, norm, stride, padding);
  const int64_t sizes[] = {s.samples, s.channels, s.window.out_height, s.window.out_width};
  TORCH_CHECK(dy.sizes() == at::IntArrayRef(sizes) && dy.scalar_type() == x.scalar_type() &&
                  dy.is_contiguous(layout_of(x)),
              op, ": expected dy like y, got ", dy.sizes(), " with strides ", dy.strides());
  const auto wide = x.options().dtype(accumulation(x));
  const auto options = norm.mean ? wide : x.options();  // rounded once, by the norm's backward
  Tensor du = need_du ? at::empty(x.sizes(), options, layout_of(x)) : at::empty({0}, options);
  Tensor dweight = need_dweight ? at::empty(weight.sizes(), wide) : at::empty({0}, wide);
  Tensor dbias = need_dweight ? at::empty({s.channels}, wide) : at::empty({0}, wide);
  const Tensor w = widened(weight, x);
  with_input(op, x, norm, [&](const auto& in) {
    using T = std::remove_const_t<std::remove_reference_t<decltype(*in.x)>>;
    using A = acc_t<T>;
    if (need_du) {
      const Input<T> from{data<T>(dy), nullptr, stride == 2};
      const A* none = nullptr;
      norm.mean ? convolve(turned(s), from, data<A>(w), none, true, mutable_data<A>(du))
                : convolve(turned(s), from, data<A>(w), none, true, mutable_data<T>(du));
    }
    if (need_dweight)
      gradient<T>(s, in, data<T>(dy), mutable_data<A>(dweight), mutable_data<A>(dbias));
  });
  return {du, dweight, dbias};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("depthwise_conv2d", depthwise_conv2d_cpu);
  m.impl("depthwise_conv2d_backward", depthwise_conv2d_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
