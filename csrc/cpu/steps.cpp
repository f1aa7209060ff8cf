// CPU operators of the family `steps`; the definition is dfm_fast/ops/steps.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "tensors.h"

namespace dfm_fast {
namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;

constexpr int64_t kChunk = 1 << 13;  // elements of a task

// One level: y = x + h v, or (x + p + h v) / 2; v = c, or u + w (c - u).
template <class T, class V>
struct Level {
  const T *x, *predicted;  // predicted may be null
  const V *cond, *uncond;  // uncond may be null
  T* y;
  acc_t<T> h, w;
  int64_t n;
  bool active;
};

template <bool heun, bool guided, class T, class V>
void advance(const Level<T, V>& level, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  auto one = [&](int64_t i, auto count) DFM_INLINE {
    Vec<A> v = load(level.cond + i, count);
    if constexpr (guided) {
      Vec<A> u = load(level.uncond + i, count);
      v = u + level.w * (v - u);
    }
    Vec<A> y = load(level.x + i, count);
    if constexpr (heun)
      y = A(0.5) * (y + load(level.predicted + i, count) + level.h * v);
    else
      y += level.h * v;
    store(level.y + i, y, count);
  };
  int64_t i = begin;
  for (; i + kLanes<A> <= end; i += kLanes<A>) one(i, Whole<A>{});
  if (i < end) one(i, static_cast<int>(end - i));
}

template <class T, class V>
void advance(const Level<T, V>& level, int64_t begin, int64_t end) {
  if (!level.active) {
    std::copy(level.x + begin, level.x + end, level.y + begin);
    return;
  }
  if (level.predicted)
    level.uncond ? advance<true, true>(level, begin, end) : advance<true, false>(level, begin, end);
  else
    level.uncond ? advance<false, true>(level, begin, end)
                 : advance<false, false>(level, begin, end);
}

template <class T, class V>
void run(const std::vector<Level<T, V>>& levels) {
  std::vector<int64_t> first{0};  // chunk of every level
  for (const auto& level : levels) first.push_back(first.back() + (level.n + kChunk - 1) / kChunk);
  at::parallel_for(0, first.back(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      size_t s = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
      int64_t start = (chunk - first[s]) * kChunk;
      advance(levels[s], start, std::min(start + kChunk, levels[s].n));
    }
  });
}

double entry(const Tensor& table, int64_t row, int64_t column) {
  return table.select(0, row).select(0, column).item().toDouble();
}

int64_t row_of(const char* op, const Tensor& dt, const std::optional<Tensor>& step) {
  if (!step) return 0;
  int64_t row = step->item().toLong();
  TORCH_CHECK_INDEX(row >= 0 && row < dt.size(0), op, ": expected step from 0 to ", dt.size(0) - 1,
                    ", got ", row);
  return row;
}

void check_like(const char* op, const char* argument, const Tensor& v, const Tensor& x) {
  TORCH_CHECK(v.sizes() == x.sizes() && v.is_contiguous(layout_of(x)), op, ": expected ", argument,
              " of sizes ", x.sizes(), " laid out like x, got ", v.sizes(), " with strides ",
              v.strides());
}

// Velocities in one dtype that the arithmetic type loads: as they are where they agree.
std::vector<Tensor> in_dtype(TensorList tensors, at::ScalarType dtype) {
  std::vector<Tensor> out;
  for (const Tensor& v : tensors) out.push_back(v.to(dtype));
  return out;
}

at::ScalarType velocity_dtype(TensorList cond, TensorList uncond, at::ScalarType x) {
  at::ScalarType first = cond[0].scalar_type(), wide = x == at::kDouble ? at::kDouble : at::kFloat;
  bool same = (first == at::kDouble) == (x == at::kDouble);
  for (TensorList list : {cond, uncond})
    for (const Tensor& v : list) same = same && v.scalar_type() == first;
  return same ? first : wide;
}

std::vector<Tensor> step_cpu(const char* op, TensorList x, TensorList predicted, TensorList v_cond,
                             TensorList v_uncond, const Tensor& dt,
                             const std::optional<Tensor>& cfg_scale, double scale,
                             const std::optional<Tensor>& mask, const std::optional<Tensor>& step,
                             IntArrayRef columns) {
  std::vector<Tensor> out;
  if (x.empty()) return out;
  at::ScalarType dtype = x[0].scalar_type(), velocity = velocity_dtype(v_cond, v_uncond, dtype);
  auto cond = in_dtype(v_cond, velocity), uncond = in_dtype(v_uncond, velocity);
  int64_t row = row_of(op, dt, step);
  for (const Tensor& level : x)
    out.push_back(at::empty(level.sizes(), level.options(), layout_of(level)));
  auto with = [&](auto t, auto v) {
    using T = decltype(t);
    using V = decltype(v);
    std::vector<Level<T, V>> levels;
    for (size_t s = 0; s < x.size(); ++s) {
      check_like(op, "v_cond", cond[s], x[s]);
      if (!uncond.empty()) check_like(op, "v_uncond", uncond[s], x[s]);
      if (!predicted.empty()) check_like(op, "predicted", predicted[s], x[s]);
      int64_t column = columns[s];
      levels.push_back(
          {static_cast<const T*>(x[s].const_data_ptr()),
           predicted.empty() ? nullptr : static_cast<const T*>(predicted[s].const_data_ptr()),
           static_cast<const V*>(cond[s].const_data_ptr()),
           uncond.empty() ? nullptr : static_cast<const V*>(uncond[s].const_data_ptr()),
           static_cast<T*>(out[s].mutable_data_ptr()),
           static_cast<acc_t<T>>(entry(dt, row, column)),
           static_cast<acc_t<T>>(cfg_scale ? entry(*cfg_scale, row, column) : scale), x[s].numel(),
           !mask || mask->select(0, column).item().toBool()});
    }
    run(levels);
  };
  dispatch(dtype, op, [&](auto t) {
    if constexpr (std::is_same_v<decltype(t), double>)
      with(t, double{});
    else if (velocity == at::kFloat)
      with(t, float{});
    else if (velocity == at::kBFloat16)
      with(t, bf16{});
    else
      with(t, fp16{});
  });
  return out;
}

std::vector<Tensor> cfg_euler_step_cpu(TensorList x, TensorList v_cond, TensorList v_uncond,
                                       const Tensor& dt, const std::optional<Tensor>& cfg_scale,
                                       double scale, const std::optional<Tensor>& mask,
                                       const std::optional<Tensor>& step, IntArrayRef columns) {
  return step_cpu("cfg_euler_step", x, {}, v_cond, v_uncond, dt, cfg_scale, scale, mask, step,
                  columns);
}

std::vector<Tensor> heun_step_cpu(TensorList x, TensorList predicted, TensorList v_cond,
                                  TensorList v_uncond, const Tensor& dt,
                                  const std::optional<Tensor>& cfg_scale, double scale,
                                  const std::optional<Tensor>& mask,
                                  const std::optional<Tensor>& step, IntArrayRef columns) {
  return step_cpu("heun_step", x, predicted, v_cond, v_uncond, dt, cfg_scale, scale, mask, step,
                  columns);
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("cfg_euler_step", cfg_euler_step_cpu);
  m.impl("heun_step", heun_step_cpu);
}

}  // namespace
}  // namespace dfm_fast
