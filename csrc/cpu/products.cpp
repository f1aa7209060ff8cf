// Products by oneDNN, through the operators that Inductor calls.
#include "products.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>

namespace dfm_fast {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Scalars = c10::List<std::optional<at::Scalar>>;
using Linear = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, std::string_view, Scalars,
                      std::optional<std::string_view>);
using LinearAnd = Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                         std::string_view);

std::optional<c10::OperatorHandle> operation(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchema({name, overload});
}

bool bf16_multiplies() {
  static const auto found = operation("mkldnn::_is_mkldnn_bf16_supported", "");
  return found && found->typed<bool()>().call();
}

}  // namespace

bool onednn_multiplies(at::ScalarType dtype) {
  static const bool found = at::Context::hasMKLDNN() && operation("mkldnn::_linear_pointwise", "");
  if (!found || !at::globalContext().userEnabledMkldnn()) return false;
  return dtype == at::kFloat || (dtype == at::kBFloat16 && bf16_multiplies());
}

Tensor product(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  if (!onednn_multiplies(x.scalar_type()) || !x.numel()) return at::linear(x, weight, bias);
  static const auto call = operation("mkldnn::_linear_pointwise", "")->typed<Linear>();
  return call.call(x, weight, bias, "none", Scalars(), "");
}

Tensor product_and(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                   const Tensor& other) {
  if (!onednn_multiplies(x.scalar_type()) || !x.numel())
    return at::linear(x, weight, bias).add_(other);
  static const auto call = operation("mkldnn::_linear_pointwise", "binary")->typed<LinearAnd>();
  return call.call(x, other, weight, bias, "add");
}

}  // namespace dfm_fast
