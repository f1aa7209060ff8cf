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
