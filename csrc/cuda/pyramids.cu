// Binomial Laplacian pyramids of 2-D planes, forward and backward: several levels in one launch.
//
//     coarse = round(down(x))        detail = x - up(coarse)        x = round(detail + up(coarse))
//
// down = [1 4 6 4 1]/16 per axis, reflect-101; up = (1 6 1)/8 and (4 4)/8 per axis, -1 -> 1 and
// m -> m - 1 (OpenCV's pyrDown and pyrUp). As matrices between a fine axis of n and a coarse axis
// of m = ceil(n/2), both have entries only at fine 2k, 2k+1 against coarse k-1, k, k+1, with the
// borders folded in: five numbers for every k (`weights`). All four operators are those two
// matrices or their transposes, hence two device functions:
//
//     coarsen: fine -> coarse        down (build)          up^T (both backwards)
//     refine:  coarse -> fine        up (build, collapse)  down^T (build backward)
//
// Every one is a gather: no atomics, bit-equal from run to run.
//
// A thread block owns a tile of the finest level and what lies under it at the coarser ones. It
// holds its region of each level in shared memory: the tile and the halo that the levels between
// it and the results need (host function `halo`: build of two steps 10 + 7 rows, of one 4 + 3;
// collapse at most 1 + 2 at any level). A plane that fits is a tile without a halo. All loads are
// issued at once (cp.async, 16 bytes); results go straight to global memory.
//
// Columns are handled in quads, one a lane. `coarsen` runs down the rows with two partial sums per
// column, so that a row is read once, and gets the neighbours' share by two shuffles; `refine`
// keeps two coarse rows. Bounds: a pair of fine rows by 128 columns takes a warp 67 instructions
// in `coarsen` and 77 in `refine` (sm_90, float32; 45 of either are arithmetic), a warp's set-up
// about 180 for each, hence few warps with many rows. Build of 512 x 512 planes comes to some 50
// warp instructions for 32 elements, which is close to what device memory allows in float32 and
// above it in 16 bits; collapse to half of that.
//
// Bytes of N elements: build reads N and writes N (1 + 1/4 + ...), two steps a launch; collapse
// and the backward of build are one launch. Halo rereads (tile 104 x 88 in a region of 124 x 105:
// 1.3 N within 512 x 512) hit L2, as neighbouring blocks run together.
//
// Sums are in float32 (float64 for float64). Regions hold T (the levels are rounded to T by
// definition); the gradients of coarser levels are held in the accumulation type.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "tiles.h"

namespace dfm_fast {
namespace {

constexpr int kTileSteps = 2;  // steps in one launch of build where a plane does not fit

// --- Kernels: 64 registers a thread, 128 in float64 --------------------------------------------

constexpr int kMaxThreads = 512;
template <typename T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kResident<T>)
    build_kernel(const __grid_constant__ Plan plan) {
  const Tile tile(plan);
  wait_for_previous_launch();
  auto fine = region<T, T>(plan, tile, 0);
  load(fine, plane<const T>(tile, plan.fine, plan.levels[0]), plan.fine_alignment);
  arrive();
  for (int s = 0; s < plan.steps; ++s) {
    const auto coarse = region<T, T>(plan, tile, s + 1);
    coarsen<Matrix::kDown>(fine, coarse, [&](int i, int x) {
      return [to = coarse.at(i, x), pitch = coarse.pitch](const Acc<T>(&pair)[2]) mutable {
        write(to, pair);
        to += pitch;
      };
    });
    __syncthreads();
    const Level& level = plan.levels[s];
    refine_to_plane<Matrix::kUp, true>(coarse, fine, plane<T>(tile, level.data, level),
                                       level.alignment, box(plan, tile, s, 0, 0));
    fine = coarse;
  }
  const Level& coarsest = plan.levels[plan.steps];
  store(fine, plane<T>(tile, coarsest.data, coarsest), coarsest.alignment,
        box(plan, tile, plan.steps, 0, 0));
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kResident<T>)
    collapse_kernel(const __grid_constant__ Plan plan) {
  const Tile tile(plan);
  for (int s = plan.steps; s >= 0; --s) {
    const Level& level = plan.levels[s];
    load(region<T, T>(plan, tile, s), plane<const T>(tile, level.data, level), level.alignment);
  }
  arrive();
  for (int s = plan.steps - 1; s > 0; --s) {
    const auto fine = region<T, T>(plan, tile, s), coarse = region<T, T>(plan, tile, s + 1);
    refine<Matrix::kUp, false, To::kRegion>(coarse, fine, static_cast<T*>(nullptr), fine);
    __syncthreads();
  }
  const auto fine = region<T, T>(plan, tile, 0), coarse = region<T, T>(plan, tile, 1);
  refine_to_plane<Matrix::kUp, false>(coarse, fine, plane<T>(tile, plan.fine, plan.levels[0]),
                                      plan.fine_alignment, fine);
}

// g_{s+1} -= up^T(dL_s): level s is held as F, and its gradient still to come.
template <typename T, typename F>
__device__ void subtract_coarsened(const Plan& plan, const Tile& tile, int s) {
  using A = Acc<T>;
  const auto coarse = region<T, A>(plan, tile, s + 1);
  const Box want = box(plan, tile, s + 1, 1, min(s + 1, 2));
  coarsen<Matrix::kUp>(region<T, F>(plan, tile, s), want, [&](int i, int x) {
    return [to = coarse.at(i, x), pitch = coarse.pitch](const A(&pair)[2]) mutable {
      A v[2];
      read(to, v);
      v[0] -= pair[0];
      v[1] -= pair[1];
      write(to, v);
      to += pitch;
    };
  });
  __syncthreads();
}

// Then g_s = dL_s + down^T(g_{s+1}), in place but for the last.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kResident<T>)
    build_backward_kernel(const __grid_constant__ Plan plan) {
  const Tile tile(plan);
  using A = Acc<T>;
  for (int s = plan.steps; s > 0; --s) {
    const Level& level = plan.levels[s];
    load(region<T, A>(plan, tile, s), plane<const T>(tile, level.data, level), level.alignment);
  }
  const Level& finest = plan.levels[0];
  load(region<T, T>(plan, tile, 0), plane<const T>(tile, finest.data, finest), finest.alignment);
  arrive();
  for (int s = plan.steps - 1; s > 0; --s) {
    subtract_coarsened<T, A>(plan, tile, s);
    const auto level = region<T, A>(plan, tile, s), coarse = region<T, A>(plan, tile, s + 1);
    Box want = box(plan, tile, s, 1, min(s, 2));
    want.x0 &= ~3;
    refine<Matrix::kDown, false, To::kRegion>(coarse, level, static_cast<A*>(nullptr), want);
    __syncthreads();
  }
  subtract_coarsened<T, T>(plan, tile, 0);
  const auto fine = region<T, T>(plan, tile, 0);
  const auto coarse = region<T, A>(plan, tile, 1);
  refine_to_plane<Matrix::kDown, false>(coarse, fine, plane<T>(tile, plan.fine, finest),
                                        plan.fine_alignment, box(plan, tile, 0, 0, 0));
}

template <typename T, typename F>
__device__ void collapse_backward_step(const Plan& plan, const Tile& tile, int s) {
  const Level& level = plan.levels[s + 1];
  const auto coarse = region<T, Acc<T>>(plan, tile, s + 1);
  const Box own = box(plan, tile, s + 1, 0, 0);
  T* grad = plane<T>(tile, level.data, level);
  const bool last = s + 1 == plan.steps;
  coarsen<Matrix::kUp>(region<T, F>(plan, tile, s), coarse, [&](int i, int x) {
    const Output<T, 2> out(grad, level.width, level.alignment, own, x);
    return [=, to = coarse.at(i, x), pitch = coarse.pitch](const Acc<T>(&pair)[2]) mutable {
      if (!last) write(to, pair);
      if (out.has_row(i)) out.put(i, pair);
      to += pitch;
      ++i;
    };
  });
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kResident<T>)
    collapse_backward_kernel(const __grid_constant__ Plan plan) {
  const Tile tile(plan);
  wait_for_previous_launch();
  const auto fine = region<T, T>(plan, tile, 0);
  load(fine, plane<const T>(tile, plan.fine, plan.levels[0]), plan.fine_alignment);
  arrive();
  collapse_backward_step<T, T>(plan, tile, 0);
  for (int s = 1; s < plan.steps; ++s) collapse_backward_step<T, Acc<T>>(plan, tile, s);
}

// --- Plans: how many steps a launch takes, and its tile ------------------------------------------

enum class Op { kBuild, kCollapse, kBuildBackward, kCollapseBackward };

struct Device {
  int major, multiprocessors, block_bytes, multiprocessor_bytes;
};

struct Halo {
  int before, after;
};

// Rows (columns alike) of level s that a tile needs beyond its own, where a launch takes `steps`.
Halo halo(Op op, int s, int steps) {
  const int above = 1 << (steps - s);
  switch (op) {
    case Op::kBuild:  // 1 around the coarsest; a step of down adds 2i - 2 .. 2i + 2
      return {3 * above - 2, 2 * above - 1};
    case Op::kCollapseBackward:
      return {2 * above - 2, above - 1};
    case Op::kCollapse:  // fine j needs coarse i - 1 (if even), i, i + 1, of i = j / 2
      return {std::min(s, 1), std::min(s, 2)};
    case Op::kBuildBackward:  // up^T (2i - 2 .. 2i + 2) on what `kCollapse` needs one level up
      return s == 0 ? Halo{4, 3} : (s < steps ? Halo{5, 6} : Halo{1, 2});
  }
  return {0, 0};
}

int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : (dtype == DType::kFloat32 ? 4 : 2);
}

int row_alignment(const void* data, int width, DType dtype) {
  const auto row_bytes = static_cast<uintptr_t>(width) * element_bytes(dtype);
  const auto bits = reinterpret_cast<uintptr_t>(data) | row_bytes | 16;
  return static_cast<int>(bits & -bits);
}

Plan make_plan(Op op, const Pyramid& p, const void* fine, int first, int steps, int h, int w) {
  const int bytes = element_bytes(p.dtype), align = column_alignment(bytes);
  const bool gradient = op == Op::kBuildBackward || op == Op::kCollapseBackward;
  Plan plan{};
  plan.steps = steps;
  plan.tile_h = std::min(h, p.height[first]);
  plan.tile_w = std::min(w, p.width[first]);
  plan.tiles_x = ceil_div(p.width[first], plan.tile_w);
  plan.tiles = plan.tiles_x * ceil_div(p.height[first], plan.tile_h);
  plan.fine = const_cast<void*>(fine);
  plan.fine_alignment = row_alignment(fine, p.width[first], p.dtype);
  int offset = 0;
  for (int s = 0; s <= steps; ++s) {
    const auto [before, after] = halo(op, s, steps);
    const int height = p.height[first + s], width = p.width[first + s], mask = (1 << s) - 1;
    // A tile that does not divide by 2^s can begin and end within an element.
    const auto extent = [&](int tile, int n) {
      return std::min((tile + mask) / (mask + 1) + ((tile & mask) != 0) + before + after, n);
    };
    const int rows = extent(plan.tile_h, height);
    const int columns = std::min(extent(plan.tile_w, width) + align - 1, width);
    void* data = p.data[first + s];
    const int pitch = ceil_div(columns, align) * align;
    plan.levels[s] = {data,  height, width, before,
                      after, offset, pitch, row_alignment(data, width, p.dtype)};
    if (op == Op::kCollapseBackward && s == steps) break;  // straight to global memory
    offset += ceil_div(rows * pitch * (gradient && s > 0 ? std::max(bytes, 4) : bytes), 16) * 16;
  }
  plan.shared_bytes = offset + 16;  // `refine` may read two elements past a row
  return plan;
}

// Threads, a power of two. A warp's set-up and its first two rows cost as much as ten and give
// nothing: few warps with many rows each where blocks abound, else many, for the latency.
int choose_threads(const Plan& plan, const Pyramid& p, const Device& device) {
  const int resident = std::max(device.multiprocessor_bytes / (plan.shared_bytes + 1024), 1);
  const bool abound = p.planes * plan.tiles >= 4 * device.multiprocessors && resident >= 3;
  const int most = abound ? 128 : (resident >= 3 ? 256 : kMaxThreads);
  const int quads = ceil_div(plan.tile_h, 4) * ceil_div(plan.tile_w, 4);
  const int least = 32 * ceil_div(plan.levels[0].pitch, 4 * 30);  // a warp for a chunk of a row
  int threads = 64;
  while (threads < least || (threads < most && threads < quads)) threads *= 2;
  return threads;
}

// The next launch, from level `first`: whole planes where they fit and are enough (or small), else
// tiles: of the heights that give every multiprocessor four, three at a time, the one with the
// fewest rows, halo included, on the busiest; where there are too few planes, low tiles.
Plan choose_plan(Op op, const Pyramid& p, const void* fine, int first, const Device& device) {
  const int height = p.height[first], width = p.width[first], rest = p.num_levels - 1 - first;
  const int bytes = element_bytes(p.dtype), widest = bytes == 2 ? 248 : 128;
  const bool widens = op == Op::kBuild || op == Op::kCollapseBackward;  // halo doubles every step
  const auto fits = [&](const Plan& plan, int blocks) {
    return plan.shared_bytes <= device.block_bytes &&
           blocks * (plan.shared_bytes + 1024) <= device.multiprocessor_bytes;
  };
  if (widens && rest > kTileSteps && width <= 512 && p.planes * 2 >= device.multiprocessors) {
    const Plan plan = make_plan(op, p, fine, first, rest, height, width);
    if (fits(plan, 1)) return plan;
  }
  const bool one_tile = height <= 32 && width <= widest;
  const int steps = widens && !one_tile ? std::min(rest, kTileSteps) : rest;
  const int sector = std::max(8, 32 / bytes);  // columns; also a multiple of 2^(kTileSteps + 1)
  int tile_w = width;
  for (int n = 1;; ++n) {
    if (n > 1) tile_w = ceil_div(ceil_div(width, n), sector) * sector;
    if (make_plan(op, p, fine, first, steps, 32, tile_w).levels[0].pitch <= widest) break;
  }
  Plan best{};
  int64_t least = INT64_MAX;
  for (int tile_h = 32; tile_h <= 128; tile_h += 8) {
    const Plan plan = make_plan(op, p, fine, first, steps, tile_h, tile_w);
    const int64_t blocks = p.planes * plan.tiles, sms = device.multiprocessors;
    // A block's start, and its halo at the coarser levels, weigh about 8 rows.
    const int halo = plan.levels[0].before + plan.levels[0].after + 8;
    const int64_t rows = (blocks + sms - 1) / sms * (plan.tile_h + halo);
    if (!fits(plan, 3) || blocks < 4 * sms || rows >= least) continue;
    least = rows;
    best = plan;
  }
  if (best.steps > 0) return best;
  const Plan plan = make_plan(op, p, fine, first, steps, 32, tile_w);
  const bool enough = p.planes * plan.tiles >= 2 * device.multiprocessors || steps > kTileSteps;
  return enough && fits(plan, 1) ? plan : make_plan(op, p, fine, first, steps, 16, tile_w);
}

Device current_device(cudaError_t& error) {
  int id = 0;
  Device d{};
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, id);
  };
  error = cudaGetDevice(&id);
  get(&d.major, cudaDevAttrComputeCapabilityMajor);
  get(&d.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&d.block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&d.multiprocessor_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return d;
}

template <typename T>
auto kernel_of(Op op) {
  switch (op) {
    case Op::kBuild:
      return build_kernel<T>;
    case Op::kCollapse:
      return collapse_kernel<T>;
    case Op::kBuildBackward:
      return build_backward_kernel<T>;
    default:
      return collapse_backward_kernel<T>;
  }
}

void (*kernel_of(Op op, DType dtype))(Plan) {
  switch (dtype) {
    case DType::kFloat32:
      return kernel_of<float>(op);
    case DType::kBFloat16:
      return kernel_of<__nv_bfloat16>(op);
    case DType::kFloat16:
      return kernel_of<__half>(op);
    default:
      return kernel_of<double>(op);
  }
}

// A launch that follows another may start while that one ends; its kernel waits before it reads.
cudaError_t launch(Op op, const Pyramid& p, const Plan& plan, const Device& device, bool follows,
                   cudaStream_t stream) {
  const auto kernel = kernel_of(op, p.dtype);
  const int64_t blocks = p.planes * plan.tiles;
  if (blocks > INT32_MAX || plan.shared_bytes > device.block_bytes) {
    return cudaErrorInvalidConfiguration;
  }
  if (plan.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(choose_threads(plan, p, device));
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = follows && device.major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, plan);
}

// Bytes between two launches of build: their coarsest level, which the next one's detail replaces.
int64_t scratch_bytes(const Pyramid& p, int level) {
  const int64_t bytes = p.planes * p.height[level] * p.width[level] * element_bytes(p.dtype);
  return (bytes + 255) / 256 * 256;
}

cudaError_t run(Op op, const Pyramid& p, const void* fine, void* scratch, cudaStream_t stream) {
  if (p.planes == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  const Device device = current_device(error);
  for (int first = 0; first + 1 < p.num_levels && error == cudaSuccess;) {
    Plan plan = choose_plan(op, p, fine, first, device);
    const int last = first + plan.steps;
    if (op == Op::kBuild && last + 1 < p.num_levels) {
      Level& coarsest = plan.levels[plan.steps];
      coarsest.data = scratch;
      coarsest.alignment = row_alignment(scratch, coarsest.width, p.dtype);
      scratch = static_cast<char*>(scratch) + scratch_bytes(p, last);
    }
    error = launch(op, p, plan, device, first > 0, stream);
    fine = plan.levels[plan.steps].data;  // what the next launch starts from
    first = last;
  }
  return error;
}

}  // namespace

int64_t binomial_build_scratch_bytes(const Pyramid& levels) {
  int64_t bytes = 0;
  for (int s = kTileSteps; s + 1 < levels.num_levels; s += kTileSteps) {
    bytes += scratch_bytes(levels, s);
  }
  return bytes;
}

cudaError_t binomial_build(const void* x, const Pyramid& levels, void* scratch,
                           cudaStream_t stream) {
  return run(Op::kBuild, levels, x, scratch, stream);
}

cudaError_t binomial_collapse(const Pyramid& levels, void* x, cudaStream_t stream) {
  return run(Op::kCollapse, levels, x, nullptr, stream);
}

cudaError_t binomial_build_backward(const Pyramid& grads, void* dx, cudaStream_t stream) {
  return run(Op::kBuildBackward, grads, dx, nullptr, stream);
}

cudaError_t binomial_collapse_backward(const void* dy, const Pyramid& grads, cudaStream_t stream) {
  return run(Op::kCollapseBackward, grads, dy, nullptr, stream);
}

}  // namespace dfm_fast
