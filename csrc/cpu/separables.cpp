// CPU operators of the family `separables`; the definition is dfm_fast/ops/separables.py.
//
// Versions, SnapGen's blocks (C = 256 at 64², 512 at 32², 896 at 16²), two cores with AVX-512:
//   1. norm, SiLU and depthwise convolution in one pass, oneDNN's product, statistics: bfloat16 on
//      CPUs with AMX, whose products are oneDNN's. Bands of rows instead of whole maps lose there:
//      it packs the weights anew in every call. In fp32 its sums are chains of C products, whose
//      error is over the budget from C = 512 on.
//   2. bands of rows, through a product of our own that ends in the sums with bias, shift and
//      residual and in the statistics, while the band is in the second-level cache: all else. As
//      fast as oneDNN's product alone, twice as fast as MKL's on AMD processors.
#include "separables.h"

#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "products.h"

namespace dfm_fast {
namespace {

constexpr int64_t kBandPixels = 128;  // of a band, whose depthwise map a thread's cache then holds
constexpr int64_t kBandNumbers = 1 << 17;  // of it, where the map is large enough for longer bands

struct Sizes {
  int64_t samples, channels, outputs;
  Window window;
  int kernel;
  bool last;

  int64_t pixels() const { return window.height * window.width; }
  int64_t terms() const { return terms_of(channels); }
  // Rows of a band. Twice as many where that leaves enough bands: tiles of the product fit better.
  int64_t band() const {
    const bool twice = pixels() >= 32 * kBandPixels && 2 * kBandPixels * channels <= kBandNumbers;
    const int64_t wanted = twice ? 2 * kBandPixels : kBandPixels;
    return std::max<int64_t>(1, wanted / window.width / kRows) * kRows;
  }
  int64_t bands() const { return (window.height + band() - 1) / band(); }
};

template <class T>
struct Arguments {
  using A = acc_t<T>;
  const T* x;
  const Affines<A>* norms;  // null: no norm
  const A* depthwise;       // [C, K, K]
  const Tensor& pointwise;  // [O, C, 1, 1]
  const A* constant;        // [N, O]: bias and shift
  const T* residual;        // null: none
  T* y;
};

// --- From x to bands of depthwise maps ---

// Row i of sample n as the convolution takes it.
template <class T>
void make_row(const Sizes& s, const Arguments<T>& given, int64_t n, int64_t i, acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t C = s.channels, W = s.window.width, ld = leading(s.channels);
  const T* sample = given.x + n * s.pixels() * C;
  if (!s.last) transpose_rows(sample + i * W, s.pixels(), C, W, to, ld);
  const T* from = sample + i * W * C;
  if (given.norms) {
    const Affine<A> norm = given.norms->of(n, 0);
    s.last ? norm_silu_pixels(from, C, W, norm, C, to, ld)
           : norm_silu_pixels<A, A>(to, ld, W, norm, C, to, ld);
  } else if (s.last) {
    for (int64_t j = 0; j < W; ++j) convert_row(to + j * ld, from + j * C, C);
  }
}

// f(n, band, first row, end, a) for all bands; a holds the depthwise map of its rows. A thread's
// bands follow one another, so rows are normalised once but at its first and last band.
template <int K, class T, class To, class PlaceOf, class F>
void for_bands(const Sizes& s, const Arguments<T>& given, PlaceOf place_of, int64_t ld, F f) {
  using A = acc_t<T>;
  const Window& g = s.window;
  const int64_t bands = s.bands(), rows = s.band(), slots = kRows - 1 + K;
  const int64_t size = g.width * leading(s.channels);
  const PackedWeights<A> weights(given.depthwise, nullptr, s.channels, K, false);
  at::parallel_for(0, s.samples * bands, 1, [&](int64_t begin, int64_t end) {
    const Aligned<A> scratch(slots * size);
    const Aligned<To> own(rows * g.width * ld);
    for (int64_t p = 0; p < rows * g.width; ++p)  // one term more than channels
      for (int64_t c = s.channels; c < std::min(s.terms(), ld); ++c) own[p * ld + c] = To{};
    int64_t n = 0;
    Ring ring{scratch.data(), slots, size, 0,
              [&](int64_t i, A* row) { make_row(s, given, n, i, row); }};
    for (int64_t i = begin; i < end; ++i) {
      n = i / bands;
      const int64_t first = i % bands * rows, stop = std::min(first + rows, g.height);
      if (i == begin || first == 0) ring.next = std::max<int64_t>(first - g.pad_h, 0);
      To* a = place_of(n, first, own.data());
      convolve_band<K, 1, A>(g, first, stop, ring, leading(s.channels), s.channels, weights,
                             Rows<To>{a, g.width * ld, ld});
      f(n, i % bands, first, stop, a);
    }
  });
}

// --- A product of our own ---

// A tile [pixels, kPanel] of sums becomes outputs, and with `keep` holds them rounded.
template <class T>
void finish_last(const Sizes& s, const Arguments<T>& given, int64_t n, int64_t pixel,
                 int64_t pixels, int64_t first, bool keep, acc_t<T>* tile) {
  using A = acc_t<T>;
  const int64_t O = s.outputs, columns = std::min(O - first, kPanel<A>);
  const int64_t at = (n * s.pixels() + pixel) * O + first;
  const A* constant = given.constant + n * O + first;
  for (int64_t p = 0; p < pixels; ++p) {
    A* from = tile + p * kPanel<A>;
    T* to = given.y + at + p * O;
    const T* residual = given.residual ? given.residual + at + p * O : nullptr;
    for_vectors<A>(columns, [=](int64_t i, auto count) DFM_INLINE {
      Vec<A> v = load(from + i, count) + load(constant + i, count);
      if (residual) v += load(residual + i, count);
      round_store(to + i, v, count);
      if (keep) store(from + i, load(to + i, count), count);
    });
  }
}

// y [columns, pixels] in planes, from pixels `ld` apart. Transposed in scratch, some columns at a
// time, and then written row by row: the same place of many planes would be one place of the
// first-level cache, where half of a line waits in vain for the other half.
template <class T, class From>
void finish_planes(const Sizes& s, const Arguments<T>& given, int64_t n, int64_t pixel,
                   int64_t pixels, int64_t first, int64_t columns, const From* from, int64_t ld,
                   const acc_t<T>* constant) {
  using A = acc_t<T>;
  constexpr int64_t some = kLanes<A>;
  const int64_t row = (pixels + some - 1) / some * some + some;
  const Aligned<A> turned(some * row);
  for (int64_t begin = 0; begin < columns; begin += some) {
    const int64_t count = std::min(some, columns - begin);
    transpose_rows(from + begin, ld, pixels, count, turned.data(), row);
    for (int64_t o = begin; o < begin + count; ++o) {
      const A* sums = &turned[(o - begin) * row];
      const int64_t at = (n * s.outputs + first + o) * s.pixels() + pixel;
      const A added = constant ? constant[o] : 0;
      const T* residual = given.residual ? given.residual + at : nullptr;
      T* to = given.y + at;
      for_vectors<A>(pixels, [=](int64_t p, auto count) DFM_INLINE {
        Vec<A> v = load(sums + p, count) + added;
        if (residual) v += load(residual + p, count);
        round_store(to + p, v, count);
      });
    }
  }
}

// Asks for what `finish_last` and `finish_planes` write and read of pixels [begin, end).
template <class T>
void ask_for(const Sizes& s, const Arguments<T>& given, int64_t n, int64_t pixel, int64_t begin,
             int64_t end, int64_t first) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t columns = std::min(s.outputs - first, kPanel<acc_t<T>>);
  auto ask = [&](int64_t at) {
    __builtin_prefetch(given.y + at, 0, 2);
    if (given.residual) __builtin_prefetch(given.residual + at, 0, 2);
  };
  if (s.last) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t o = 0; o < columns; o += line)
        ask((n * s.pixels() + pixel + p) * s.outputs + first + o);
  } else {
    for (int64_t p = (begin + line - 1) / line * line; p < end; p += line)
      for (int64_t o = 0; o < columns; ++o)
        ask((n * s.outputs + first + o) * s.pixels() + pixel + p);
  }
}

// Mean and M2 of K vectors of a tile's columns, in two passes over it: it lies in a cache, and one
// merge a block of pixels, as in `pixel_moments`, would take an eighth of the time of its products.
template <int K, class A>
void tile_moments(int64_t pixels, const A* tile, double* mean, double* m2) {
  constexpr int lanes = kLanes<A>;
  const A share = A(1) / pixels;
  Vec<A> sum[K] = {}, centre[K], rest[K] = {}, squares[K] = {};
  for (int64_t q = 0; q < pixels; q += kChain) {
    Vec<A> some[K] = {};
    for (int64_t p = q; p < std::min(q + kChain, pixels); ++p)
      for (int k = 0; k < K; ++k) some[k] += load(tile + p * kPanel<A> + k * lanes);
    for (int k = 0; k < K; ++k) sum[k] += some[k];
  }
  for (int k = 0; k < K; ++k) centre[k] = sum[k] * share;
  for (int64_t q = 0; q < pixels; q += kChain) {
    Vec<A> some[K] = {}, some_squares[K] = {};
    for (int64_t p = q; p < std::min(q + kChain, pixels); ++p)
      for (int k = 0; k < K; ++k) {
        const Vec<A> d = load(tile + p * kPanel<A> + k * lanes) - centre[k];
        some[k] += d;
        some_squares[k] += d * d;
      }
    for (int k = 0; k < K; ++k) rest[k] += some[k], squares[k] += some_squares[k];
  }
  for (int k = 0; k < K; ++k)
    for (int i = 0; i < lanes; ++i) {
      const double c = centre[k][i], d = rest[k][i] * (1.0 / pixels);
      const double found = squares[k][i] - d * rest[k][i];
      // Beside a large mean its rounding shows in what is left; beside a small one that is noise.
      const bool large = c * c * pixels > squares[k][i];
      mean[k * lanes + i] = large ? c + d : sum[k][i] * (1.0 / pixels);
      m2[k * lanes + i] = found < 0 ? 0 : found;
    }
}

// Of every band, [N, bands, 2, padded]: mean and M2 of the outputs.
struct BandMoments {
  int64_t padded;
  std::vector<double> of;

  double* at(const Sizes& s, int64_t n, int64_t band) {
    return of.data() + (n * s.bands() + band) * 2 * padded;
  }
  template <class A>
  void merge(const Sizes& s, A* mean, A* m2) {
    constexpr int64_t some = kPanel<A>;
    const int64_t panels = padded / some;
    parallel(s.samples * panels, s.bands() * some, [&](int64_t i) {
      const int64_t n = i / panels, first = i % panels * some;
      double centre[some] = {}, squares[some] = {};
      int64_t count = 0;
      for (int64_t b = 0; b < s.bands(); ++b) {  // as Moments::merge does, of many at once
        const int64_t rows = std::min(s.band(), s.window.height - b * s.band());
        const double* here = at(s, n, b) + first;
        count += rows * s.window.width;
        const double share = double(rows * s.window.width) / count;
        const double weight = (count - rows * s.window.width) * share;
        for (int64_t o = 0; o < some; ++o) {
          const double delta = here[o] - centre[o];
          centre[o] += delta * share;
          squares[o] += here[padded + o] + delta * delta * weight;
        }
      }
      const int64_t columns = std::min(some, s.outputs - first), to = n * s.outputs + first;
      std::copy_n(centre, columns, mean + to);
      std::copy_n(squares, columns, m2 + to);
    });
  }
};

template <int K, class E, class T>
void in_bands(const Sizes& s, const Arguments<T>& given, const Map& map, acc_t<T>* mean,
              acc_t<T>* m2) {
  using A = acc_t<T>;
  const int64_t O = s.outputs, W = s.window.width, ld = leading(s.channels), terms = s.terms();
  const Aligned<E> panels = packed<E, T>(given.pointwise);
  const bool inside = mean && s.last;
  const int64_t padded = panels_of(O, kPanel<A>) * kPanel<A>;
  BandMoments moments{padded, std::vector<double>(inside ? s.samples * s.bands() * 2 * padded : 0)};
  auto own = [](int64_t, int64_t, E* place) { return place; };
  for_bands<K, T, E>(s, given, own, ld,
                     [&](int64_t n, int64_t band, int64_t first, int64_t end, const E* a) {
                       const int64_t pixels = (end - first) * W;
                       const Aligned<A> tile(pixels * kPanel<A>);
                       for (int64_t o = 0; o < O; o += kPanel<A>) {
                         auto ask = [&](int64_t begin, int64_t end) {
                           ask_for(s, given, n, first * W, begin, end, o);
                         };
                         const int64_t columns = std::min(O - o, kPanel<A>);
                         with_vectors<A>(columns, [&](auto vectors) {
                           multiply_panel<vectors>(pixels, terms, a, ld, &panels[o * terms],
                                                   tile.data(), kPanel<A>, ask);
                         });
                         if (!s.last) {
                           finish_planes(s, given, n, first * W, pixels, o, columns, tile.data(),
                                         kPanel<A>, given.constant + n * O + o);
                           continue;
                         }
                         finish_last(s, given, n, first * W, pixels, o, inside, tile.data());
                         if (!inside) continue;
                         double* to = moments.at(s, n, band) + o;
                         with_vectors<A>(columns, [&](auto vectors) {
                           tile_moments<vectors>(pixels, tile.data(), to, to + padded);
                         });
                       }
                     });
  if (inside) moments.merge(s, mean, m2);
  if (mean && !inside) statistics(map, given.y, mean, m2);
}

// --- oneDNN's product ---

// bias + shift of a sample as oneDNN adds them, in the storage type; none where they would be
// rounded.
template <class T>
MaybeTensor exact_constant(const Sizes& s, const Arguments<T>& given, const Tensor& y, int64_t n) {
  Tensor rounded = at::empty({s.outputs}, y.options());
  const acc_t<T>* from = given.constant + n * s.outputs;
  T* to = mutable_data<T>(rounded);
  convert_row(to, from, s.outputs);
  for (int64_t o = 0; o < s.outputs; ++o)
    if (load_one(to + o) != from[o]) return std::nullopt;
  return rounded;
}

// [pixels, O] as they lie in y, with what the product has not added.
template <class T>
void copy_sums(const Sizes& s, const Arguments<T>& given, int64_t n, const T* sums,
               const acc_t<T>* constant) {
  const int64_t P = s.pixels(), O = s.outputs;
  parallel((P + kBandPixels - 1) / kBandPixels, kBandPixels * O, [&](int64_t i) {
    const int64_t first = i * kBandPixels, pixels = std::min(kBandPixels, P - first);
    const T* from = sums + first * O;
    if (!s.last) return finish_planes<T>(s, given, n, first, pixels, 0, O, from, O, constant);
    T* to = given.y + (n * P + first) * O;
    if (!constant) return void(std::copy_n(from, pixels * O, to));
    for (int64_t p = 0; p < pixels; ++p)
      for_vectors<acc_t<T>>(O, [=](int64_t o, auto count) DFM_INLINE {
        store(to + p * O + o, load(from + p * O + o, count) + load(constant + o, count), count);
      });
  });
}

// One sample's sums in channels_last are y itself, and nothing is copied.
template <int K, class T>
void by_onednn(const Sizes& s, Arguments<T> given, const MaybeTensor& residual, const Map& map,
               Tensor& y, acc_t<T>* mean, acc_t<T>* m2) {
  const int64_t C = s.channels, O = s.outputs, P = s.pixels(), W = s.window.width;
  Tensor a = at::empty({s.samples * P, C}, y.options());
  auto in_a = [&](int64_t n, int64_t first, T*) {
    return mutable_data<T>(a) + (n * P + first * W) * C;
  };
  for_bands<K, T, T>(s, given, in_a, C, [](int64_t, int64_t, int64_t, int64_t, const T*) {});
  const Tensor weight = given.pointwise.view({O, C});
  for (int64_t n = 0; n < s.samples; ++n) {
    const MaybeTensor constant = exact_constant(s, given, y, n);
    const acc_t<T>* left = constant ? nullptr : given.constant + n * O;
    const Tensor part = a.narrow(0, n * P, P);
    const bool added = residual && s.last;
    Tensor sums = added ? product_and(part, weight, constant,
                                      residual->select(0, n).permute({1, 2, 0}).view({P, O}))
                        : product(part, weight, constant);
    if (s.samples == 1 && s.last && !left) {
      y = sums.view({1, s.window.height, W, O}).permute({0, 3, 1, 2});
      given.y = mutable_data<T>(y);
    } else {
      copy_sums(s, given, n, data<T>(sums), left);
    }
  }
  if (mean) statistics(map, given.y, mean, m2);
}

// --- Operators ---

Sizes check(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise,
            const MaybeTensor& residual, const MaybeTensor& mean, int64_t groups) {
  const char* op = "separable_conv2d";
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(layout_of(x)), op,
              ": expected a contiguous or channels_last x [N, C, H, W], got ", x.sizes(),
              " with strides ", x.strides());
  const int64_t k = depthwise.size(-1), C = x.size(1), O = pointwise.size(0);
  TORCH_CHECK(depthwise.sizes() == at::IntArrayRef({C, 1, k, k}) && (k == 3 || k == 5 || k == 7),
              op, ": expected depthwise_weight [C, 1, k, k], got ", depthwise.sizes());
  TORCH_CHECK(pointwise.sizes() == at::IntArrayRef({O, C, 1, 1}) &&
                  pointwise.scalar_type() == x.scalar_type(),
              op, ": expected pointwise_weight [O, C, 1, 1] like x, got ", pointwise.sizes());
  TORCH_CHECK(
      !residual || (residual->sizes() == at::IntArrayRef({x.size(0), O, x.size(2), x.size(3)}) &&
                    residual->is_contiguous(layout_of(x))),
      op, ": expected a residual like the output");
  TORCH_CHECK(!mean || (groups > 0 && C % groups == 0), op, ": expected ", groups, " groups");
  return {x.size(0), C,
          O,         {x.size(2), x.size(3), x.size(2), x.size(3), k / 2, k / 2},
          int(k),    layout_of(x) != at::MemoryFormat::Contiguous};
}

// bias + shift [N, O]
template <class A>
std::vector<A> constants_of(const Sizes& s, const MaybeTensor& bias, const MaybeTensor& shift) {
  const Widened<A> b(bias), more(shift);
  std::vector<A> sum(s.samples * s.outputs);
  for (size_t i = 0; i < sum.size(); ++i)
    sum[i] = (b.at ? b.at[i % s.outputs] : 0) + (more.at ? more.at[i] : 0);
  return sum;
}

// f(integral_constant K)
template <class F>
void with_side(int kernel, const F& f) {
  if (kernel == 3) return f(std::integral_constant<int, 3>{});
  if (kernel == 5) return f(std::integral_constant<int, 5>{});
  f(std::integral_constant<int, 7>{});
}

std::tuple<Tensor, Tensor, Tensor> separable_conv2d_cpu(
    const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, const MaybeTensor& bias,
    const MaybeTensor& shift, const MaybeTensor& residual, const MaybeTensor& mean,
    const MaybeTensor& m2, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
    int64_t num_groups, double eps, bool with_statistics) {
  const Sizes s = check(x, depthwise, pointwise, residual, mean, num_groups);
  PlainCalls plain;
  const Window& g = s.window;
  Tensor y = at::empty({s.samples, s.outputs, g.height, g.width}, x.options(), layout_of(x));
  const auto wide = x.options().dtype(accumulation(x));
  const std::vector<int64_t> size =
      with_statistics ? std::vector<int64_t>{s.samples, s.outputs} : std::vector<int64_t>{0};
  Tensor found_mean = at::empty(size, wide), found_m2 = at::empty(size, wide);
  dispatch(x.scalar_type(), "separable_conv2d", [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Widened<A> taps(depthwise), weight(norm_weight), beta(norm_bias), means(mean), all(m2);
    const std::vector<A> constant = constants_of<A>(s, bias, shift);
    std::optional<Affines<A>> norms;
    const NormParameters<A> parameters = {weight.at, beta.at, nullptr};
    if (mean) norms.emplace(Map(x, num_groups), means.at, all.at, parameters, eps);
    const Arguments<T> given = {data<T>(x),        norms ? &*norms : nullptr,
                                taps.at,           pointwise,
                                constant.data(),   residual ? data<T>(*residual) : nullptr,
                                mutable_data<T>(y)};
    A* to_mean = with_statistics ? mutable_data<A>(found_mean) : nullptr;
    A* to_m2 = with_statistics ? mutable_data<A>(found_m2) : nullptr;
    const Map map(y, 1);
    with_side(s.kernel, [&](auto k) {
      if constexpr (std::is_same_v<T, bf16>) {
#if defined(__AVX512F__)
        if (multiplies_bf16()) return in_bands<k, bf16>(s, given, map, to_mean, to_m2);
#endif
        if (onednn_multiplies(at::kBFloat16))
          return by_onednn<k>(s, given, residual, map, y, to_mean, to_m2);
      }
      in_bands<k, A>(s, given, map, to_mean, to_m2);
    });
  });
  return {y, found_mean, found_m2};
}

// da and dweight of all samples, by products of our own. In channels_last they are one matrix of
// pixels.
template <class T>
void pointwise_backward(const Tensor& dy, const Tensor& a, const Tensor& weight, T* da,
                        acc_t<T>* dweight) {
  const bool last = layout_of(a) != at::MemoryFormat::Contiguous;
  const int64_t C = a.size(1), O = dy.size(1), samples = last ? 1 : a.size(0);
  const int64_t P = a.numel() / C / samples;
  const Matrix<T> w = {data<T>(weight), O, C, C, false};
  for (int64_t n = 0; n < samples; ++n) {
    const T *dy_n = data<T>(dy) + n * O * P, *a_n = data<T>(a) + n * C * P;
    const Matrix<T> d = last ? Matrix<T>{dy_n, P, O, O, false} : Matrix<T>{dy_n, O, P, P, false};
    if (da) {
      T* to = da + n * C * P;
      last ? multiply(d, w, {}, to) : multiply(w.transpose(), d, {}, to);
    }
    if (!dweight) continue;
    const Addend<acc_t<T>> before = {n > 0 ? dweight : nullptr, C};
    if (last)
      multiply(d.transpose(), {a_n, P, C, C, false}, before, dweight);
    else
      multiply(d, {a_n, P, C, P, true}, before, dweight);
  }
}

// bfloat16 by oneDNN's products where it has them; there alone the number of threads decides in
// which order dweight's sums are added.
std::tuple<Tensor, Tensor> pointwise_conv2d_backward_cpu(const Tensor& dy, const Tensor& a,
                                                         const Tensor& weight, bool need_da,
                                                         bool need_dweight) {
  const auto layout = layout_of(a);
  TORCH_CHECK(a.dim() == 4 && a.is_contiguous(layout) && dy.is_contiguous(layout) &&
                  dy.scalar_type() == a.scalar_type() && weight.scalar_type() == a.scalar_type(),
              "pointwise_conv2d_backward: expected dy, a and weight alike");
  PlainCalls plain;
  Tensor da = need_da ? at::empty(a.sizes(), a.options(), layout) : at::empty({0}, a.options());
  const auto wide = a.options().dtype(accumulation(a));
  Tensor dweight = need_dweight ? at::empty(weight.sizes(), wide) : at::empty({0}, wide);
  if (!a.numel()) return {da, dweight.zero_()};
  if (a.scalar_type() == at::kBFloat16 && onednn_multiplies(at::kBFloat16)) {
    auto grads = at::convolution_backward(dy, a, weight, std::nullopt, {1, 1}, {0, 0}, {1, 1},
                                          false, {0, 0}, 1, {need_da, need_dweight, false});
    if (need_da) da.copy_(std::get<0>(grads));
    if (need_dweight) dweight.copy_(std::get<1>(grads));
    return {da, dweight};
  }
  dispatch(a.scalar_type(), "pointwise_conv2d_backward", [&](auto t) {
    using T = decltype(t);
    pointwise_backward<T>(dy, a, weight, need_da ? mutable_data<T>(da) : nullptr,
                          need_dweight ? mutable_data<acc_t<T>>(dweight) : nullptr);
  });
  return {da, dweight};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("separable_conv2d", separable_conv2d_cpu);
  m.impl("pointwise_conv2d_backward", pointwise_conv2d_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
