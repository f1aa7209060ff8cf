// CPU operators of the family `residuals`; the definition is dfm_fast/ops/residuals.py.
//
// Both are one pass over memory. The residual block's hidden map never leaves a core's caches: a
// task goes down a strip of columns, keeps the last rows of silu(conv1(x)) and makes two of them at
// a time. What a strip needs beside its edges is computed twice, two columns of it. Two passes take
// 1.25 (32 channels at 512²) to 1.05 (240 at 64²) of the time.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "products.h"
#include "separables.h"

namespace dfm_fast {
namespace {

constexpr int64_t kSlots = 3 * kRows;      // rows of the hidden map that are kept
constexpr int64_t kMostColumns = 64;       // of a strip
constexpr int64_t kKeptNumbers = 3 << 15;  // of a strip's rows of the hidden map, where that leaves
constexpr int64_t kLeastColumns = 16;      // so many columns

int64_t strip_of(int64_t hidden) {
  const int64_t columns = kKeptNumbers / (kSlots * hidden) / kLeastColumns * kLeastColumns;
  return std::clamp(columns, kLeastColumns, kMostColumns);
}

template <class E, class T>
Convolution<acc_t<T>, E> convolution(const Tensor& depthwise, const Tensor& pointwise,
                                     const MaybeTensor& bias) {
  using A = acc_t<T>;
  const Widened<A> taps(depthwise), added(bias);
  const int64_t C = pointwise.size(1), O = pointwise.size(0);
  std::vector<A> sums(O);
  if (added.at) std::copy_n(added.at, O, sums.begin());
  return {C, O, PackedWeights<A>(taps.at, nullptr, C, 3, false),
          packed<E, T>(pointwise.contiguous()), std::move(sums)};
}

// Columns [begin, end) of a map.
struct Span {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  Span widened(int64_t width) const {
    return {std::max<int64_t>(begin - 1, 0), std::min(end + 1, width)};
  }
};

// What a convolution of the columns `from` that gives the columns `to` sees.
Window window(int64_t height, const Span& from, const Span& to) {
  return {height, from.size(), height, to.size(), 1, from.begin - (to.begin - 1)};
}

// A map [N, H, W, channels] and how it is divided.
template <class T>
struct Image {
  const T* at;
  int64_t samples, height, width, channels, strip;

  int64_t strips() const { return (width + strip - 1) / strip; }
  int64_t bands() const { return (height + kRows - 1) / kRows; }
  const T* row(int64_t n, int64_t i) const { return at + (n * height + i) * width * channels; }

  // f(n, first row, end, columns, whether it follows the call before, scratch) for all bands. The
  // bands of a strip follow one another.
  template <class Make, class F>
  void for_bands(Make make_scratch, F f) const {
    at::parallel_for(0, samples * strips() * bands(), 1, [&](int64_t begin, int64_t end) {
      auto scratch = make_scratch();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / bands() / strips(), left = i / bands() % strips() * strip;
        const int64_t first = i % bands() * kRows;
        f(n, first, std::min(first + kRows, height), Span{left, std::min(left + strip, width)},
          i > begin && first > 0, scratch);
      }
    });
  }
  // a [rows from first to end, columns `to`, ld] = the depthwise convolution of those.
  template <class A, class E>
  void convolve(const Convolution<A, E>& by, int64_t n, int64_t first, int64_t end, const Span& to,
                E* a) const {
    const Span from = to.widened(width);
    const T* rows[kRows + 2];
    for (int r = 0; r < kRows + 2; ++r) {
      const int64_t i = first - 1 + r;
      const bool inside = i >= 0 && i < std::min(height, end + 1);
      rows[r] = inside ? row(n, i) + from.begin * channels : nullptr;
    }
    const Weights<A> taps = by.taps;
    convolve_rows<3, 1>(window(height, from, to), rows, channels, channels, taps,
                        Rows<E>{a, to.size() * by.ld(), by.ld()}, int(end - first), 0);
  }
};

// A depthwise map of a band, and the sums of a panel of its products.
template <class A, class E>
struct Scratch {
  Aligned<E> a;
  Aligned<A> tile;

  Scratch(int64_t columns, int64_t ld) : a(kRows * columns * ld), tile(kTilePixels * kPanel<A>) {
    std::fill(a.data(), a.data() + kRows * columns * ld, E{});  // a term more than channels
  }
};

// --- The residual block ---

template <class T, class E>
struct Residual {
  using A = acc_t<T>;
  Image<T> x;
  Convolution<A, E> first, second;
  T* y;

  int64_t columns() const { return std::min(x.strip, x.width) + 2; }  // of the hidden map

  struct Place : Scratch<A, E> {
    Aligned<A> kept;       // kSlots rows of the hidden map
    int64_t next_row = 0;  // of it
    explicit Place(const Residual& r)
        : Scratch<A, E>(r.columns(), std::max(r.first.ld(), r.second.ld())),
          kept(kSlots * r.columns() * r.second.ld()) {}
  };
  A* kept(const Place& s, int64_t i) const {
    return s.kept.data() + i % kSlots * columns() * second.ld();
  }

  // Rows [i, end) of the hidden map, columns `to`.
  void make_hidden(Place& s, int64_t n, int64_t i, int64_t end, const Span& to) const {
    x.convolve(first, n, i, end, to, s.a.data());
    first.multiply(
        end - i, to.size(), s.a.data(), s.tile.data(),
        [&](int64_t r, int64_t p, int64_t pixels, int64_t o, int64_t columns, const A* tile) {
          A* at = kept(s, i + r) + p * second.ld() + o;
          activate(pixels, columns, tile, &first.bias[o], at);
        });
  }
  void activate(int64_t pixels, int64_t columns, const A* tile, const A* bias, A* to) const {
    for (int64_t p = 0; p < pixels; ++p, tile += kPanel<A>, to += second.ld())
      for_vectors<A>(columns, [=](int64_t o, auto count) DFM_INLINE {
        store(to + o, silu(load(tile + o, count) + load(bias + o, count)), count);
      });
  }

  // Rows [begin, end) of y, columns `to`, from the hidden map's columns `from`.
  void make_output(Place& s, int64_t n, int64_t begin, int64_t end, const Span& from,
                   const Span& to) const {
    const int64_t ld = second.ld();
    auto row_of = [&](int64_t i) -> const A* { return kept(s, i); };
    const Weights<A> taps = second.taps;
    convolve_band<3, 1, A>(window(x.height, from, to), begin, end, row_of, ld, second.inputs, taps,
                           Rows<E>{s.a.data(), to.size() * ld, ld});
    second.multiply(
        end - begin, to.size(), s.a.data(), s.tile.data(),
        [&](int64_t r, int64_t p, int64_t pixels, int64_t o, int64_t columns, const A* tile) {
          const int64_t row = x.row(n, begin + r) - x.at;
          const int64_t at = row + (to.begin + p) * x.channels + o;
          finish(pixels, columns, tile, &second.bias[o], x.at + at, y + at);
        });
  }
  void finish(int64_t pixels, int64_t columns, const A* tile, const A* bias, const T* residual,
              T* to) const {
    const int64_t C = x.channels;
    for (int64_t p = 0; p < pixels; ++p, tile += kPanel<A>, residual += C, to += C)
      for_vectors<A>(columns, [=](int64_t o, auto count) DFM_INLINE {
        const Vec<A> v = load(tile + o, count) + load(bias + o, count);
        round_store(to + o, v + load(residual + o, count), count);
      });
  }

  void run() const {
    x.for_bands([&] { return Place(*this); },
                [&](int64_t n, int64_t row, int64_t end, const Span& to, bool follows, Place& s) {
                  const Span hidden = to.widened(x.width);
                  if (!follows) s.next_row = std::max<int64_t>(row - kRows, 0);
                  for (; s.next_row < std::min(end + 1, x.height); s.next_row += kRows)
                    make_hidden(s, n, s.next_row, std::min(s.next_row + kRows, x.height), hidden);
                  make_output(s, n, row, end, hidden, to);
                });
  }
};

template <class T>
Image<T> image(const Tensor& x, int64_t strip) {
  return {data<T>(x), x.size(0), x.size(2), x.size(3), x.size(1), strip};
}

// f(zero of the storage type, zero of the numbers that are multiplied).
template <class F>
void dispatch_products(const Tensor& x, const char* op, F f) {
  dispatch(x.scalar_type(), op, [&](auto t) {
    using T = decltype(t);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>)
      if (has_products_of_bf16()) return f(t, bf16{});
#endif
    f(t, acc_t<T>{});
  });
}

void check(const char* op, const Tensor& x, const Tensor& depthwise, const Tensor& pointwise,
           int64_t inputs) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast), op,
              ": expected a channels_last x [N, C, H, W], got ", x.sizes(), " with strides ",
              x.strides());
  TORCH_CHECK(depthwise.sizes() == at::IntArrayRef({inputs, 1, 3, 3}) && pointwise.dim() == 4 &&
                  pointwise.numel() == pointwise.size(0) * inputs &&
                  pointwise.scalar_type() == x.scalar_type(),
              op, ": expected weights [", inputs, ", 1, 3, 3] and [O, ", inputs,
              ", 1, 1] like x, got ", depthwise.sizes(), " and ", pointwise.sizes());
}

Tensor separable_residual_cpu(const Tensor& x, const Tensor& depthwise1, const Tensor& pointwise1,
                              const MaybeTensor& bias1, const Tensor& depthwise2,
                              const Tensor& pointwise2, const MaybeTensor& bias2) {
  const char* op = "separable_residual";
  check(op, x, depthwise1, pointwise1, x.size(1));
  check(op, x, depthwise2, pointwise2, pointwise1.size(0));
  TORCH_CHECK(pointwise2.size(0) == x.size(1), op, ": expected ", x.size(1), " outputs, got ",
              pointwise2.size(0));
  PlainCalls plain;
  Tensor y = at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  dispatch_products(x, op, [&](auto t, auto e) {
    using T = decltype(t);
    using E = decltype(e);
    const Residual<T, E> residual{
        image<T>(x, strip_of(pointwise1.size(0))), convolution<E, T>(depthwise1, pointwise1, bias1),
        convolution<E, T>(depthwise2, pointwise2, bias2), mutable_data<T>(y)};
    residual.run();
  });
  return y;
}

// --- Upsampling ---

// Part q = 2a + b of the outputs is pixel (2i + a, 2j + b).
template <class T, class E>
struct Upsampling {
  using A = acc_t<T>;
  Image<T> x;
  Convolution<A, E> conv;
  T* y;  // [N, 2H, 2W, O]

  int64_t channels() const { return conv.outputs / 4; }

  void run() const {
    using Place = Scratch<A, E>;
    x.for_bands([&] { return Place(std::min(x.strip, x.width), conv.ld()); },
                [&](int64_t n, int64_t row, int64_t end, const Span& to, bool, Place& s) {
                  x.convolve(conv, n, row, end, to, s.a.data());
                  conv.multiply(end - row, to.size(), s.a.data(), s.tile.data(),
                                [&](int64_t r, int64_t p, int64_t pixels, int64_t o,
                                    int64_t columns, const A* tile) {
                                  const int64_t i = n * x.height + row + r;
                                  store_parts(i, to.begin + p, pixels, o, columns, tile);
                                });
                });
  }
  // Outputs [first, first + columns) of pixels from (i, j) on, part by part; i counts rows of all
  // samples.
  void store_parts(int64_t i, int64_t j, int64_t pixels, int64_t first, int64_t columns,
                   const A* tile) const {
    const int64_t O = channels(), row = 2 * x.width * O;
    for (int64_t o = first, next; o < first + columns; o = next) {
      const int64_t q = o / O;
      next = std::min((q + 1) * O, first + columns);
      T* at = y + (2 * i + q / 2) * row + (2 * j + q % 2) * O + o - q * O;
      store_part(pixels, next - o, tile + o - first, &conv.bias[o], at);
    }
  }
  void store_part(int64_t pixels, int64_t columns, const A* tile, const A* bias, T* to) const {
    for (int64_t p = 0; p < pixels; ++p, tile += kPanel<A>, to += 2 * channels())
      for_vectors<A>(columns, [=](int64_t o, auto count) DFM_INLINE {
        round_store(to + o, load(tile + o, count) + load(bias + o, count), count);
      });
  }
};

Tensor separable_upsample_cpu(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise,
                              const MaybeTensor& bias) {
  const char* op = "separable_upsample";
  check(op, x, depthwise, pointwise, x.size(1));
  TORCH_CHECK(pointwise.size(0) % 4 == 0, op, ": expected 4 O outputs, got ", pointwise.size(0));
  PlainCalls plain;
  Tensor y = at::empty({x.size(0), pointwise.size(0) / 4, 2 * x.size(2), 2 * x.size(3)},
                       x.options(), at::MemoryFormat::ChannelsLast);
  dispatch_products(x, op, [&](auto t, auto e) {
    using T = decltype(t);
    using E = decltype(e);
    const Upsampling<T, E> upsampling{image<T>(x, kMostColumns),
                                      convolution<E, T>(depthwise, pointwise, bias),
                                      mutable_data<T>(y)};
    upsampling.run();
  });
  return y;
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("separable_residual", separable_residual_cpu);
  m.impl("separable_upsample", separable_upsample_cpu);
}

}  // namespace
}  // namespace dfm_fast
