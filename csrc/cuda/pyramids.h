// Binomial Laplacian pyramids of 2-D planes: device code behind plain pointers, no torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dfm_fast {

constexpr int kMaxLevels = 16;

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A pyramid, *finest* level first: data[s] is [planes, height[s], width[s]], contiguous, and every
// level has half the sides, rounded up, of the one before it. planes = N * C (* T).
struct Pyramid {
  int64_t planes;
  int num_levels;  // 2 .. kMaxLevels
  DType dtype;
  int height[kMaxLevels], width[kMaxLevels];  // height[s], width[s] >= 2 but at the coarsest
  void* data[kMaxLevels];
};

// x, dx, dy are [planes, height[0], width[0]]. Nothing is allocated or synchronised: a build of
// more than three levels needs `scratch` of that many bytes, 256-byte aligned.
int64_t binomial_build_scratch_bytes(const Pyramid& levels);
cudaError_t binomial_build(const void* x, const Pyramid& levels, void* scratch,
                           cudaStream_t stream);
cudaError_t binomial_collapse(const Pyramid& levels, void* x, cudaStream_t stream);
cudaError_t binomial_build_backward(const Pyramid& grads, void* dx, cudaStream_t stream);
// Writes grads.data[1..]; data[0] is not used (the finest level's gradient is dy itself).
cudaError_t binomial_collapse_backward(const void* dy, const Pyramid& grads, cudaStream_t stream);

}  // namespace dfm_fast
