// Products of matrices for operators that bring their own prologue and epilogue.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace dfm_fast {

// What torch calls inside an operator: without autograd, and without autocast, which would round.
struct PlainCalls {
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
  at::AutoDispatchBelowADInplaceOrView autograd;
};

// x [P, C] times weight [O, C] -> [P, O], plus bias [O] where given. oneDNN's product where it
// serves the dtype, else torch's: MKL's, which for float on AMD processors takes twice the time.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias = std::nullopt);

// The same plus other [P, O], added before the one rounding of the output.
at::Tensor product_and(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const at::Tensor& other);

// Whether oneDNN multiplies this dtype at full speed here.
bool onednn_multiplies(at::ScalarType dtype);

}  // namespace dfm_fast
