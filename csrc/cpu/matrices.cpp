// A product of two matrices, for the linear layers of processors on which it is faster than torch's
// (dfm_fast/nn/_linears.py knows them).
#include "matrices.h"

#include <ATen/Functions.h>
#include <torch/library.h>

namespace dfm_fast {
namespace {

using at::Tensor;

// Columns or rows side by side in memory; else a copy, which the caller keeps.
template <class T>
Matrix<T> matrix(Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1);
  if (x.stride(0) == 1 && x.stride(1) != 1)
    return Matrix<T>{data<T>(x), columns, rows, x.stride(1), false}.transpose();
  if (x.stride(1) != 1) x = x.contiguous();
  return {data<T>(x), rows, columns, x.stride(0), false};
}

Tensor matrix_product_cpu(const Tensor& a, const Tensor& b, const std::optional<Tensor>& other) {
  const auto dtype = a.scalar_type();
  TORCH_CHECK((dtype == at::kFloat || dtype == at::kDouble) && b.scalar_type() == dtype,
              "matrix_product: expected a and b of float32 or float64, got ", dtype, ", ",
              b.scalar_type());
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0),
              "matrix_product: expected a [M, K] and b [K, N], got ", a.sizes(), ", ", b.sizes());
  const int64_t M = a.size(0), N = b.size(1);
  Tensor c = at::empty({M, N}, a.options()), left = a, right = b, plus;
  if (other) {
    TORCH_CHECK(other->scalar_type() == dtype && (other->sizes() == at::IntArrayRef{N} ||
                                                  other->sizes() == at::IntArrayRef{M, N}),
                "matrix_product: expected other [N] or [M, N] like a, got ", other->scalar_type(),
                " ", other->sizes());
    plus = other->contiguous();
  }
  if (!c.numel()) return c;
  if (!a.size(1)) return other ? c.copy_(plus) : c.zero_();
  const auto run = [&](auto t) {
    using T = decltype(t);
    const T* add = other ? data<T>(plus) : nullptr;
    multiply(matrix<T>(left), matrix<T>(right), Addend<T>{add, other && plus.dim() == 2 ? N : 0},
             mutable_data<T>(c));
  };
  dtype == at::kFloat ? run(float{}) : run(double{});
  return c;
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) { m.impl("matrix_product", matrix_product_cpu); }

}  // namespace
}  // namespace dfm_fast
