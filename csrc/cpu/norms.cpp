// CPU operators of the family `norms`; the definition is dfm_fast/ops/norms.py.
#include "norms.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"

namespace dfm_fast {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// x [B, ..., D] as samples of T rows; for rms_norm one sample of all rows.
struct Sizes {
  int64_t B, T, D;
  int64_t rows() const { return B * T; }
  int64_t grain() const { return std::max<int64_t>(1, (1 << 14) / D); }  // rows of a task
};

Sizes sizes_of(const Tensor& x, bool one_sample = false) {
  int64_t B = one_sample ? 1 : x.size(0), T = 1;
  for (int64_t i = one_sample ? 0 : 1; i + 1 < x.dim(); ++i) T *= x.size(i);
  return {B, T, x.size(-1)};
}

// Where the rows lie of what is like x, or has one row for each sample (or one for all).
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t sample = 0, token = 0;
  const T* at(int64_t b, int64_t t) const { return data ? data + b * sample + t * token : nullptr; }
};

template <class T>
Rows<T> rows_of(const char* op, const Tensor& x, const Sizes& size) {
  if (!x.defined()) return {};
  TORCH_CHECK(x.is_contiguous() || (x.dim() <= 3 && x.stride(-1) == 1), op,
              ": expected dense rows, got strides ", x.strides());
  auto data = static_cast<const T*>(x.const_data_ptr());
  bool each_token = x.numel() == size.rows() * size.D && size.T > 1;
  if (!each_token) return {data, x.dim() == 1 ? 0 : x.stride(0), 0};
  if (x.is_contiguous()) return {data, size.T * size.D, size.D};
  return {data, x.stride(0), x.stride(1)};  // [B, T, D]
}

template <class T>
T* data_of(const Tensor& x) {
  return x.defined() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

// Modulation as the kernels load it: in x's dtype or its arithmetic type.
Tensor beside(const Tensor& modulation, const Tensor& x) {
  return modulation.scalar_type() == x.scalar_type() ? modulation : modulation.to(accumulation(x));
}

// f(zero of x's type, zero of the modulation's type).
template <class F>
void dispatch_pair(const char* op, const Tensor& x, at::ScalarType modulation, F f) {
  dispatch(x.scalar_type(), op,
           [&](auto t) { modulation == x.scalar_type() ? f(t, t) : f(t, acc_t<decltype(t)>{}); });
}

Tensor empty_like(const Tensor& x) { return at::empty(x.sizes(), x.options()); }
Tensor statistic(const Tensor& x) {
  return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulation(x)));
}

// --- Forward ---

// f(first row, end, sample, token) for every row of all samples.
template <class F>
void for_rows(const Sizes& size, F f) {
  at::parallel_for(0, size.rows(), size.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row, row / size.T, row % size.T);
  });
}

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Optional& weight, double eps) {
  const char* op = "rms_norm";
  Tensor y = empty_like(x), rstd = statistic(x);
  Tensor w = weight ? beside(*weight, x) : Tensor();
  Sizes size = sizes_of(x, true);
  dispatch_pair(op, x, w.defined() ? w.scalar_type() : accumulation(x), [&](auto t, auto m) {
    using T = decltype(t);
    using M = decltype(m);
    auto from = rows_of<T>(op, x, size);
    auto scale = w.defined() ? static_cast<const M*>(w.const_data_ptr()) : nullptr;
    T* to = data_of<T>(y);
    auto* stats = data_of<acc_t<T>>(rstd);
    for_rows(size, [=](int64_t row, int64_t, int64_t token) {
      stats[row] = rms_row<T, M>(to + row * size.D, from.at(0, token), scale, size.D, eps);
    });
  });
  return {y, rstd};
}

// y undefined: no residual; shift undefined: no norm.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const char* op, const Tensor& x,
                                                   const Optional& branch, const Optional& gate,
                                                   const Optional& shift, const Optional& scale,
                                                   double eps) {
  Tensor residual, normed, mean, rstd, y, g, h, s;
  if (branch) residual = empty_like(x), y = branch->to(x.scalar_type()), g = beside(*gate, x);
  if (shift) {
    normed = empty_like(x), mean = statistic(x), rstd = statistic(x);
    h = beside(*shift, x), s = beside(*scale, x);
  }
  Sizes size = sizes_of(x);
  dispatch_pair(op, x, (shift ? h : g).scalar_type(), [&](auto t, auto m) {
    using T = decltype(t);
    using M = decltype(m);
    auto x_rows = rows_of<T>(op, x, size), y_rows = rows_of<T>(op, y, size);
    auto gate_rows = rows_of<M>(op, g, size), shift_rows = rows_of<M>(op, h, size),
         scale_rows = rows_of<M>(op, s, size);
    T *to_residual = data_of<T>(residual), *to_normed = data_of<T>(normed);
    auto *means = data_of<acc_t<T>>(mean), *rstds = data_of<acc_t<T>>(rstd);
    for_rows(size, [=](int64_t row, int64_t b, int64_t token) {
      const T* from = x_rows.at(b, token);
      if (to_residual) {
        T* to = to_residual + row * size.D;
        gate_row(to, from, y_rows.at(b, token), gate_rows.at(b, token), size.D);
        from = to;  // the norm is of the rounded residual
      }
      if (!to_normed) return;
      auto moments = layer_row<T, M>(to_normed + row * size.D, from, shift_rows.at(b, token),
                                     scale_rows.at(b, token), size.D, eps);
      means[row] = moments.mean, rstds[row] = moments.rstd;
    });
  });
  return {residual, normed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> ada_layer_norm_cpu(const Tensor& x, const Tensor& shift,
                                                      const Tensor& scale, double eps) {
  auto [none, y, mean, rstd] = forward("ada_layer_norm", x, {}, {}, shift, scale, eps);
  return {y, mean, rstd};
}

Tensor gated_residual_cpu(const Tensor& x, const Tensor& y, const Tensor& gate) {
  return std::get<0>(forward("gated_residual", x, y, gate, {}, {}, 0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_cpu(
    const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& shift, const Tensor& scale,
    double eps) {
  return forward("gated_residual_ada_layer_norm", x, y, gate, shift, scale, eps);
}

// --- Backward ---

constexpr int64_t kBlockRows = 32;  // that a modulation's gradient is first summed over

// Tensors that a kind of norm has no use for are undefined.
struct Given {
  Tensor dresidual, dnormed, x, y, gate, scale, mean, rstd;
};
struct Gradients {
  Tensor dx, dy, dgate, dshift, dscale;
};

// v[0] + ... + v[n - 1] in groups of 32 and of 1024, so that no long chain gathers rounding errors.
template <class A, class F>
DFM_INLINE inline Vec<A> cascade(int64_t n, F v) {
  Vec<A> sum{}, thousand{}, group{};
  for (int64_t k = 0; k < n; ++k) {
    group += v(k);
    if (k % 32 == 31) thousand += group, group = Vec<A>{};
    if (k % 1024 == 1023) sum += thousand, thousand = Vec<A>{};
  }
  return sum + (thousand + group);
}

// to[b] = sum of the blocks of sample b, in order.
template <class M, class A>
void add_blocks(M* to, const A* partial, const Sizes& size, int64_t blocks, int64_t stride) {
  constexpr int64_t kColumns = 256;
  int64_t chunks = (size.D + kColumns - 1) / kColumns;
  at::parallel_for(0, size.B * chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t b = task / chunks, first = task % chunks * kColumns;
      const A* from = partial + b * blocks * stride + first;
      M* row = to + b * size.D + first;
      for_vectors<A>(std::min(kColumns, size.D - first), [=](int64_t i, auto count) DFM_INLINE {
        auto block = [=](int64_t k)
                         DFM_INLINE { return Vec<A>(load(from + k * stride + i, count)); };
        store(row + i, cascade<A>(blocks, block), count);
      });
    }
  });
}

// The kernel of one row, by what it has.
template <bool add, class Row>
void backward_row(Norm norm, const Row& r) {
  if (norm == Norm::none)
    gate_backward_row<add>(r);
  else if (norm == Norm::rms)
    r.scale ? rms_backward_row<true, add>(r) : rms_backward_row<false, add>(r);
  else
    r.y ? layer_backward_row<true, add>(r) : layer_backward_row<false, add>(r);
}

template <class T, class M>
class Backward {
  using A = acc_t<T>;

 public:
  Backward(const char* op, Norm norm, const Sizes& size, const Given& in, const Gradients& out)
      : norm(norm),
        size(size),
        out(out),
        dresidual(rows_of<T>(op, in.dresidual, size)),
        dnormed(rows_of<T>(op, in.dnormed, size)),
        x(rows_of<T>(op, in.x, size)),
        y(rows_of<T>(op, in.y, size)),
        gate(rows_of<M>(op, in.gate, size)),
        scale(rows_of<M>(op, in.scale, size)),
        mean(in.mean.defined() ? static_cast<const A*>(in.mean.const_data_ptr()) : nullptr),
        rstd(in.rstd.defined() ? static_cast<const A*>(in.rstd.const_data_ptr()) : nullptr) {}

  // Every token has its own modulation, and so its own gradients of it.
  void each_token() const {
    for_rows(size, [this](int64_t row, int64_t b, int64_t t) {
      auto r = row_at<M>(b, t);
      r.dgate = at<M>(out.dgate, row), r.dshift = at<M>(out.dshift, row);
      r.dscale = at<M>(out.dscale, row);
      backward_row<false>(norm, r);
    });
  }

  // Sums over blocks of rows, then over the blocks.
  void shared() const {
    Tensor sums[] = {out.dgate, out.dshift, out.dscale};
    int64_t slots[3], count = 0;
    for (int k = 0; k < 3; ++k) slots[k] = sums[k].defined() ? size.D * count++ : -1;
    int64_t rows = kBlockRows, blocks = (size.T + rows - 1) / rows, stride = count * size.D;
    Tensor partial = at::empty({size.B * blocks, stride}, sums_options());
    A* partials = data_of<A>(partial);
    auto slot = [&](A* block, int k) { return slots[k] < 0 ? nullptr : block + slots[k]; };
    int64_t grain = std::max<int64_t>(1, size.grain() / rows);
    at::parallel_for(0, size.B * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t b = task / blocks, first = task % blocks * rows;
        A* block = partials + task * stride;
        std::fill(block, block + stride, A(0));
        for (int64_t t = first; t < std::min(first + rows, size.T); ++t) {
          auto r = row_at<A>(b, t);
          r.dgate = slot(block, 0), r.dshift = slot(block, 1), r.dscale = slot(block, 2);
          backward_row<true>(norm, r);
        }
      }
    });
    for (int k = 0; k < 3; ++k)
      if (slots[k] >= 0) add_blocks(data_of<M>(sums[k]), partials + slots[k], size, blocks, stride);
  }

 private:
  Norm norm;
  Sizes size;
  const Gradients& out;
  Rows<T> dresidual, dnormed, x, y;
  Rows<M> gate, scale;
  const A *mean, *rstd;

  template <class D>
  D* at(const Tensor& rows, int64_t row) const {
    return rows.defined() ? data_of<D>(rows) + row * size.D : nullptr;
  }
  static at::TensorOptions sums_options() {
    return at::device(at::kCPU).dtype(sizeof(A) == 8 ? at::kDouble : at::kFloat);
  }

  template <class D>
  BackwardRow<T, M, D> row_at(int64_t b, int64_t t) const {
    int64_t row = b * size.T + t;
    return {dresidual.at(b, t),
            dnormed.at(b, t),
            x.at(b, t),
            y.at(b, t),
            gate.at(b, t),
            scale.at(b, t),
            at<T>(out.dx, row),
            at<T>(out.dy, row),
            nullptr,
            nullptr,
            nullptr,
            mean ? mean[row] : A(0),
            rstd ? rstd[row] : A(0),
            size.D};
  }
};

Gradients backward(const char* op, Norm norm, Given in) {
  const Tensor& like = in.dnormed.defined() ? in.dnormed : in.dresidual;
  at::ScalarType dtype = like.scalar_type(), y_dtype = dtype;
  Sizes size = sizes_of(like, norm == Norm::rms);
  Gradients out;
  if (norm != Norm::none) out.dx = empty_like(in.x);
  if (in.y.defined()) {
    y_dtype = in.y.scalar_type();
    in.y = in.y.to(dtype), out.dy = at::empty(like.sizes(), like.options());
  }
  at::ScalarType given = dtype;
  for (Tensor* m : {&in.gate, &in.scale})
    if (m->defined()) given = m->scalar_type(), *m = beside(*m, like);
  if (in.gate.defined()) out.dgate = empty_like(in.gate);
  if (in.scale.defined()) out.dscale = empty_like(in.scale);
  if (in.scale.defined() && norm == Norm::layer) out.dshift = empty_like(in.scale);
  const Tensor& modulation = in.scale.defined() ? in.scale : in.gate;
  bool each_token = modulation.defined() && norm != Norm::rms &&
                    modulation.numel() == like.numel() && size.T != 1;
  dispatch_pair(op, like, modulation.defined() ? modulation.scalar_type() : dtype,
                [&](auto t, auto m) {
                  Backward<decltype(t), decltype(m)> walk(op, norm, size, in, out);
                  each_token ? walk.each_token() : walk.shared();
                });
  if (out.dy.defined()) out.dy = out.dy.to(y_dtype);
  for (Tensor* m : {&out.dgate, &out.dshift, &out.dscale})
    if (m->defined()) *m = m->to(given);
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& dy, const Tensor& x,
                                                 const Optional& weight, const Tensor& rstd) {
  Given in{.dnormed = dy, .x = x, .scale = weight.value_or(Tensor()), .rstd = rstd};
  Gradients out = backward("rms_norm_backward", Norm::rms, in);
  return {out.dx, weight ? out.dscale : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor> ada_layer_norm_backward_cpu(const Tensor& dy, const Tensor& x,
                                                               const Tensor& scale,
                                                               const Tensor& mean,
                                                               const Tensor& rstd) {
  Given in{.dnormed = dy, .x = x, .scale = scale, .mean = mean, .rstd = rstd};
  Gradients out = backward("ada_layer_norm_backward", Norm::layer, in);
  return {out.dx, out.dshift, out.dscale};
}

std::tuple<Tensor, Tensor> gated_residual_backward_cpu(const Tensor& dresidual, const Tensor& y,
                                                       const Tensor& gate) {
  Gradients out = backward("gated_residual_backward", Norm::none,
                           {.dresidual = dresidual, .y = y, .gate = gate});
  return {out.dy, out.dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_backward_cpu(
    const Optional& dresidual, const Tensor& dnormed, const Tensor& residual, const Tensor& y,
    const Tensor& gate, const Tensor& scale, const Tensor& mean, const Tensor& rstd) {
  Given in{dresidual.value_or(Tensor()), dnormed, residual, y, gate, scale, mean, rstd};
  Gradients out = backward("gated_residual_ada_layer_norm_backward", Norm::layer, in);
  return {out.dx, out.dy, out.dgate, out.dshift, out.dscale};
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("rms_norm_backward", rms_norm_backward_cpu);
  m.impl("ada_layer_norm", ada_layer_norm_cpu);
  m.impl("ada_layer_norm_backward", ada_layer_norm_backward_cpu);
  m.impl("gated_residual", gated_residual_cpu);
  m.impl("gated_residual_backward", gated_residual_backward_cpu);
  m.impl("gated_residual_ada_layer_norm", gated_residual_ada_layer_norm_cpu);
  m.impl("gated_residual_ada_layer_norm_backward", gated_residual_ada_layer_norm_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
