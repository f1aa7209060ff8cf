// CPU operators of the family `convolutions`; the definition is dfm_fast/ops/convolutions.py.
#include "convolutions.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace dfm_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kRingBytes = 1 << 16;   // of a thread's ring of activated rows
constexpr int64_t kPlaneBytes = 1 << 15;  // of a thread's padded rows of a plane
constexpr int64_t kCached = 1 << 21;      // a map that need not be asked for ahead

// A map and what is done to it on the way into the convolution.
template <class T>
struct Input {
  using A = acc_t<T>;
  const T* x;  // [N, C, H, W], or [N, H, W, C]
  const Affines<A>* norms = nullptr;
  bool spread = false;  // zeros between all pixels: the gradient of a convolution of stride 2
};

struct Sizes {
  int64_t samples, channels;
  Window window;
  int kernel, stride;
  bool last;

  int64_t in_pixels() const { return window.height * window.width; }
  int64_t out_pixels() const { return window.out_height * window.out_width; }
};

// Number of parts of `least` or more that n is cut into, at most `most`.
int64_t parts(int64_t n, int64_t least, int64_t most) {
  return std::max<int64_t>(1, std::min(most, n / std::max<int64_t>(least, 1)));
}

// --- channels_last ---

// Where rows of x lie: straight from the map.
template <int K, int S, class T>
void forward_direct(const Sizes& s, const T* x, const Weights<acc_t<T>>& weights, T* y) {
  using A = acc_t<T>;
  const Window& g = s.window;
  const int64_t C = s.channels, bands = (g.out_height + kRows - 1) / kRows;
  const int64_t bytes = s.samples * s.in_pixels() * C * sizeof(T);
  const int64_t ahead = bytes > kCached ? g.width * C : 0;
  parallel(s.samples * bands, kRows * g.out_width * C, [&](int64_t i) {
    const int64_t n = i / bands, first = i % bands * kRows;
    const T* sample = x + n * s.in_pixels() * C;
    auto row_of = [&](int64_t row) { return sample + row * g.width * C; };
    const Rows<T> to = {y + (n * g.out_height + first) * g.out_width * C, g.out_width * C, C};
    convolve_band<K, S, A>(g, first, std::min(first + kRows, g.out_height), row_of, C, ahead, C,
                           weights, to);
  });
}

// Channels of a ring whose rows are that long: whole lines.
template <class A>
int64_t ring_channels(int64_t pixels, int64_t channels) {
  const int64_t fit = kRingBytes / (sizeof(A) * std::max<int64_t>(pixels, 1));
  return std::min(channels, std::max<int64_t>(fit / 32 * 32, 32));
}

// f(n, first row, end, first channel, channels, scratch) for bands of rows and blocks of channels:
// as many bands as keep all threads busy, as rows at their borders are computed twice.
template <class A, class F>
void parallel_bands(const Sizes& s, int64_t block, int64_t scratch, F f) {
  const int64_t rows = s.window.out_height, blocks = (s.channels + block - 1) / block;
  const int64_t wanted = 4 * at::get_num_threads(), have = s.samples * blocks;
  const int64_t bands = have ? parts(rows, 4 * kRows, (wanted + have - 1) / have) : 1;
  const int64_t band = ((rows + bands - 1) / bands + kRows - 1) / kRows * kRows;
  const int64_t work = band * s.window.out_width * block;
  at::parallel_for(0, have * bands, std::max<int64_t>(1, kTask / std::max<int64_t>(work, 1)),
                   [&](int64_t begin, int64_t end) {
                     Scratch<A> memory(scratch);
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t c = i % blocks * block, first = i / blocks % bands * band;
                       const int64_t last = std::min(first + band, rows);
                       if (first < last)
                         f(i / blocks / bands, first, last, c, std::min(block, s.channels - c),
                           memory.data());
                     }
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
template <int K, class T>
void forward_spread(const Sizes& s, const T* x, const Weights<acc_t<T>>& weights, T* y) {
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
        const Rows<T> to = {y + (n * g.out_height + first) * g.out_width * C + c, g.out_width * C,
                            C};
        convolve_band<K, 1, A>(g, first, end, ring, channels, 0, channels, weights.from(c), to);
      });
}

// --- contiguous ---

// Row i of the window of a plane, with zeros left where it has them.
template <class T>
void pad_row(const Sizes& s, const Input<T>& in, int64_t plane, int64_t i, acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t W = s.window.width;
  if (in.spread) {
    const int64_t rows = (s.window.height + 1) / 2, cols = (W + 1) / 2;
    const T* from = in.x + (plane * rows + i / 2) * cols;
    for (int64_t j = 0; j < cols; ++j) to[2 * j] = i % 2 ? A(0) : load_one(from + j);
    return;
  }
  const T* from = in.x + (plane * s.window.height + i) * W;
  // The next plane, while this one is convolved: there is nothing else to wait for it behind.
  for (int64_t j = 0; j < W; j += 64 / sizeof(T))
    __builtin_prefetch(from + s.in_pixels() + j, 0, 2);
  if (!in.norms) return convert_row(to, from, W);
  const Affine<A> norm = in.norms->of(0, plane);
  const Vec<A> scale = Vec<A>{} + *norm.scale, offset = Vec<A>{} + *norm.offset;
  const A centre = *norm.centre;
  for_vectors<A>(W, [=](int64_t j, auto count) DFM_INLINE {
    store(to + j, silu((load(from + j, count) - centre) * scale + offset), count);
  });
}

// Padded rows of a plane in scratch, from `first` on; outside of the map they are zeros.
template <class A>
struct PaddedRows {
  const A* zeros;
  A* rows;
  int64_t first, size, height;

  const A* operator()(int64_t i) const {
    return i >= 0 && i < height ? rows + (i - first) * size : zeros;
  }
};

// f(plane, first row of output, end, PaddedRows) for all planes, in blocks whose padded rows fit in
// the first-level cache. The rows that two blocks share move up.
template <bool split = true, class T, class F>
void parallel_planes(const Sizes& s, const Input<T>& in, F f) {
  using A = acc_t<T>;
  const Window& g = s.window;
  const int64_t size = padded_row<A>(g, s.kernel, s.stride), seen = s.kernel - s.stride;
  const int64_t fit = (kPlaneBytes / static_cast<int64_t>(sizeof(A)) / size - seen) / s.stride;
  const int64_t block = std::min(std::max(fit / kPlaneRows, int64_t(1)) * kPlaneRows,
                                 (g.out_height + kPlaneRows - 1) / kPlaneRows * kPlaneRows);
  // Threads that have fewer planes than that take parts of one, where nothing is summed.
  const int64_t planes = s.samples * s.channels, blocks = (g.out_height + block - 1) / block;
  const int64_t bands = split && planes < 4 * at::get_num_threads() ? parts(blocks, 1, 16) : 1;
  const int64_t band = (blocks + bands - 1) / bands * block;
  const int64_t rows = block * s.stride + std::max<int64_t>(seen, 0);
  at::parallel_for(
      0, planes * bands, std::max<int64_t>(1, kTask / std::max<int64_t>(s.out_pixels(), 1)),
      [&](int64_t begin, int64_t end) {
        Scratch<A> memory((rows + 1) * size);
        A* scratch = memory.data() + size;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t plane = i / bands, start = i % bands * band;
          const int64_t stop = std::min(start + band, g.out_height);
          int64_t have = 0;  // rows before this one are there
          for (int64_t first = start; first < stop; first += block) {
            const int64_t last = std::min(first + block, stop);
            const int64_t from = first * s.stride - g.pad_h;
            const int64_t until = (last - 1) * s.stride - g.pad_h + s.kernel;
            const int64_t kept = std::max<int64_t>(from, 0), moved = block * s.stride;
            int64_t next = first > start ? std::max(have, kept) : kept;
            for (int64_t row = kept; first > start && row < have; ++row)
              std::copy_n(scratch + (row - from + moved) * size, size,
                          scratch + (row - from) * size);
            for (; next < std::min(until, g.height); ++next)
              pad_row(s, in, plane, next, scratch + (next - from) * size + g.pad_w);
            have = next;
            f(plane, first, last, PaddedRows<A>{memory.data(), scratch, from, size, g.height});
          }
        }
      });
}

template <int K, int S, class T>
void forward_planes(const Sizes& s, const Input<T>& in, const acc_t<T>* weight,
                    const acc_t<T>* bias, bool turned, T* y) {
  using A = acc_t<T>;
  const Window& g = s.window;
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
      T* to = y + (plane * g.out_height + out) * g.out_width;
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

template <class T>
void convolve(const Sizes& s, const Input<T>& in, const acc_t<T>* weight, const acc_t<T>* bias,
              bool turned, T* y) {
  using A = acc_t<T>;
  if (!s.last)
    return with_kernel(s.kernel, s.stride, [&](auto k, auto stride) {
      forward_planes<k, stride>(s, in, weight, bias, turned, y);
    });
  const PackedWeights<A> weights(weight, bias, s.channels, s.kernel, turned);
  with_kernel(s.kernel, s.stride, [&](auto k, auto stride) {
    if (in.norms) return forward_norm<k, stride>(s, in, weights, y);
    if (!in.spread) return forward_direct<k, stride, T>(s, in.x, weights, y);
    if constexpr (stride == 1) forward_spread<k, T>(s, in.x, weights, y);
  });
}

// --- Gradients of weight and bias ---

// Sums of products and of dy, [parts, K K + 1, padded channels] in double, that are added in order.
struct Partials {
  int64_t parts, taps, stride;
  std::vector<double> sums;

  Partials(int64_t parts, int kernel, int64_t channels)
      : parts(parts),
        taps(kernel * kernel + 1),
        stride((channels + 15) / 16 * 16),
        sums(parts * taps * stride) {}
  double* at(int64_t part, int64_t tap, int64_t c) {
    return &sums[(part * taps + tap) * stride + c];
  }
  template <class A>
  void total(int64_t channels, A* dweight, A* dbias) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += *at(part, t, c);
        (t == taps - 1 ? dbias[c] : dweight[c * (taps - 1) + t]) = sum;
      }
  }
};

template <class A>
DFM_INLINE inline void add_lanes(double* to, Vec<A> v, int64_t stride = 1) {
  for (int i = 0; i < kLanes<A>; ++i) to[i * stride] += v[i];
}

// One row of dy and the K rows of u that it saw, null outside, for one vector of channels: taps
// [a, a + most) of all columns, and the bias with the first.
template <int K, int S, int most, class From, class T, class Count>
DFM_INLINE inline void row_products(const Window& g, const From* const* row, int64_t pixel,
                                    const T* dy, int64_t dy_pixel, int a, double* to,
                                    int64_t to_stride, Count count) {
  using A = acc_t<T>;
  Vec<A> sum[most][K] = {}, bias = {};
  for (int64_t at = 0; at < g.out_width; at += kPixels) {
    constexpr int cols_in = (kPixels - 1) * S + K;
    const int64_t col = at * S - g.pad_w;
    Vec<A> d[kPixels];
    unrolled<kPixels>([&](auto p) DFM_INLINE {
      d[p] = at + p < g.out_width ? load(dy + (at + p) * dy_pixel, count) : Vec<A>{};
      bias += d[p];
    });
    unrolled<most>([&](auto i) DFM_INLINE {
      if (!row[a + i]) return;
      Vec<A> x[cols_in];
      unrolled<cols_in>([&](auto j) DFM_INLINE {
        const bool outside = static_cast<uint64_t>(col + j) >= static_cast<uint64_t>(g.width);
        x[j] = outside ? Vec<A>{} : load(row[a + i] + (col + j) * pixel, count);
      });
      unrolled<K>([&](auto b) DFM_INLINE {
        unrolled<kPixels>([&](auto p) DFM_INLINE { sum[i][b] += d[p] * x[p * S + b]; });
      });
    });
  }
  for (int i = 0; i < most; ++i)
    for (int b = 0; b < K; ++b) add_lanes<A>(to + ((a + i) * K + b) * to_stride, sum[i][b]);
  if (a == 0) add_lanes<A>(to + K * K * to_stride, bias);
}

// Samples and bands of rows are parts; channels are independent of one another.
template <int K, int S, class T>
void gradient_last(const Sizes& s, const Input<T>& in, const T* dy, acc_t<T>* dweight,
                   acc_t<T>* dbias) {
  using A = acc_t<T>;
  constexpr int most = K == 3 ? K : 1;
  const Window& g = s.window;
  const int64_t C = s.channels, block = ring_channels<A>(K * g.width, C);
  const int64_t blocks = (C + block - 1) / block;
  const int64_t bands = parts(g.out_height * g.out_width, 1 << 12, 16);
  const int64_t band = (g.out_height + bands - 1) / bands;
  Partials partials(s.samples * bands, K, C);
  auto run = [&](int64_t i, A* scratch) {
    const int64_t c = i % blocks * block, part = i / blocks, n = part / bands;
    const int64_t first = part % bands * band, end = std::min(first + band, g.out_height);
    const int64_t channels = std::min(block, C - c);
    const T* sample = in.x + n * s.in_pixels() * C + c;
    auto rows = [&](auto row_of, int64_t pixel) {
      for (int64_t out = first; out < end; ++out) {
        std::remove_pointer_t<decltype(row_of(0))>* row[K];
        for (int a = 0; a < K; ++a) {
          const int64_t at = out * S - g.pad_h + a;
          row[a] = at >= 0 && at < g.height ? row_of(at) : nullptr;
        }
        const T* d = dy + (n * g.out_height + out) * g.out_width * C + c;
        for_vectors<A>(channels, [&](int64_t v, auto count) DFM_INLINE {
          std::remove_pointer_t<decltype(row_of(0))>* here[K];
          for (int a = 0; a < K; ++a) here[a] = row[a] ? row[a] + v : nullptr;
          for (int a = 0; a < K; a += most)
            row_products<K, S, most>(g, here, pixel, d + v, C, a, partials.at(part, 0, c + v),
                                     partials.stride, count);
        });
      }
    };
    if (!in.norms)
      return rows([&](int64_t row) -> const T* { return sample + row * g.width * C; }, C);
    const Affine<A> norm = in.norms->of(n, c);
    const int64_t start = std::max<int64_t>(first * S - g.pad_h, 0);
    Ring ring{scratch, K, g.width * channels, start, [&](int64_t row, A* to) {
                norm_silu_pixels(sample + row * g.width * C, C, g.width, norm, channels, to,
                                 channels);
              }};
    rows(ring, channels);
  };
  const int64_t work = band * g.out_width * block;
  at::parallel_for(0, partials.parts * blocks,
                   std::max<int64_t>(1, kTask / std::max<int64_t>(work, 1)),
                   [&](int64_t begin, int64_t end) {
                     Scratch<A> memory(in.norms ? K * g.width * block : 0);
                     for (int64_t i = begin; i < end; ++i) run(i, memory.data());
                   });
  partials.total(C, dweight, dbias);
}

// Rows [first, end) of a plane: taps [a, a + most) of all columns, and the bias with the first.
template <int K, int S, int most, class T, class RowOf>
void plane_products(const Window& g, const RowOf& row_of, const T* dy, int64_t first, int64_t end,
                    int a, double* to, int64_t to_stride) {
  using A = acc_t<T>;
  Vec<A> sum[most][K] = {}, bias = {};
  for (int64_t out = first; out < end; ++out)
    for_vectors<A>(g.out_width, [&](int64_t at, auto count) DFM_INLINE {
      const Vec<A> d = load(dy + out * g.out_width + at, count);  // 0 over the end
      bias += d;
      unrolled<most>([&](auto i) DFM_INLINE {
        Vec<A> x[K];
        load_taps<K, S>(row_of(out * S - g.pad_h + a + i) + at * S, x);
        unrolled<K>([&](auto b) DFM_INLINE { sum[i][b] += d * x[b]; });
      });
    });
  auto add = [&](int tap, Vec<A> v) {
    for (int i = 0; i < kLanes<A>; ++i) to[tap * to_stride] += v[i];
  };
  for (int i = 0; i < most; ++i)
    for (int b = 0; b < K; ++b) add((a + i) * K + b, sum[i][b]);
  if (a == 0) add(K * K, bias);
}

template <int K, int S, class T>
void gradient_planes(const Sizes& s, const Input<T>& in, const T* dy, acc_t<T>* dweight,
                     acc_t<T>* dbias) {
  constexpr int most = K == 3 ? K : 1;
  const Window& g = s.window;
  Partials partials(s.samples, K, s.channels);
  parallel_planes<false>(s, in, [&](int64_t plane, int64_t first, int64_t end, const auto& padded) {
    double* to = partials.at(plane / s.channels, 0, plane % s.channels);
    const T* d = dy + plane * s.out_pixels();
    // Few rows at a time, so that no chain of sums is long.
    for (int64_t out = first; out < end; out += 16)
      for (int a = 0; a < K; a += most)
        plane_products<K, S, most>(g, padded, d, out, std::min(out + 16, end), a, to,
                                   partials.stride);
  });
  partials.total(s.channels, dweight, dbias);
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
    convolve<T>(s, in, data<A>(w), maybe<A>(b), false, mutable_data<T>(y));
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
  Tensor du =
      need_du ? at::empty(x.sizes(), x.options(), layout_of(x)) : at::empty({0}, x.options());
  const auto wide = x.options().dtype(accumulation(x));
  Tensor dweight = need_dweight ? at::empty(weight.sizes(), wide) : at::empty({0}, wide);
  Tensor dbias = need_dweight ? at::empty({s.channels}, wide) : at::empty({0}, wide);
  const Tensor w = widened(weight, x);
  with_input(op, x, norm, [&](const auto& in) {
    using T = std::remove_const_t<std::remove_reference_t<decltype(*in.x)>>;
    using A = acc_t<T>;
    if (need_du) {
      const Input<T> from{data<T>(dy), nullptr, stride == 2};
      convolve<T>(turned(s), from, data<A>(w), static_cast<const A*>(nullptr), true,
                  mutable_data<T>(du));
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
