// dfm_fast._C_cuda: checks, outputs, stream and device guard around the device code.
//
// Not named after pyramids.cu: setuptools would give both the same object file.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "pyramids.h"

namespace dfm_fast {
namespace {

using at::Tensor;

DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kDouble:
      return DType::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected float32, bfloat16, float16 or float64, got ",
                       x.scalar_type());
  }
}

void check(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.is_cuda() && x.dim() == 4 && x.is_contiguous(), op, ": ", name,
                    ": expected a contiguous CUDA tensor [N, C, H, W] (channels_last goes to the "
                    "Triton kernel), got ",
                    x.sizes(), ", strides ", x.strides(), ", on ", x.device());
}

// The sizes of a pyramid over `finest` [N, C, H, W]; no data yet.
Pyramid sizes_of(const char* op, const Tensor& finest, int64_t num_levels) {
  TORCH_CHECK_VALUE(num_levels >= 1 && num_levels <= kMaxLevels, op, ": num_levels: expected 1 to ",
                    kMaxLevels, ", got ", num_levels);
  Pyramid p{};
  p.planes = finest.size(0) * finest.size(1);
  p.num_levels = static_cast<int>(num_levels);
  p.dtype = dtype_of(op, finest);
  int64_t h = finest.size(2), w = finest.size(3);
  TORCH_CHECK_VALUE(h <= INT32_MAX / 2 && w <= INT32_MAX / 16, op, ": expected sides below 2^27, ",
                    "got ", finest.sizes());
  for (int s = 0; s < num_levels; ++s, h = (h + 1) / 2, w = (w + 1) / 2) {
    TORCH_CHECK_VALUE(s + 1 == num_levels || (h >= 2 && w >= 2), op,
                      ": expected sides of at least 2 at each of ", num_levels - 1,
                      " halvings, got ", finest.sizes());
    p.height[s] = static_cast<int>(h);
    p.width[s] = static_cast<int>(w);
  }
  return p;
}

// Fresh levels s = first, ..., coarse to fine as Python has them, and their addresses in p.
std::vector<Tensor> empty_levels(Pyramid& p, const Tensor& like, int first) {
  std::vector<Tensor> levels;
  for (int s = p.num_levels - 1; s >= first; --s) {
    levels.push_back(at::empty({like.size(0), like.size(1), p.height[s], p.width[s]},
                               like.options().memory_format(at::MemoryFormat::Contiguous)));
    p.data[s] = levels.back().data_ptr();
  }
  return levels;
}

// Given levels, coarse to fine: checked, their addresses in the pyramid.
Pyramid pyramid_of(const char* op, const char* name, const std::vector<Tensor>& levels) {
  TORCH_CHECK_VALUE(!levels.empty(), op, ": ", name, ": expected at least one tensor, got 0");
  const Tensor& finest = levels.back();
  check(op, name, finest);
  Pyramid p = sizes_of(op, finest, static_cast<int64_t>(levels.size()));
  for (int s = 0; s < p.num_levels; ++s) {
    const Tensor& level = levels[levels.size() - 1 - s];
    check(op, name, level);
    const int64_t shape[] = {finest.size(0), finest.size(1), p.height[s], p.width[s]};
    TORCH_CHECK_VALUE(level.sizes() == at::IntArrayRef(shape) &&
                          level.scalar_type() == finest.scalar_type() &&
                          level.device() == finest.device(),
                      op, ": ", name, "[", levels.size() - 1 - s, "]: expected ",
                      at::IntArrayRef(shape), " ", finest.scalar_type(), " on ", finest.device(),
                      ", got ", level.sizes(), " ", level.scalar_type(), " on ", level.device());
    p.data[s] = level.data_ptr();
  }
  return p;
}

// x [N, C, H, W] -> levels, coarse to fine; the last has x's shape.
std::vector<Tensor> build(const Tensor& x, int64_t num_levels) {
  check("binomial_build", "x", x);
  const c10::cuda::CUDAGuard guard(x.device());
  if (num_levels == 1) return {x.clone()};
  Pyramid p = sizes_of("binomial_build", x, num_levels);
  std::vector<Tensor> levels = empty_levels(p, x, 0);
  const Tensor scratch = at::empty({binomial_build_scratch_bytes(p)}, x.options().dtype(at::kByte));
  C10_CUDA_CHECK(
      binomial_build(x.const_data_ptr(), p, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return levels;
}

// levels, coarse to fine -> x [N, C, H, W], shaped like the last.
Tensor collapse(const std::vector<Tensor>& levels) {
  const Pyramid p = pyramid_of("binomial_collapse", "levels", levels);
  const c10::cuda::CUDAGuard guard(levels.back().device());
  if (p.num_levels == 1) return levels[0].clone();
  Tensor x = at::empty_like(levels.back(), at::MemoryFormat::Contiguous);
  C10_CUDA_CHECK(binomial_collapse(p, x.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return x;
}

// Gradients of the levels, coarse to fine -> gradient of x.
Tensor build_backward(const std::vector<Tensor>& grads) {
  const Pyramid p = pyramid_of("binomial_build_backward", "grads", grads);
  const c10::cuda::CUDAGuard guard(grads.back().device());
  if (p.num_levels == 1) return grads[0].clone();
  Tensor dx = at::empty_like(grads.back(), at::MemoryFormat::Contiguous);
  C10_CUDA_CHECK(binomial_build_backward(p, dx.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return dx;
}

// Gradient of x -> gradients of all levels but the finest, coarse to fine.
std::vector<Tensor> collapse_backward(const Tensor& grad, int64_t num_levels) {
  check("binomial_collapse_backward", "grad", grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  Pyramid p = sizes_of("binomial_collapse_backward", grad, num_levels);
  std::vector<Tensor> grads = empty_levels(p, grad, 1);
  C10_CUDA_CHECK(
      binomial_collapse_backward(grad.const_data_ptr(), p, c10::cuda::getCurrentCUDAStream()));
  return grads;
}

}  // namespace
}  // namespace dfm_fast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("binomial_build", &dfm_fast::build);
  m.def("binomial_collapse", &dfm_fast::collapse);
  m.def("binomial_build_backward", &dfm_fast::build_backward);
  m.def("binomial_collapse_backward", &dfm_fast::collapse_backward);
}
