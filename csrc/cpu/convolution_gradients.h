// Gradients of the weights and the bias of a depthwise convolution.
#pragma once

#include "convolution_maps.h"

namespace dfm_fast {

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

}  // namespace dfm_fast
