// Depthwise convolutions of rows: what `convolutions.cpp` and the operators that go on from a
// convolved band have in common.
//
// channels_last: a vector is 16 channels of a pixel, and a tile kRows x kPixels of output pixels of
// it, so that an input vector is loaded once for all the sums in registers that it is added to.
// contiguous: a vector is 16 pixels of a row, from rows in scratch with zeros around them, and a
// tile is kPlaneRows of those.
//
// What is convolved comes row by row: rows of a map where they lie, or rows of scratch (a `Ring`),
// into which each row is normalised, activated and converted once, however many output rows want
// it.
#pragma once

#include <memory>
#include <new>

#include "channel_maps.h"

namespace dfm_fast {

constexpr int kRows = 2;
constexpr int kPixels = kVectorBytes == 64 ? 4 : 2;  // as registers allow
constexpr int kPlaneRows = 4;

// Where a convolution looks for what: one side of it is input, the other output.
struct Window {
  int64_t height, width, out_height, out_width, pad_h, pad_w;
};

// f(integral_constant 0), f(1), ... f(n - 1)
template <class F, int... I>
DFM_INLINE inline void unrolled(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int n, class F>
DFM_INLINE inline void unrolled(const F& f) {
  unrolled(std::make_integer_sequence<int, n>{}, f);
}

// --- Scratch ---

// Zeroed, as wide loads may look past the end of a row.
template <class A>
struct Scratch {
  explicit Scratch(int64_t n) : memory(new (std::align_val_t(64)) A[n]()) {}
  A* data() const { return memory.get(); }

 private:
  struct Delete {
    void operator()(A* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<A[], Delete> memory;
};

// The last `slots` rows of those that fill(i, to) makes, in order.
template <class A, class Fill>
struct Ring {
  A* rows;
  int64_t slots, size, next;
  Fill fill;

  const A* operator()(int64_t i) {
    for (; next <= i; ++next) fill(next, rows + next % slots * size);
    return rows + i % slots * size;
  }
};
template <class A, class Fill>
Ring(A*, int64_t, int64_t, int64_t, Fill) -> Ring<A, Fill>;

// --- What rows of a ring are made of ---

// Of a sample: u = silu(scale (x - centre) + offset), all [C].
template <class A>
struct Affine {
  const A *scale, *offset, *centre;
};

// Of all samples, from the statistics of their channels.
template <class A>
struct Affines {
  int64_t channels;
  std::vector<A> scale, offset, centre;

  Affines(const Map& map, const A* mean, const A* m2, const NormParameters<A>& given, double eps)
      : channels(map.channels), scale(map.planes()), offset(map.planes()), centre(map.planes()) {
    parallel(map.samples * map.groups, map.size() * 16, [&](int64_t i) {
      const int64_t c = i % map.groups * map.size(), at = i / map.groups * channels + c;
      NormParameters<A> here = given.from(c);
      if (given.shift) here.shift = given.shift + at;
      group_affine(map.pixels, map.size(), mean + at, m2 + at, here, eps, &scale[at], &offset[at],
                   &centre[at]);
    });
  }
  Affine<A> of(int64_t n, int64_t c) const {
    const int64_t at = n * channels + c;
    return {scale.data() + at, offset.data() + at, centre.data() + at};
  }
};

template <class V>
DFM_INLINE inline V silu(V z) {
  return z / one_and_exp(z);
}

// to[pixel][c] from x[pixel][C]
template <class T, class A>
void norm_silu_pixels(const T* x, int64_t stride, int64_t pixels, const Affine<A>& norm,
                      int64_t channels, A* to, int64_t to_stride) {
  for (int64_t p = 0; p < pixels; ++p, x += stride, to += to_stride)
    for_vectors<A>(channels, [=](int64_t c, auto count) DFM_INLINE {
      if (c % (64 / sizeof(T)) == 0) __builtin_prefetch(x + c + 8 * stride);
      Vec<A> d = load(x + c, count) - load(norm.centre + c, count);
      Vec<A> z = d * load(norm.scale + c, count) + load(norm.offset + c, count);
      store(to + c, silu(z), count);
    });
}

// --- channels_last ---

// Rounding to bfloat16 takes as long as the nine products of a pixel, but one instruction where the
// CPU has it, in every build for AVX-512: 0.3 ns less of 2.2. It rounds alike, and makes zeros of
// denormals.
#if defined(__AVX512F__)
inline const bool kRoundsBf16 = __builtin_cpu_supports("avx512bf16");
#endif

template <class T, class V, class Count>
DFM_INLINE inline void round_store(T* p, V v, Count count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<Count, Whole<float>>) {
    if (kRoundsBf16) {
      __m256i rounded;
      asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
      std::memcpy(p, &rounded, sizeof rounded);
      return;
    }
  }
#endif
  store(p, v, count);
}

// Here v is known: the compiler would move sums behind the branches that their stores are in, with
// what they are made of kept in memory until then.
template <class V>
DFM_INLINE inline void settle(V& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__SSE2__)
  asm volatile("" : "+x"(v));
#endif
}

// Of the first channel that a function looks at: taps [K K + 1, stride], the bias last, and as many
// zeros: what lies outside of a map.
template <class A>
struct Weights {
  const A *taps, *zeros;
  int64_t stride;

  Weights from(int64_t c) const { return {taps + c, zeros, stride}; }
};

// Owns them: from weight [C, K, K] and bias [C] or null; turned around where the input's gradient
// is computed.
template <class A>
struct PackedWeights {
  int64_t stride;
  std::vector<A> taps;

  PackedWeights(const A* weight, const A* bias, int64_t channels, int K, bool turned)
      : stride((channels + 15) / 16 * 16), taps((K * K + 2) * stride) {
    const int n = K * K;
    for (int64_t c = 0; c < channels; ++c)
      for (int t = 0; t < n; ++t) taps[t * stride + c] = weight[c * n + (turned ? n - 1 - t : t)];
    if (bias) std::copy(bias, bias + channels, taps.begin() + n * stride);
  }
  operator Weights<A>() const { return {taps.data(), taps.data() + taps.size() - stride, stride}; }
};

// Where rows of output go: `row` and `pixel` are strides.
template <class To>
struct Rows {
  To* at;
  int64_t row, pixel;
};

// A tile of one vector of channels, at(i, j) being where row i and column j of what it sees lie;
// to(r, p) is where it goes, or null at an edge.
template <int K, int S, bool edge, class A, class At, class To, class Count>
DFM_INLINE inline void convolve_tile(const At& at, const A* taps, int64_t stride, const To& to,
                                     Count count) {
  constexpr int rows_in = (kRows - 1) * S + K, cols_in = (kPixels - 1) * S + K;
  Vec<A> sum[kRows][kPixels];
  const Vec<A> bias = load(taps + K * K * stride);
  auto each = [&](const auto& f) DFM_INLINE {
    unrolled<kRows>([&](auto r)
                        DFM_INLINE { unrolled<kPixels>([&](auto p) DFM_INLINE { f(r, p); }); });
  };
  each([&](auto r, auto p) DFM_INLINE { sum[r][p] = bias; });
  auto add_row = [&](auto i) DFM_INLINE {
    Vec<A> x[cols_in];
    unrolled<cols_in>([&](auto j) DFM_INLINE { x[j] = load(at(i, j), count); });
    unrolled<kRows>([&](auto r) DFM_INLINE {
      const int a = i - r * S;
      if (a < 0 || a >= K) return;
      Vec<A> some[kPixels] = {};
      auto& to = K == 3 ? sum[r] : some;
      unrolled<K>([&](auto b) DFM_INLINE {
        const Vec<A> w = load(taps + (a * K + b) * stride);
        unrolled<kPixels>([&](auto p) DFM_INLINE { to[p] += w * x[p * S + b]; });
      });
      if constexpr (K > 3) unrolled<kPixels>([&](auto p) DFM_INLINE { sum[r][p] += some[p]; });
    });
  };
  if constexpr (K == 3)
    unrolled<rows_in>(add_row);
  else
    for (int i = 0; i < rows_in; ++i) add_row(i);
  each([&](auto r, auto p) DFM_INLINE { settle(sum[r][p]); });
  each([&](auto r, auto p) DFM_INLINE {
    if (auto* y = to(r, p); !edge || y) round_store(y, sum[r][p], count);
  });
}

// Up to kRows rows of output; row[i] is null outside of the map. What lies outside is read from a
// row of zeros, so that no load of an edge has a branch: half of the tiles of a small map are one.
// `ahead`, where it is not 0, is how far apart rows are: those of the tiles below are asked for.
template <int K, int S, class From, class A, class To>
void convolve_rows(const Window& g, const From* const* row, int64_t pixel, int64_t channels,
                   const Weights<A>& weights, const Rows<To>& to, int rows, int64_t ahead) {
  constexpr int rows_in = (kRows - 1) * S + K, cols_in = (kPixels - 1) * S + K;
  bool whole = rows == kRows;
  for (int i = 0; i < rows_in; ++i) whole &= row[i] != nullptr;
  for (int64_t at = 0; at < g.out_width; at += kPixels) {
    const int64_t col = at * S - g.pad_w, left = g.out_width - at;
    const int cols = static_cast<int>(std::min<int64_t>(left, kPixels));
    To* const y = to.at + at * to.pixel;
    if (whole && col >= 0 && col + cols_in <= g.width && cols == kPixels) {
      const From* from[rows_in];
      for (int i = 0; i < rows_in; ++i) from[i] = row[i] + col * pixel;
      const From* const soon = row[rows_in - 1] + ahead + at * S * pixel;
      for_vectors<A>(channels, [&](int64_t c, auto count) DFM_INLINE {
        if (ahead)
          for (int r = 0; r < kRows * S; ++r)
            for (int p = 0; p < kPixels * S; ++p)
              __builtin_prefetch(soon + r * ahead + p * pixel + c);
        convolve_tile<K, S, false>(
            [&](auto i, auto j) DFM_INLINE { return from[i] + c + j * pixel; }, weights.taps + c,
            weights.stride,
            [&](auto r, auto p) DFM_INLINE { return y + r * to.row + p * to.pixel + c; }, count);
      });
      continue;
    }
    const From* from[rows_in][cols_in];
    for (int i = 0; i < rows_in; ++i)
      for (int j = 0; j < cols_in; ++j) {
        const bool inside = row[i] && col + j >= 0 && col + j < g.width;
        from[i][j] =
            inside ? row[i] + (col + j) * pixel : reinterpret_cast<const From*>(weights.zeros);
      }
    for_vectors<A>(channels, [&](int64_t c, auto count) DFM_INLINE {
      convolve_tile<K, S, true>([&](auto i, auto j) DFM_INLINE { return from[i][j] + c; },
                                weights.taps + c, weights.stride,
                                [&](auto r, auto p) DFM_INLINE {
                                  return r < rows && p < cols ? y + r * to.row + p * to.pixel + c
                                                              : nullptr;
                                },
                                count);
    });
  }
}

// Rows [first, end) of output; row_of(i) is row i of the input, its pixels `pixel` apart.
template <int K, int S, class A, class RowOf, class To>
void convolve_band(const Window& g, int64_t first, int64_t end, RowOf&& row_of, int64_t pixel,
                   int64_t channels, const Weights<A>& weights, Rows<To> to, int64_t ahead = 0) {
  constexpr int rows_in = (kRows - 1) * S + K;
  using From = std::remove_const_t<std::remove_pointer_t<decltype(row_of(0))>>;
  for (int64_t out = first; out < end; out += kRows, to.at += kRows * to.row) {
    const int rows = static_cast<int>(std::min<int64_t>(end - out, kRows));
    const From* row[rows_in];
    for (int i = 0; i < rows_in; ++i) {
      const int64_t in = out * S - g.pad_h + i;
      const bool wanted = i < (rows - 1) * S + K && in >= 0 && in < g.height;
      row[i] = wanted ? row_of(in) : nullptr;
    }
    convolve_rows<K, S>(g, row, pixel, channels, weights, to, rows, ahead);
  }
}

// Floats of scratch that `norm_silu_convolve_band` needs.
template <int K, int S>
int64_t ring_size(const Window& g, int64_t channels) {
  return ((kRows - 1) * S + K) * g.width * channels;
}

// The same of silu(norm(x)): x [height, width, stride] and everything else begin at the first of
// `channels` channels; `scratch` has ring_size.
template <int K, int S, class T, class A, class To>
void norm_silu_convolve_band(const Window& g, int64_t first, int64_t end, const T* x,
                             int64_t stride, const Affine<A>& norm, int64_t channels,
                             const Weights<A>& weights, const Rows<To>& to, A* scratch) {
  const int64_t slots = (kRows - 1) * S + K, start = std::max<int64_t>(first * S - g.pad_h, 0);
  Ring ring{scratch, slots, g.width * channels, start, [&](int64_t i, A* row) {
              const T* from = x + i * g.width * stride;
              norm_silu_pixels(from, stride, g.width, norm, channels, row, channels);
            }};
  convolve_band<K, S>(g, first, end, ring, channels, channels, weights, to);
}

// --- contiguous ---

// Vec of x[0], x[S], x[2 S] ...
template <int S, class A>
DFM_INLINE inline Vec<A> every(const A* x) {
  if constexpr (S == 1) return load(x);
  return unzip<A>(load(x), load(x + kLanes<A>)).even;
}

template <int first, class V, size_t... I>
DFM_INLINE inline V lanes_of(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (first + I)...);
}

// Vec<A> x[K] of every<S>(from + b): out of two aligned vectors where a vector is a line, as loads
// that straddle lines take twice as long.
template <int K, int S, class A>
DFM_INLINE inline void load_taps(const A* from, Vec<A>* x) {
  constexpr int lanes = kLanes<A>;
  if constexpr (S == 1 && kVectorBytes == 64) {
    const Vec<A> a = load(from), b = load(from + lanes);
    unrolled<K>([&](auto k)
                    DFM_INLINE { x[k] = lanes_of<k>(a, b, std::make_index_sequence<lanes>{}); });
  } else {
    unrolled<K>([&](auto k) DFM_INLINE { x[k] = every<S>(from + k); });
  }
}

// Elements of a padded row, whose first is what the first tap of the first output pixel sees.
template <class A>
int64_t padded_row(const Window& g, int kernel, int stride) {
  const int64_t out = (g.out_width + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  const int64_t seen = std::max(out * stride + kernel + kLanes<A>, g.pad_w + g.width);
  return (seen + 15) / 16 * 16;
}

// Up to kPlaneRows rows of output of a plane; padded.
template <int K, int S, bool whole, class A, class To>
void convolve_plane_rows(const Window& g, const A* const* row, const A* weights, A bias, To* to,
                         int rows) {
  constexpr int rows_in = (kPlaneRows - 1) * S + K;
  constexpr bool held = K == 3;  // in registers
  Vec<A> w[held ? K * K : 1];
  if constexpr (held)
    for (int t = 0; t < K * K; ++t) w[t] = Vec<A>{} + weights[t];
  for_vectors<A>(g.out_width, [&](int64_t at, auto count) DFM_INLINE {
    Vec<A> sum[kPlaneRows];
    unrolled<kPlaneRows>([&](auto r) DFM_INLINE { sum[r] = Vec<A>{} + bias; });
    auto add_row = [&](auto i) DFM_INLINE {
      Vec<A> x[K];
      load_taps<K, S>(row[i] + at * S, x);
      unrolled<kPlaneRows>([&](auto r) DFM_INLINE {
        const int a = i - r * S;
        if (a < 0 || a >= K) return;
        if constexpr (held) {
          unrolled<K>([&](auto b) DFM_INLINE { sum[r] += w[a * K + b] * x[b]; });
        } else {
          Vec<A> some = {};
          unrolled<K>([&](auto b) DFM_INLINE { some += weights[a * K + b] * x[b]; });
          sum[r] += some;
        }
      });
    };
    if constexpr (K == 3)
      unrolled<rows_in>(add_row);
    else
      for (int i = 0; i < rows_in; ++i) add_row(i);
    unrolled<kPlaneRows>([&](auto r) DFM_INLINE { settle(sum[r]); });
    unrolled<kPlaneRows>([&](auto r) DFM_INLINE {
      if (whole || r < rows) round_store(to + r * g.out_width + at, sum[r], count);
    });
  });
}

// The same of 3 x 3 at stride 1 with a column of padding, where the rows of the map lie: every
// vector is loaded once, and what lies beside it comes from its neighbours, which are registers.
template <bool whole, class T, class A, class To>
void convolve_map_rows(int64_t width, const T* const* row, const A* weights, A bias, To* to,
                       int rows) {
  constexpr int lanes = kLanes<A>, rows_in = kPlaneRows + 2;
  constexpr std::make_index_sequence<lanes> every_lane;
  Vec<A> w[9], previous[rows_in] = {}, here[rows_in];
  for (int t = 0; t < 9; ++t) w[t] = Vec<A>{} + weights[t];
  for (int i = 0; i < rows_in; ++i)
    here[i] = width < lanes ? load(row[i], static_cast<int>(width)) : load(row[i]);
  // load_next(pointer) is the vector that begins there, as far as there is one.
  auto step = [&](int64_t at, auto count, const auto& load_next) DFM_INLINE {
    Vec<A> sum[kPlaneRows];
    unrolled<kPlaneRows>([&](auto r) DFM_INLINE { sum[r] = Vec<A>{} + bias; });
    unrolled<rows_in>([&](auto i) DFM_INLINE {
      const Vec<A> next = load_next(row[i] + at + lanes);
      const Vec<A> x[3] = {lanes_of<lanes - 1>(previous[i], here[i], every_lane), here[i],
                           lanes_of<1>(here[i], next, every_lane)};
      unrolled<kPlaneRows>([&](auto r) DFM_INLINE {
        const int a = i - r;
        if (a < 0 || a >= 3) return;
        unrolled<3>([&](auto b) DFM_INLINE { sum[r] += w[a * 3 + b] * x[b]; });
      });
      previous[i] = here[i], here[i] = next;
    });
    unrolled<kPlaneRows>([&](auto r) DFM_INLINE { settle(sum[r]); });
    unrolled<kPlaneRows>([&](auto r) DFM_INLINE {
      if (whole || r < rows) round_store(to + r * width + at, sum[r], count);
    });
  };
  auto none = [](const T*) DFM_INLINE { return Vec<A>{}; };
  int64_t at = 0;
  for (; at + 2 * lanes <= width; at += lanes)
    step(at, Whole<A>{}, [](const T* p) DFM_INLINE { return load(p); });
  if (at + lanes < width) {
    const int rest = static_cast<int>(width - at - lanes);
    step(at, Whole<A>{}, [=](const T* p) DFM_INLINE { return load(p, rest); });
    at += lanes;
  }
  if (at + lanes == width)
    step(at, Whole<A>{}, none);
  else
    step(at, static_cast<int>(width - at), none);
}

}  // namespace dfm_fast
