// CPU operators of the family `group_norms`; the definition is dfm_fast/ops/group_norms.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "channel_maps.h"

namespace dfm_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kTogether = 1 << 19;  // bytes of a group that stay in the second-level cache

// --- The norm of a group, forward ---

// Everything [N, C] but rstd [N, G].
template <class A>
struct Norms {
  NormParameters<A> given;
  const A *mean, *m2;
  double eps;
  std::vector<A> scale, offset, centre, rstd;

  Norms(const Map& map, NormParameters<A> given, const A* mean, const A* m2, double eps)
      : given(given),
        mean(mean),
        m2(m2),
        eps(eps),
        scale(map.planes()),
        offset(map.planes()),
        centre(map.planes()),
        rstd(map.samples * map.groups) {}

  void group(const Map& map, int64_t i) {
    int64_t c = i % map.groups * map.size(), at = i / map.groups * map.channels + c;
    NormParameters<A> here = given.from(c);
    if (given.shift) here.shift = given.shift + at;
    rstd[i] = group_affine(map.pixels, map.size(), mean + at, m2 + at, here, eps, &scale[at],
                           &offset[at], &centre[at]);
  }
};

template <bool silu, class V>
inline V activate(V z) {
  if constexpr (silu) return z / one_and_exp(z);
  return z;
}

template <bool silu, class T>
void forward_plane(const T* x, T* y, int64_t n, acc_t<T> centre, acc_t<T> scale, acc_t<T> offset) {
  for_vectors<acc_t<T>>(n, [=](int64_t i, auto count) DFM_INLINE {
    store(y + i, activate<silu>((load(x + i, count) - centre) * scale + offset), count);
  });
}

template <bool silu, class T>
void forward_pixels(const T* x, T* y, int64_t n, int64_t channels, const acc_t<T>* centre,
                    const acc_t<T>* scale, const acc_t<T>* offset) {
  for (int64_t p = 0; p < n; ++p, x += channels, y += channels)
    for_vectors<acc_t<T>>(channels, [=](int64_t c, auto count) DFM_INLINE {
      auto d = load(x + c, count) - load(centre + c, count);
      auto z = d * load(scale + c, count) + load(offset + c, count);
      store(y + c, activate<silu>(z), count);
    });
}

// Whether a thread takes a group from its first pass to its last, within its cache. The arithmetic
// is the same either way.
bool together(const Map& map, int64_t bytes) {
  int64_t groups = map.samples * map.groups;
  return map.size() * map.pixels * bytes <= kTogether && groups >= at::get_num_threads();
}

template <bool silu, class T>
void forward(const Map& map, const T* x, T* y, Norms<acc_t<T>>& norms, acc_t<T>* mean,
             acc_t<T>* m2) {
  const int64_t groups = map.samples * map.groups, group = map.size() * map.pixels;
  auto apply = [&](int64_t plane) {
    int64_t at = plane * map.pixels;
    forward_plane<silu>(x + at, y + at, map.pixels, norms.centre[plane], norms.scale[plane],
                        norms.offset[plane]);
  };
  if (!map.last && together(map, 2 * sizeof(T))) {
    parallel(groups, group, [&](int64_t i) {
      for (int64_t c = i * map.size(); mean && c < (i + 1) * map.size(); ++c)
        statistics_plane(map, x, c, mean, m2);
      norms.group(map, i);
      for (int64_t c = i * map.size(); c < (i + 1) * map.size(); ++c) apply(c);
    });
    return;
  }
  if (mean) statistics(map, x, mean, m2);
  parallel(groups, map.size() * 16, [&](int64_t i) { norms.group(map, i); });
  if (!map.last) return parallel(map.planes(), map.pixels, apply);
  parallel_pixels(map, [&](int64_t n, int64_t, int64_t first, int64_t end) {
    int64_t at = (n * map.pixels + first) * map.channels, c = n * map.channels;
    forward_pixels<silu>(x + at, y + at, end - first, map.channels, &norms.centre[c],
                         &norms.scale[c], &norms.offset[c]);
  });
}

// --- Backward ---

template <bool silu, class V>
inline V slope(V dy, V z) {
  if constexpr (!silu) return dy;
  V s = 1 / one_and_exp(z);
  return dy * s * (1 + z * (1 - s));
}

// Where the arithmetic type is the storage type, dz waits in dx for the second pass; else it is
// computed twice, and nothing is rounded twice.
template <class T>
constexpr bool kStash = std::is_same_v<T, acc_t<T>>;

// What a pass over a plane or over pixels needs; scale, offset and centre are of a sample. D is T,
// or what it is computed with: a gradient that was not rounded on its way here.
template <class T, class D>
struct Backward {
  using A = acc_t<T>;
  const D* dy;
  const T* x;
  T* dx;  // null: not wanted
  const A *scale, *offset, *centre;

  template <bool silu, class V, class Count>
  DFM_INLINE V dz(int64_t i, V d, V scale, V offset, Count count) const {
    return slope<silu>(load(dy + i, count), V(d * scale + offset));
  }
};

// Sums of dz and dz (x - centre) of a plane.
template <bool silu, class T, class D>
Sums<2, double> backward_plane_sums(const Backward<T, D>& b, int64_t begin, int64_t n, int64_t c) {
  using A = acc_t<T>;
  const Vec<A> scale = Vec<A>{} + b.scale[c], offset = Vec<A>{} + b.offset[c];
  const A centre = b.centre[c];
  Sums<2, double> total = {};
  for (int64_t first = 0; first < n; first += kRowBlock) {
    const int64_t at = begin + first;
    auto sums = sum_row<2, A>(std::min(kRowBlock, n - first),
                              [=](int64_t i, auto count, Vec<A>(&sum)[2]) DFM_INLINE {
                                Vec<A> d = load(b.x + at + i, count) - centre;
                                Vec<A> dz = b.template dz<silu>(at + i, d, scale, offset, count);
                                if constexpr (kStash<T>)
                                  if (b.dx) store(b.dx + at + i, dz, count);
                                sum[0] += dz;  // dy is 0 in the lanes over the end
                                sum[1] += dz * d;
                              });
    for (int k = 0; k < 2; ++k) total.of[k] += sums.of[k];
  }
  return total;
}

// dx = scale dz + constant + slope (x - centre)
template <bool silu, class T, class D>
void backward_plane(const Backward<T, D>& b, int64_t begin, int64_t n, int64_t c, acc_t<T> constant,
                    acc_t<T> linear) {
  using A = acc_t<T>;
  const Vec<A> scale = Vec<A>{} + b.scale[c], offset = Vec<A>{} + b.offset[c];
  const A centre = b.centre[c];
  for_vectors<A>(n, [=](int64_t i, auto count) DFM_INLINE {
    Vec<A> d = load(b.x + begin + i, count) - centre, dz;
    if constexpr (kStash<T>)
      dz = load(b.dx + begin + i, count);
    else
      dz = b.template dz<silu>(begin + i, d, scale, offset, count);
    store(b.dx + begin + i, scale * dz + constant + linear * d, count);
  });
}

// The same of pixels: adds to sums [2, padded]; constant and linear are of the sample's channels.
template <bool silu, class T, class D>
void backward_pixel_sums(const Map& map, const Backward<T, D>& b, int64_t begin, int64_t pixels,
                         double* sums) {
  using A = acc_t<T>;
  const int64_t C = map.channels;
  for (int64_t block = 0; block < pixels; block += kChain) {
    const int64_t size = std::min(kChain, pixels - block), at = (begin + block) * C;
    for_channels<A, 2>(C, [&](int64_t c, auto count, auto vectors) DFM_INLINE {
      constexpr int K = vectors, lanes = kLanes<A>;
      Vec<A> s[K] = {}, q[K] = {}, scale[K], offset[K], centre[K];
      for (int k = 0; k < K; ++k) {
        scale[k] = load(b.scale + c + k * lanes, count);
        offset[k] = load(b.offset + c + k * lanes, count);
        centre[k] = load(b.centre + c + k * lanes, count);
      }
      for (int64_t i = at + c; i < at + c + size * C; i += C)
        for (int k = 0; k < K; ++k) {
          Vec<A> d = load(b.x + i + k * lanes, count) - centre[k];
          Vec<A> dz = b.template dz<silu>(i + k * lanes, d, scale[k], offset[k], count);
          if constexpr (kStash<T>)
            if (b.dx) store(b.dx + i + k * lanes, dz, count);
          s[k] += dz;
          q[k] += dz * d;
        }
      for (int k = 0; k < K; ++k) {
        double *to = sums + c + k * lanes, *squares = to + map.padded();
        for (int i = 0; i < lanes; ++i) to[i] += s[k][i], squares[i] += q[k][i];
      }
    });
  }
}

template <bool silu, class T, class D>
void backward_pixels(const Map& map, const Backward<T, D>& b, int64_t begin, int64_t pixels,
                     const acc_t<T>* constant, const acc_t<T>* linear) {
  using A = acc_t<T>;
  const int64_t C = map.channels;
  for (int64_t at = begin * C; at < (begin + pixels) * C; at += C)
    for_vectors<A>(C, [=](int64_t c, auto count) DFM_INLINE {
      Vec<A> d = load(b.x + at + c, count) - load(b.centre + c, count);
      Vec<A> scale = load(b.scale + c, count), dz;
      if constexpr (kStash<T>)
        dz = load(b.dx + at + c, count);
      else
        dz = b.template dz<silu>(at + c, d, scale, load(b.offset + c, count), count);
      Vec<A> straight = load(linear + c, count) * d;
      store(b.dx + at + c, scale * dz + load(constant + c, count) + straight, count);
    });
}

// Gradients of the small tensors, and the two coefficients of dx; all [N, C] but the sums over n.
template <class A>
struct Gradients {
  std::vector<double> s, q;  // sums of dz and dz (x - centre)
  std::vector<A> constant, linear;
  A *dweight, *dbias, *dshift;

  Gradients(const Map& map, A* dweight, A* dbias, A* dshift)
      : s(map.planes()),
        q(map.planes()),
        constant(map.planes()),
        linear(map.planes()),
        dweight(dweight),
        dbias(dbias),
        dshift(dshift) {}

  void group(const Map& map, const Norms<A>& norms, int64_t i) {
    const int64_t first = i / map.groups * map.channels + i % map.groups * map.size();
    const int64_t end = first + map.size(), C = map.channels;
    const double rstd = norms.rstd[i], count = double(map.size()) * map.pixels;
    double a = 0, b = 0;
    auto weight = [&](int64_t at) { return norms.given.weight ? norms.given.weight[at % C] : 1; };
    for (int64_t at = first; at < end; ++at) {
      a += weight(at) * s[at];
      b += weight(at) * q[at];
    }
    a *= rstd / count, b *= rstd * rstd * rstd / count;
    for (int64_t at = first; at < end; ++at) {
      constant[at] = -a;
      linear[at] = -b;
      double d = double(norms.mean[at]) - norms.centre[at];
      dshift[at] = rstd * weight(at) * s[at] - map.pixels * (a + b * d);
    }
  }

  void over_samples(const Map& map, const Norms<A>& norms) {
    for (int64_t c = 0; c < map.channels; ++c) {
      double weight = 0, bias = 0;
      for (int64_t n = 0; n < map.samples; ++n) {
        int64_t at = n * map.channels + c;
        weight += q[at] * norms.rstd[n * map.groups + c / map.size()];
        bias += s[at];
      }
      dweight[c] = weight, dbias[c] = bias;
    }
  }
};

template <bool silu, class T, class D>
void backward_last(const Map& map, const D* dy, const T* x, T* dx, const Norms<acc_t<T>>& norms,
                   Gradients<acc_t<T>>& grads) {
  const int64_t stride = map.padded(), tasks = map.tasks(), C = map.channels;
  std::vector<double> sums(map.samples * tasks * 2 * stride);
  auto of = [&](int64_t n) {
    int64_t at = n * map.pixels * C, c = n * C;
    return Backward<T, D>{dy + at,         x + at,           dx ? dx + at : dx,
                          &norms.scale[c], &norms.offset[c], &norms.centre[c]};
  };
  parallel_pixels(map, [&](int64_t n, int64_t task, int64_t first, int64_t end) {
    double* to = sums.data() + (n * tasks + task) * 2 * stride;
    backward_pixel_sums<silu>(map, of(n), first, end - first, to);
  });
  parallel(map.samples, tasks * C, [&](int64_t n) {
    for (int64_t task = 0; task < tasks; ++task) {
      const double* from = sums.data() + (n * tasks + task) * 2 * stride;
      for (int64_t c = 0; c < C; ++c) {
        grads.s[n * C + c] += from[c];
        grads.q[n * C + c] += from[stride + c];
      }
    }
    for (int64_t g = 0; g < map.groups; ++g) grads.group(map, norms, n * map.groups + g);
  });
  if (!dx) return;
  parallel_pixels(map, [&](int64_t n, int64_t, int64_t first, int64_t end) {
    backward_pixels<silu>(map, of(n), first, end - first, &grads.constant[n * C],
                          &grads.linear[n * C]);
  });
}

template <bool silu, class T, class D>
void backward(const Map& map, const D* dy, const T* x, T* dx, Norms<acc_t<T>>& norms,
              Gradients<acc_t<T>>& grads) {
  const int64_t groups = map.samples * map.groups, size = map.size(), pixels = map.pixels;
  auto prepare = [&](int64_t i) { norms.group(map, i); };
  if (map.last) {
    parallel(groups, size * 16, prepare);
    return backward_last<silu>(map, dy, x, dx, norms, grads);
  }
  const Backward<T, D> b{dy, x, dx, norms.scale.data(), norms.offset.data(), norms.centre.data()};
  auto sums = [&](int64_t at) {
    Sums<2, double> found = backward_plane_sums<silu>(b, at * pixels, pixels, at);
    grads.s[at] = found.of[0], grads.q[at] = found.of[1];
  };
  auto apply = [&](int64_t at) {
    backward_plane<silu>(b, at * pixels, pixels, at, grads.constant[at], grads.linear[at]);
  };
  if (together(map, 3 * sizeof(T))) {
    return parallel(groups, size * pixels, [&](int64_t i) {
      prepare(i);
      for (int64_t at = i * size; at < (i + 1) * size; ++at) sums(at);
      grads.group(map, norms, i);
      for (int64_t at = i * size; dx && at < (i + 1) * size; ++at) apply(at);
    });
  }
  parallel(groups, size * 16, prepare);
  parallel(map.planes(), pixels, sums);
  parallel(groups, size * 16, [&](int64_t i) { grads.group(map, norms, i); });
  if (dx) parallel(map.planes(), pixels, apply);
}

// --- Operators ---

// In the arithmetic type, kept alive by whoever holds it.
Tensor widened(const MaybeTensor& v, const Tensor& x) {
  return v ? v->to(accumulation(x)).contiguous() : Tensor();
}
template <class A>
A* data(const Tensor& v) {
  return v.defined() ? static_cast<A*>(v.data_ptr()) : nullptr;
}

void check_map(const char* op, const Tensor& x, int64_t groups) {
  TORCH_CHECK(
      x.dim() >= 2 && x.is_contiguous(layout_of(x)) && groups > 0 && x.size(1) % groups == 0, op,
      ": expected a contiguous or channels_last x of ", groups, " groups, got ", x.sizes(),
      " with strides ", x.strides());
}
void check_vector(const char* op, const char* name, const MaybeTensor& v, at::IntArrayRef sizes) {
  TORCH_CHECK(!v || v->sizes() == sizes, op, ": expected ", name, " of sizes ", sizes);
}

Tensor empty_like(const Tensor& x) { return at::empty(x.sizes(), x.options(), layout_of(x)); }
Tensor small(const Tensor& x, at::IntArrayRef sizes) {
  return at::empty(sizes, x.options().dtype(accumulation(x)));
}

std::tuple<Tensor, Tensor> channel_statistics_cpu(const Tensor& x) {
  check_map("channel_statistics", x, 1);
  Tensor mean = small(x, {x.size(0), x.size(1)}), m2 = small(x, mean.sizes());
  dispatch(x.scalar_type(), "channel_statistics", [&](auto t) {
    using T = decltype(t);
    statistics(Map(x, 1), data<const T>(x), data<acc_t<T>>(mean), data<acc_t<T>>(m2));
  });
  return {mean, m2};
}

Tensor channel_statistics_backward_cpu(const Tensor& dmean, const Tensor& dm2, const Tensor& x,
                                       const Tensor& mean) {
  check_map("channel_statistics_backward", x, 1);
  for (const Tensor& v : {dmean, dm2, mean})
    check_vector("channel_statistics_backward", "gradients", v, {x.size(0), x.size(1)});
  Tensor dx = empty_like(x), slopes = dm2.contiguous(), constants = dmean.contiguous();
  dispatch(x.scalar_type(), "channel_statistics_backward", [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const Map map(x, 1);
    const A *m = data<A>(mean), *slope = data<A>(slopes), *constant = data<A>(constants);
    const T* from = data<const T>(x);
    T* to = data<T>(dx);
    const int64_t P = map.pixels, C = map.channels;
    const A share = A(1) / P;
    if (!map.last)
      return parallel(map.planes(), P, [&](int64_t plane) {
        for_vectors<A>(P, [=](int64_t i, auto count) DFM_INLINE {
          Vec<A> v = load(from + plane * P + i, count) - m[plane];
          store(to + plane * P + i, constant[plane] * share + 2 * slope[plane] * v, count);
        });
      });
    parallel(map.samples * P, C, [&](int64_t pixel) {
      const int64_t at = pixel / P * C;
      for_vectors<A>(C, [=](int64_t c, auto count) DFM_INLINE {
        Vec<A> v = load(from + pixel * C + c, count) - load(m + at + c, count);
        v = load(constant + at + c, count) * share + 2 * load(slope + at + c, count) * v;
        store(to + pixel * C + c, v, count);
      });
    });
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& shift,
    const MaybeTensor& mean, const MaybeTensor& m2, int64_t num_groups, double eps, bool silu) {
  const char* op = "group_norm_silu";
  check_map(op, x, num_groups);
  for (const MaybeTensor& v : {weight, bias}) check_vector(op, "weight and bias", v, {x.size(1)});
  for (const MaybeTensor& v : {shift, mean, m2})
    check_vector(op, "shift and statistics", v, {x.size(0), x.size(1)});
  TORCH_CHECK(mean.has_value() == m2.has_value(), op, ": expected mean and m2, or none");
  const bool given = mean.has_value();
  std::vector<int64_t> sizes = {x.size(0), x.size(1)};
  if (given) sizes = {0};
  Tensor y = empty_like(x), found_mean = small(x, sizes), found_m2 = small(x, sizes);
  Tensor w = widened(weight, x), b = widened(bias, x), s = widened(shift, x);
  Tensor m = given ? mean->contiguous() : found_mean, q = given ? m2->contiguous() : found_m2;
  dispatch(x.scalar_type(), op, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    Map map(x, num_groups);
    Norms<A> norms(map, {data<A>(w), data<A>(b), data<A>(s)}, data<A>(m), data<A>(q), eps);
    A *to = given ? nullptr : data<A>(m), *squares = given ? nullptr : data<A>(q);
    const T* from = data<const T>(x);
    silu ? forward<true>(map, from, data<T>(y), norms, to, squares)
         : forward<false>(map, from, data<T>(y), norms, to, squares);
  });
  return {y, found_mean, found_m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(
    const Tensor& dy, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& shift, const Tensor& mean, const Tensor& m2, int64_t num_groups, double eps,
    bool silu, bool need_dx) {
  const char* op = "group_norm_silu_backward";
  check_map(op, x, num_groups);
  const bool wide = dy.scalar_type() == accumulation(x);
  TORCH_CHECK(dy.sizes() == x.sizes() && (wide || dy.scalar_type() == x.scalar_type()) &&
                  dy.is_contiguous(layout_of(x)),
              op, ": expected dy like x, got ", dy.sizes(), " with strides ", dy.strides());
  Tensor dx = need_dx ? empty_like(x) : at::empty({0}, x.options());
  Tensor dweight = small(x, {x.size(1)}), dbias = small(x, {x.size(1)});
  Tensor dshift = small(x, {x.size(0), x.size(1)});
  Tensor w = widened(weight, x), b = widened(bias, x), s = widened(shift, x);
  dispatch(x.scalar_type(), op, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    Map map(x, num_groups);
    Norms<A> norms(map, {data<A>(w), data<A>(b), data<A>(s)}, data<A>(mean), data<A>(m2), eps);
    Gradients<A> grads(map, data<A>(dweight), data<A>(dbias), data<A>(dshift));
    T* to = need_dx ? data<T>(dx) : nullptr;
    auto run = [&](auto* d) {
      silu ? backward<true>(map, d, data<const T>(x), to, norms, grads)
           : backward<false>(map, d, data<const T>(x), to, norms, grads);
    };
    wide ? run(data<const A>(dy)) : run(data<const T>(dy));
    grads.over_samples(map, norms);
  });
  return {dx, dweight, dbias, dshift};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("channel_statistics", channel_statistics_cpu);
  m.impl("channel_statistics_backward", channel_statistics_backward_cpu);
  m.impl("group_norm_silu", group_norm_silu_cpu);
  m.impl("group_norm_silu_backward", group_norm_silu_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
