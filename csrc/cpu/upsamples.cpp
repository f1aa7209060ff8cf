// CPU operators of the family `upsamples`; the definition is dfm_fast/ops/upsamples.py.
//
// Nine products in float, whatever the storage type, so that neither x's differences nor sums of
// taps are rounded. Along an axis, with s = k0 + k1 + k2 and d[i] = x[i] - x[i-1]:
//
//   y[2i] = s x[i] - k0 d[i],  y[2i+1] = s x[i] + k2 d[i+1]
//
// so there are four maps (x or d of rows, x or d of columns) for 1, 2, 2 and 4 matrices. A task is
// a band of rows: its maps, then for every panel of output channels the nine products and their
// sums.
//
// Versions, against interpolate + conv2d (2x256x64², float / bf16): one 2x2 convolution of 4 O
// channels by oneDNN and a copy that interleaves its phases 1.7 / 2.0; nine products by oneDNN 2.9
// / 1.6, whose error is 1.5 to 2 times the budget; these, in bands, within it.
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "channel_maps.h"
#include "matrices.h"
#include "products.h"

namespace dfm_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kBand = 128;  // pixels of x in a task, at most if a row is not longer

struct Sizes {
  int64_t channels, height, width, outputs;
  bool last;
};

// --- Weights ---

// Of one pair of channels: w[3][3] -> t w tᵀ, t = (1 1 1 / -1 0 0 / 0 0 1), in the order of the
// products: (s, s), (s, d), (d, s), (d, d).
template <class V>
DFM_INLINE inline void transform(const V (&w)[9], V (&k)[9]) {
  V sum[3];
  for (int c = 0; c < 3; ++c) sum[c] = w[c] + w[3 + c] + w[6 + c];
  k[0] = sum[0] + sum[1] + sum[2];
  k[1] = -sum[0], k[2] = sum[2];
  k[3] = -(w[0] + w[1] + w[2]), k[4] = w[6] + w[7] + w[8];
  k[5] = w[0], k[6] = -w[2], k[7] = -w[6], k[8] = w[8];
}

// weight [O, C, 3, 3] or [O, 3, 3, C] -> panels [O / kPanel, 9, C, kPanel]
template <class T>
void pack_weights(const Sizes& s, const Tensor& weight, acc_t<T>* panels) {
  using A = acc_t<T>;
  constexpr int64_t some = 16;  // channels whose taps stay in the first-level cache
  const int64_t O = s.outputs, C = s.channels, size = 9 * C * kPanel<A>;
  const bool last = layout_of(weight) != at::MemoryFormat::Contiguous;
  const int64_t tap = (last ? some : 1) * kPanel<A>, channel = (last ? 1 : 9) * kPanel<A>;
  at::parallel_for(0, panels_of(O, kPanel<A>), 1, [&](int64_t begin, int64_t end) {
    const Aligned<A> taps(9 * some * kPanel<A>);
    for (int64_t i = begin * C; i < end * C; i += std::min(some, C - i % C)) {
      const int64_t first = i / C * kPanel<A>, c = i % C, n = std::min(some, C - c);
      const T* from = data<T>(weight) + first * 9 * C;
      if (last)
        for (int t = 0; t < 9; ++t)
          pack_panel(n, O - first, from + t * C + c, 9 * C, &taps[t * tap]);
      else
        pack_panel(9 * n, O - first, from + 9 * c, 9 * C, taps.data());
      A* to = panels + i / C * size + c * kPanel<A>;
      for (int64_t k = 0; k < n; ++k, to += kPanel<A>)
        for_vectors<A>(kPanel<A>, [&](int64_t v, auto count) DFM_INLINE {
          Vec<A> w[9], sums[9];
          for (int t = 0; t < 9; ++t) w[t] = load(&taps[t * tap + k * channel + v], count);
          transform(w, sums);
          for (int q = 0; q < 9; ++q) store(to + q * C * kPanel<A> + v, sums[q], count);
        });
    }
  });
}

// --- Maps of a band ---

// [rows, columns, ld]: `rows` and `width` of x, one more of differences. A row of `ld` has more
// than C numbers: powers of two would meet in one place of the first-level cache.
template <class A>
struct Maps {
  int64_t first, rows, ld;
  Aligned<A> lines;  // rows first - 1 and on, one above the other: [2, width + 2, ld]
  Aligned<A> xx, xd, dx, dd;

  Maps(const Sizes& s, int64_t most)
      : first(0),
        rows(0),
        ld((s.channels + 15) / 16 * 16 + 16),
        lines(2 * (s.width + 2) * ld),
        xx(most * s.width * ld),
        xd(most * (s.width + 1) * ld),
        dx((most + 1) * s.width * ld),
        dd((most + 1) * (s.width + 1) * ld) {}
};

// Row i of x as [width + 2, ld], with zeros around it; all zeros outside of the map.
template <class T>
void load_row(const Sizes& s, const T* x, int64_t i, int64_t ld, acc_t<T>* to) {
  const int64_t C = s.channels, W = s.width;
  if (i < 0 || i >= s.height) return std::fill(to, to + (W + 2) * ld, acc_t<T>(0));
  std::fill(to, to + ld, acc_t<T>(0));
  std::fill(to + (W + 1) * ld, to + (W + 2) * ld, acc_t<T>(0));
  if (!s.last) return transpose_rows(x + i * W, s.height * W, C, W, to + ld, ld);
  for (int64_t j = 0; j < W; ++j) convert_row(to + (j + 1) * ld, x + (i * W + j) * C, C);
}

template <class T>
void make_maps(const Sizes& s, const T* x, Maps<acc_t<T>>& m) {
  using A = acc_t<T>;
  const int64_t W = s.width, ld = m.ld, line = (W + 2) * ld;
  A *above = m.lines.data(), *here = above + line;
  load_row(s, x, m.first - 1, ld, here);
  for (int64_t row = 0; row <= m.rows; ++row) {
    std::swap(above, here);
    load_row(s, x, m.first + row, ld, here);
    for (int64_t j = 0; j <= W; ++j) {
      const A *left = here + j * ld, *up_left = above + j * ld;
      A *xx = &m.xx[0] + (row * W + j) * ld, *xd = &m.xd[0] + (row * (W + 1) + j) * ld;
      A *dx = &m.dx[0] + (row * W + j) * ld, *dd = &m.dd[0] + (row * (W + 1) + j) * ld;
      const bool rows = row < m.rows, columns = j < W;
      for_vectors<A>(s.channels, [=](int64_t c, auto count) DFM_INLINE {
        Vec<A> v = load(left + ld + c, count), l = load(left + c, count);
        Vec<A> up = v - load(up_left + ld + c, count), up_l = l - load(up_left + c, count);
        if (rows && columns) store(xx + c, v, count);
        if (rows) store(xd + c, v - l, count);
        if (columns) store(dx + c, up, count);
        store(dd + c, up - up_l, count);
      });
    }
  }
}

// --- Products of a band and a panel ---

// Nine tiles [pixels, kPanel], in the order of the matrices. Those of differences of rows begin one
// row on where they make odd rows, so a place is that of an output; those of differences of columns
// have one pixel more in a row.
template <class A>
struct Tiles {
  int64_t size;
  Aligned<A> memory;

  Tiles(const Sizes& s, int64_t most) : size(most * (s.width + 1) * kPanel<A>), memory(9 * size) {}
  A* operator[](int q) { return memory.data() + q * size; }
};

template <class A>
void multiply(const Sizes& s, const Maps<A>& m, const A* panel, Tiles<A>& tiles) {
  const int64_t C = s.channels, W = s.width, matrix = C * kPanel<A>;
  auto one = [&](int q, const A* map, int64_t columns) {
    multiply_panel(m.rows * columns, C, map, m.ld, panel + q * matrix, tiles[q], kPanel<A>);
  };
  one(0, m.xx.data(), W);
  for (int b = 0; b < 2; ++b) one(1 + b, m.xd.data(), W + 1);
  for (int a = 0; a < 2; ++a) one(3 + a, m.dx.data() + a * W * m.ld, W);
  for (int a = 0; a < 2; ++a)
    for (int b = 0; b < 2; ++b) one(5 + 2 * a + b, m.dd.data() + a * (W + 1) * m.ld, W + 1);
}

// f(i, even, odd, count) for the two outputs of pixel j of a row: vectors of a panel from channel
// i.
template <class A, class F>
DFM_INLINE inline void combine(const Sizes& s, Tiles<A>& tiles, const A* bias, int64_t columns,
                               int64_t row, int64_t a, int64_t j, F f) {
  const int64_t at = (row * s.width + j) * kPanel<A>, next = kPanel<A>;
  const int64_t wide = (row * (s.width + 1) + j) * kPanel<A>;
  const A *ss = tiles[0] + at, *ds = tiles[3 + a] + at;
  const A *sd0 = tiles[1] + wide, *sd1 = tiles[2] + wide + next;
  const A *dd0 = tiles[5 + 2 * a] + wide, *dd1 = tiles[6 + 2 * a] + wide + next;
  for_vectors<A>(columns, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> both = load(ss + i, count) + load(ds + i, count) + load(bias + i, count);
    f(i, both + (load(sd0 + i, count) + load(dd0 + i, count)),
      both + (load(sd1 + i, count) + load(dd1 + i, count)), count);
  });
}

template <class T>
void store_last(const Sizes& s, const Maps<acc_t<T>>& m, Tiles<acc_t<T>>& tiles,
                const acc_t<T>* bias, int64_t first, T* y) {
  using A = acc_t<T>;
  const int64_t O = s.outputs, W = s.width, columns = std::min(O - first, kPanel<A>);
  for (int64_t line = 0; line < 2 * m.rows; ++line)
    for (int64_t j = 0; j < W; ++j) {
      T* to = y + ((2 * m.first + line) * 2 * W + 2 * j) * O + first;
      combine<A>(s, tiles, bias + first, columns, line / 2, line % 2, j,
                 [=](int64_t i, Vec<A> even, Vec<A> odd, auto count) DFM_INLINE {
                   store(to + i, even, count);
                   store(to + O + i, odd, count);
                 });
    }
}

// `row`: 2 width pixels of a panel, before they become rows of planes.
template <class T>
void store_planes(const Sizes& s, const Maps<acc_t<T>>& m, Tiles<acc_t<T>>& tiles,
                  const acc_t<T>* bias, int64_t first, acc_t<T>* row, T* y) {
  using A = acc_t<T>;
  const int64_t W = s.width, columns = std::min(s.outputs - first, kPanel<A>);
  for (int64_t line = 0; line < 2 * m.rows; ++line) {
    for (int64_t j = 0; j < W; ++j)
      combine<A>(s, tiles, bias + first, columns, line / 2, line % 2, j,
                 [=](int64_t i, Vec<A> even, Vec<A> odd, auto count) DFM_INLINE {
                   store(row + 2 * j * kPanel<A> + i, even, count);
                   store(row + (2 * j + 1) * kPanel<A> + i, odd, count);
                 });
    T* to = y + (first * 2 * s.height + 2 * m.first + line) * 2 * W;
    transpose_rows(row, kPanel<A>, 2 * W, columns, to, 4 * s.height * W);
  }
}

// --- Forward ---

template <class T>
void forward(const Sizes& s, const Tensor& x, const acc_t<T>* panels, const acc_t<T>* bias, T* y) {
  using A = acc_t<T>;
  const int64_t C = s.channels, H = s.height, W = s.width, panel = 9 * C * kPanel<A>;
  const int64_t most = std::min(H, std::max<int64_t>(1, kBand / W)), bands = (H + most - 1) / most;
  at::parallel_for(0, x.size(0) * bands, 1, [&](int64_t begin, int64_t end) {
    Maps<A> maps(s, most);
    Tiles<A> tiles(s, most);
    const Aligned<A> row(2 * W * kPanel<A>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / bands;
      T* to = y + n * s.outputs * 4 * H * W;
      maps.first = i % bands * most;
      maps.rows = std::min(most, H - maps.first);
      make_maps(s, data<T>(x) + n * C * H * W, maps);
      for (int64_t first = 0; first < s.outputs; first += kPanel<A>) {
        multiply(s, maps, panels + first / kPanel<A> * panel, tiles);
        s.last ? store_last<T>(s, maps, tiles, bias, first, to)
               : store_planes<T>(s, maps, tiles, bias, first, row.data(), to);
      }
    }
  });
}

Tensor upsample_conv2d_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(layout_of(x)) && weight.dim() == 4 &&
                  weight.is_contiguous(layout_of(weight)) && weight.size(1) == x.size(1) &&
                  weight.size(2) == 3 && weight.size(3) == 3,
              "upsample_conv2d: expected x [N, C, H, W] and weight [O, C, 3, 3], got ", x.sizes(),
              " and ", weight.sizes());
  const Sizes s{x.size(1), x.size(2), x.size(3), weight.size(0),
                layout_of(x) != at::MemoryFormat::Contiguous};
  Tensor y =
      at::empty({x.size(0), s.outputs, 2 * s.height, 2 * s.width}, x.options(), layout_of(x));
  dispatch(x.scalar_type(), "upsample_conv2d", [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const int64_t panels = panels_of(s.outputs, kPanel<A>);
    std::vector<A> biases(s.outputs);
    if (bias) convert_row(biases.data(), data<T>(*bias), s.outputs);
    Tensor packed =
        at::empty({panels * 9 * s.channels * kPanel<A>}, x.options().dtype(accumulation(x)));
    pack_weights<T>(s, weight, mutable_data<A>(packed));
    forward<T>(s, x, data<A>(packed), biases.data(), mutable_data<T>(y));
  });
  return y;
}

// --- Backward ---

// dy [N, O, 2H, 2W] -> [N, 4 O, H + 1, W + 1] in channels_last: what a 2x2 convolution with padding
// 1 gives for four phases, 0 where no output comes from.
template <class T>
void split_phases(const Sizes& s, int64_t samples, const T* dy, T* to) {
  const int64_t O = s.outputs, H = s.height, W = s.width;
  parallel(samples * (H + 1), (W + 1) * 4 * O, [&](int64_t line) {
    const int64_t n = line / (H + 1), i = line % (H + 1);
    const T* sample = dy + n * O * 4 * H * W;
    T* row = to + line * (W + 1) * 4 * O;
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t y = 2 * i - k / 2;  // of phase a = k / 2: row 2 (i - a) + a
      for (int64_t j = 0; j <= W; ++j) {
        const int64_t x = 2 * j - k % 2;
        T* pixel = row + (j * 4 + k) * O;
        if (y < 0 || y >= 2 * H || x < 0 || x >= 2 * W)
          std::fill(pixel, pixel + O, T{});
        else if (s.last)
          std::copy_n(sample + (y * 2 * W + x) * O, O, pixel);
        else
          for (int64_t o = 0; o < O; ++o) pixel[o] = sample[(o * 2 * H + y) * 2 * W + x];
      }
    }
  });
}

// {dx, dweight} of the 2x2 convolution of the phases, those wanted.
using Gradients = std::array<Tensor, 2>;

// By four products of MKL, one for each tap of the phases. (oneDNN's convolution adds up its
// products one after the other: of 8192 floats, 512 outputs, the rounding error is 2.6 times the
// budget. And its weights' gradient depends on the number of threads.)
Gradients by_products(const Sizes& s, const Tensor& phases, const Tensor& x, const Tensor& kernels,
                      bool need_dx, bool need_dweight) {
  const Tensor from = phases.permute({0, 2, 3, 1});  // [N, H + 1, W + 1, 4 O]
  const int64_t n = from.size(0), rows = n * s.height * s.width;
  const Tensor pixels = x.permute({0, 2, 3, 1}).reshape({rows, s.channels});
  Tensor dx, dweight = need_dweight ? at::empty(kernels.sizes(), kernels.options()) : Tensor();
  for (int64_t p = 0; p < 2; ++p)
    for (int64_t q = 0; q < 2; ++q) {
      const Tensor seen = from.narrow(1, 1 - p, s.height).narrow(2, 1 - q, s.width);
      const Tensor dy = seen.reshape({rows, from.size(3)});
      const Tensor kernel = kernels.select(3, q).select(2, p);  // [4 O, C]
      if (need_dx) dx = dx.defined() ? dx.addmm_(dy, kernel) : dy.mm(kernel);
      if (need_dweight) dweight.select(3, q).select(2, p).copy_(dy.t().mm(pixels));
    }
  if (need_dx) dx = dx.view({n, s.height, s.width, s.channels}).permute({0, 3, 1, 2});
  return {dx, dweight};
}

// Half precision: oneDNN's, or torch's of float where it has none.
Gradients by_convolution(const Tensor& phases, const Tensor& x, const Tensor& kernels, bool need_dx,
                         bool need_dweight) {
  auto found = at::convolution_backward(phases, x, kernels, std::nullopt, {1, 1}, {1, 1}, {1, 1},
                                        false, {0, 0}, 1, {need_dx, need_dweight, false});
  return {std::get<0>(found), std::get<1>(found)};
}

std::tuple<Tensor, Tensor, Tensor> upsample_conv2d_backward_cpu(const Tensor& dy, const Tensor& x,
                                                                const Tensor& weight, bool need_dx,
                                                                bool need_dweight) {
  PlainCalls plain;
  const auto layout = layout_of(x), last = at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(layout) && dy.is_contiguous(layout) &&
                  dy.scalar_type() == x.scalar_type(),
              "upsample_conv2d_backward: expected dy and x alike");
  const auto wide = accumulation(x);
  const auto dtype = onednn_multiplies(x.scalar_type()) ? x.scalar_type() : wide;
  const auto options = x.options().dtype(wide);
  Tensor dx = need_dx ? at::empty(x.sizes(), x.options(), layout) : at::empty({0}, x.options());
  Tensor dweight = need_dweight ? at::empty(weight.sizes(), options) : at::empty({0}, options);
  Tensor dbias = dy.sum({0, 2, 3}, false, wide);
  if (!x.numel()) return {dx, dweight.zero_(), dbias};
  const Sizes s{x.size(1), x.size(2), x.size(3), weight.size(0),
                layout != at::MemoryFormat::Contiguous};
  Tensor phases =
      at::empty({x.size(0), 4 * s.outputs, s.height + 1, s.width + 1}, x.options(), last);
  dispatch(x.scalar_type(), "upsample_conv2d_backward", [&](auto t) {
    using T = decltype(t);
    split_phases(s, x.size(0), data<T>(dy), mutable_data<T>(phases));
  });
  // [a, p, k]: output 2 i + a sees pixel i + a - 1 + p under tap k
  const Tensor taps = at::tensor({1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1}, options).view({2, 2, 3});
  const Tensor sums = at::einsum("apk,bql,ockl->abocpq", {taps, taps, weight.to(wide)});
  const Tensor kernels = sums.reshape({4 * s.outputs, s.channels, 2, 2}).to(dtype).contiguous(last);
  phases = phases.to(dtype);
  const Tensor given = x.to(dtype).contiguous(last);
  const auto found = x.scalar_type() == wide
                         ? by_products(s, phases, given, kernels, need_dx, need_dweight)
                         : by_convolution(phases, given, kernels, need_dx, need_dweight);
  if (need_dx) dx.copy_(found[0]);
  if (need_dweight) {
    Tensor d = found[1].to(wide).contiguous().view({2, 2, s.outputs, s.channels, 2, 2});
    dweight.copy_(at::einsum("apk,bql,abocpq->ockl", {taps, taps, d}));
  }
  return {dx, dweight, dbias};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("upsample_conv2d", upsample_conv2d_cpu);
  m.impl("upsample_conv2d_backward", upsample_conv2d_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
