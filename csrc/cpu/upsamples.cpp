// CPU operators of the family `upsamples`; the definition is dfm_fast/ops/upsamples.py.
//
// Nine products in float, whatever the storage type: x's differences are not rounded. Bands of rows
// keep maps and products within the caches. Along an axis, with s = k0 + k1 + k2 and
// d[i] = x[i] - x[i-1], of which there is one more than pixels:
//
//   y[2i] = s x[i] - k0 d[i],  y[2i+1] = s x[i] + k2 d[i+1]
//
// so four maps (x or d of rows, x or d of columns) times 1, 2, 2 and 4 matrices.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "channel_maps.h"
#include "products.h"

namespace dfm_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kBand = 1024;  // pixels of x, at least where there are so many

// --- Weights ---

// Of one pair of channels: w[3][3] -> t w tᵀ, t = (1 1 1 / -1 0 0 / 0 0 1), in the order in which
// products are stacked: (s, s), (s, d), (d, s), (d, d).
template <class V>
DFM_INLINE inline void transform(const V (&w)[9], V (&k)[9]) {
  V sum[3];
  for (int c = 0; c < 3; ++c) sum[c] = w[c] + w[3 + c] + w[6 + c];
  k[0] = sum[0] + sum[1] + sum[2];
  k[1] = -sum[0], k[2] = sum[2];
  k[3] = -(w[0] + w[1] + w[2]), k[4] = w[6] + w[7] + w[8];
  k[5] = w[0], k[6] = -w[2], k[7] = -w[6], k[8] = w[8];
}

// weight [O, C, 3, 3] -> [9, O, C]
template <class T>
void transform_weights(const Tensor& weight, acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t O = weight.size(0), C = weight.size(1), stride = O * C;
  const T* from = data<T>(weight);
  const bool last = layout_of(weight) != at::MemoryFormat::Contiguous;
  parallel(O, 9 * C, [&](int64_t o) {
    const T* w = from + o * C * 9;
    A* k = to + o * C;
    if (last)
      return for_vectors<A>(C, [=](int64_t c, auto count) DFM_INLINE {
        Vec<A> taps[9], sums[9];
        for (int i = 0; i < 9; ++i) taps[i] = load(w + i * C + c, count);
        transform(taps, sums);
        for (int i = 0; i < 9; ++i) store(k + i * stride + c, sums[i], count);
      });
    for (int64_t c = 0; c < C; ++c) {
      A taps[9], sums[9];
      for (int i = 0; i < 9; ++i) taps[i] = load_one(w + c * 9 + i);
      transform(taps, sums);
      for (int i = 0; i < 9; ++i) k[i * stride + c] = sums[i];
    }
  });
}

// --- Maps ---

struct Sizes {
  int64_t channels, height, width, outputs;
  bool last;
};

// Rows of x and of its differences, [rows, columns, C] or [C, rows, columns] as x: `rows` and
// `width` of x, one more of differences.
template <class A>
struct Band {
  int64_t first, rows;
  A *xx, *xd, *dx, *dd;
};

template <class T>
void differences_last(const Sizes& s, const T* x, const Band<acc_t<T>>& band) {
  using A = acc_t<T>;
  const int64_t C = s.channels, W = s.width;
  parallel(band.rows + 1, 4 * W * C, [&](int64_t row) {
    const int64_t i = band.first + row;
    const T* above = i > 0 ? x + (i - 1) * W * C : nullptr;
    const T* here = i < s.height ? x + i * W * C : nullptr;
    for (int64_t j = 0; j <= W; ++j)
      for_vectors<A>(C, [&](int64_t c, auto count) DFM_INLINE {
        auto at = [&](const T* line, int64_t j) DFM_INLINE {
          return line && j >= 0 && j < W ? load(line + j * C + c, count) : Vec<A>{};
        };
        Vec<A> v = at(here, j), left = at(here, j - 1);
        Vec<A> up = v - at(above, j), up_left = left - at(above, j - 1);
        if (row < band.rows) {
          if (j < W) store(band.xx + (row * W + j) * C + c, v, count);
          store(band.xd + (row * (W + 1) + j) * C + c, v - left, count);
        }
        if (j < W) store(band.dx + (row * W + j) * C + c, up, count);
        store(band.dd + (row * (W + 1) + j) * C + c, up - up_left, count);
      });
  });
}

// A row with a zero before and after it; all zeros outside of the map.
template <class T>
void padded_row(const T* plane, int64_t i, const Sizes& s, acc_t<T>* to) {
  std::fill(to, to + s.width + 2, acc_t<T>(0));
  if (i >= 0 && i < s.height) convert_row(to + 1, plane + i * s.width, s.width);
}

template <class T>
void differences_planes(const Sizes& s, const T* x, const Band<acc_t<T>>& band) {
  using A = acc_t<T>;
  const int64_t W = s.width, R = band.rows;
  parallel(s.channels, 4 * W * R, [&](int64_t c) {
    const T* plane = x + c * s.height * W;
    std::vector<A> lines(2 * (W + 2));
    A *above = lines.data(), *here = above + W + 2;
    padded_row(plane, band.first - 1, s, here);
    for (int64_t row = 0; row <= R; ++row) {
      std::swap(above, here);
      padded_row(plane, band.first + row, s, here);
      if (row < R) {
        convert_row(band.xx + (c * R + row) * W, here + 1, W);
        A* xd = band.xd + (c * R + row) * (W + 1);
        for_vectors<A>(W + 1, [=](int64_t j, auto count) DFM_INLINE {
          store(xd + j, load(here + 1 + j, count) - load(here + j, count), count);
        });
      }
      A* dx = band.dx + (c * (R + 1) + row) * W;
      for_vectors<A>(W, [=](int64_t j, auto count) DFM_INLINE {
        store(dx + j, load(here + 1 + j, count) - load(above + 1 + j, count), count);
      });
      A* dd = band.dd + (c * (R + 1) + row) * (W + 1);
      for_vectors<A>(W + 1, [=](int64_t j, auto count) DFM_INLINE {
        Vec<A> right = load(here + 1 + j, count) - load(above + 1 + j, count);
        store(dd + j, right - (load(here + j, count) - load(above + j, count)), count);
      });
    }
  });
}

// --- Products back to outputs ---

// As Band: the products of its four maps, of 1, 2, 2 and 4 times as many channels.
template <class A>
struct Products {
  const A *ss, *sd, *ds, *dd;
};

template <class T>
void combine_last(const Sizes& s, const Band<acc_t<T>>& band, const Products<acc_t<T>>& m,
                  const acc_t<T>* bias, T* y) {
  using A = acc_t<T>;
  const int64_t O = s.outputs, W = s.width;
  parallel(2 * band.rows, 8 * W * O, [&](int64_t line) {
    const int64_t row = line / 2, a = line % 2;
    for (int64_t j = 0; j < W; ++j) {
      T* to = y + ((2 * band.first + line) * 2 * W + 2 * j) * O;
      const A *ss = m.ss + (row * W + j) * O, *ds = m.ds + (((row + a) * W + j) * 2 + a) * O;
      const A* sd = m.sd + (row * (W + 1) + j) * 2 * O;
      const A* dd = m.dd + (((row + a) * (W + 1) + j) * 4 + 2 * a) * O;
      for_vectors<A>(O, [=](int64_t o, auto count) DFM_INLINE {
        Vec<A> both = load(ss + o, count) + load(ds + o, count) + load(bias + o, count);
        store(to + o, both + load(sd + o, count) + load(dd + o, count), count);
        // One pixel on, and the second matrix of its pair.
        Vec<A> odd = load(sd + 3 * O + o, count) + load(dd + 5 * O + o, count);
        store(to + O + o, both + odd, count);
      });
    }
  });
}

template <class T>
void combine_planes(const Sizes& s, const Band<acc_t<T>>& band, const Products<acc_t<T>>& m,
                    const acc_t<T>* bias, T* y) {
  using A = acc_t<T>;
  const int64_t O = s.outputs, W = s.width, R = band.rows, lanes = kLanes<A>;
  parallel(O, 16 * W * R, [&](int64_t o) {
    std::vector<A> both(2 * (W + lanes));
    for (int64_t line = 0; line < 2 * R; ++line) {
      const int64_t row = line / 2, a = line % 2;
      const A *ss = m.ss + (o * R + row) * W;
      const A *ds = m.ds + ((a * O + o) * (R + 1) + row + a) * W;
      auto sd = [&](int64_t b) { return m.sd + ((b * O + o) * R + row) * (W + 1) + b; };
      auto dd = [&](int64_t b) {
        return m.dd + (((2 * a + b) * O + o) * (R + 1) + row + a) * (W + 1) + b;
      };
      const A *sd0 = sd(0), *sd1 = sd(1), *dd0 = dd(0), *dd1 = dd(1);
      A* to = both.data();
      const A constant = bias[o];
      for_vectors<A>(W, [=](int64_t j, auto count) DFM_INLINE {
        Vec<A> v = load(ss + j, count) + load(ds + j, count) + constant;
        store_zipped<A>(to + 2 * j, v + load(sd0 + j, count) + load(dd0 + j, count),
                        v + load(sd1 + j, count) + load(dd1 + j, count));
      });
      convert_row(y + (o * 2 * s.height + 2 * band.first + line) * 2 * W, to, 2 * W);
    }
  });
}

// --- Forward ---

// x's map times `count` matrices: [pixels, count O], or [count O, pixels].
template <class A>
Tensor products_of(const Sizes& s, const Tensor& map, const Tensor& kernels, int64_t first,
                   int64_t count, int64_t pixels) {
  Tensor k = kernels.narrow(0, first * s.outputs, count * s.outputs);
  const int64_t C = s.channels;
  Tensor m = map.narrow(0, 0, pixels * C);
  if (s.last) return product(m.view({pixels, C}), k);
  return product(k, m.view({C, pixels}).t());
}

template <class T>
void forward(const Sizes& s, const Tensor& x, const Tensor& kernels, const Tensor& bias,
             const Tensor& y) {
  using A = acc_t<T>;
  const int64_t C = s.channels, H = s.height, W = s.width;
  const int64_t most = std::min(H, std::max<int64_t>(1, kBand / W));
  auto buffer = [&](int64_t rows, int64_t columns) {
    return at::empty({rows * columns * C}, kernels.options());
  };
  Tensor xx = buffer(most, W), xd = buffer(most, W + 1), dx = buffer(most + 1, W);
  Tensor dd = buffer(most + 1, W + 1);
  for (int64_t n = 0; n < x.size(0); ++n) {
    const T* from = data<T>(x) + n * C * H * W;
    T* to = mutable_data<T>(y) + n * s.outputs * 4 * H * W;
    for (int64_t first = 0; first < H; first += most) {
      const int64_t R = std::min(most, H - first);
      Band<A> band{first, R, mutable_data<A>(xx), mutable_data<A>(xd), mutable_data<A>(dx),
                   mutable_data<A>(dd)};
      s.last ? differences_last<T>(s, from, band) : differences_planes<T>(s, from, band);
      Tensor m[4] = {products_of<A>(s, xx, kernels, 0, 1, R * W),
                     products_of<A>(s, xd, kernels, 1, 2, R * (W + 1)),
                     products_of<A>(s, dx, kernels, 3, 2, (R + 1) * W),
                     products_of<A>(s, dd, kernels, 5, 4, (R + 1) * (W + 1))};
      Products<A> products{data<A>(m[0]), data<A>(m[1]), data<A>(m[2]), data<A>(m[3])};
      s.last ? combine_last<T>(s, band, products, data<A>(bias), to)
             : combine_planes<T>(s, band, products, data<A>(bias), to);
    }
  }
}

Tensor upsample_conv2d_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(layout_of(x)) && weight.dim() == 4 &&
                  weight.is_contiguous(layout_of(weight)) && weight.size(1) == x.size(1) &&
                  weight.size(2) == 3 && weight.size(3) == 3,
              "upsample_conv2d: expected x [N, C, H, W] and weight [O, C, 3, 3], got ", x.sizes(),
              " and ", weight.sizes());
  PlainCalls plain;
  const Sizes s{x.size(1), x.size(2), x.size(3), weight.size(0),
                layout_of(x) != at::MemoryFormat::Contiguous};
  Tensor y = at::empty({x.size(0), s.outputs, 2 * s.height, 2 * s.width}, x.options(), layout_of(x));
  auto wide = x.options().dtype(accumulation(x));
  Tensor kernels = at::empty({9 * s.outputs, s.channels}, wide);
  Tensor b = bias ? bias->to(accumulation(x)).contiguous() : at::zeros({s.outputs}, wide);
  dispatch(x.scalar_type(), "upsample_conv2d", [&](auto t) {
    using T = decltype(t);
    transform_weights<T>(weight, mutable_data<acc_t<T>>(kernels));
    forward<T>(s, x, kernels, b, y);
  });
  return y;
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) { m.impl("upsample_conv2d", upsample_conv2d_cpu); }

}  // namespace
}  // namespace dfm_fast
