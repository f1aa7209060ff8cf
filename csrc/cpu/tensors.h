// What the operators of all families do with tensors before the arithmetic begins.
#pragma once

#include <ATen/core/Tensor.h>

#include "rows.h"

namespace dfm_fast {

// channels_last where x is that and not contiguous, as `memory_format` in dfm_fast/ops/_layouts.py.
inline at::MemoryFormat layout_of(const at::Tensor& x) {
  if ((x.dim() != 4 && x.dim() != 5) || x.is_contiguous()) return at::MemoryFormat::Contiguous;
  auto last = x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return x.is_contiguous(last) ? last : at::MemoryFormat::Contiguous;
}

template <class T>
inline const T* data(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
inline T* mutable_data(const at::Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// The dtype in which x is computed with: acc_t of its storage type.
inline at::ScalarType accumulation(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// f(zero of the storage type).
template <class F>
void dispatch(at::ScalarType dtype, const char* op, F f) {
  if (dtype == at::kFloat) return f(float{});
  if (dtype == at::kBFloat16) return f(bf16{});
  if (dtype == at::kHalf) return f(fp16{});
  TORCH_CHECK(dtype == at::kDouble, op, ": expected float32, bfloat16, float16 or float64, got ",
              dtype);
  f(double{});
}

}  // namespace dfm_fast
