// csrc/cuda/pyramids.cu on a CPU: every CUDA thread is a fiber, every barrier a switch.
//
// Warps run one after another, each up to the next __syncthreads, forwards or backwards: results
// that depend on the order are races. Threads that wait for different things abort, as they would
// hang on a GPU. Shared memory holds NaNs before each block and is checked
// for writes past its end. tests/test_cuda_sources.py builds this with the CUDA headers' names
// standing for an empty file.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

// --- What the CUDA headers would give --------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
dim3 threadIdx(0), blockIdx(0), blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct __nv_bfloat16 {
  uint16_t bits;
};
using __half = _Float16;

float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
__nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
float __half2float(__half x) { return x; }
__half __float2half_rn(float x) { return __half(x); }
int __clz(int x) { return __builtin_clz(x); }

// --- Fibers ------------------------------------------------------------------------------------

namespace emulation {

constexpr int kStack = 1 << 16, kWarp = 32, kMaxShared = 1 << 18;

struct Fiber {
  enum State { kReady, kAtBarrier, kAtShuffle, kDone } state;
  jmp_buf context;
  bool started;
  std::vector<char> stack;
  alignas(8) char slots[2][8];  // what a shuffle hands over: a turn reads one, the next writes one
  int turn;
};

std::vector<Fiber> fibers(1024);
jmp_buf scheduler;
int current;
std::function<void()> body;
int multiprocessors = 132, shared_limit = 227 * 1024, launches = 0, largest_block = 0;
bool backwards = false;

void fail(const char* message) {
  std::fprintf(stderr, "cuda_emulation: %s (block %u)\n", message, blockIdx.x);
  std::abort();
}

void wait(Fiber::State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

void entry() {
  body();
  fibers[current].state = Fiber::kDone;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  fiber.stack.resize(kStack);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

int count(int begin, int end, Fiber::State state) {
  return std::count_if(&fibers[begin], &fibers[0] + end,
                       [&](const Fiber& f) { return f.state == state; });
}

void release(int begin, int end) {
  for (int i = begin; i < end; ++i) fibers[i].state = Fiber::kReady;
}

// To the next barrier: as far ahead of the other warps as a warp can get.
void run_warp(int begin) {
  const int end = begin + kWarp;
  while (count(begin, end, Fiber::kReady) > 0) {
    for (int i = 0; i < kWarp; ++i) {
      const int thread = backwards ? end - 1 - i : begin + i;
      if (fibers[thread].state == Fiber::kReady) resume(thread);
    }
    if (count(begin, end, Fiber::kAtShuffle) == kWarp) release(begin, end);
  }
}

void run_block() {
  const int threads = blockDim.x;
  for (int i = 0; i < threads; ++i) {
    fibers[i].state = Fiber::kReady;
    fibers[i].started = false;
    fibers[i].turn = 0;
  }
  while (count(0, threads, Fiber::kDone) < threads) {
    for (int i = 0; i < threads; i += kWarp) run_warp(backwards ? threads - kWarp - i : i);
    if (count(0, threads, Fiber::kAtBarrier) == threads) {
      release(0, threads);
    } else if (count(0, threads, Fiber::kDone) < threads) {
      fail("threads wait for different things");
    }
  }
}

template <typename T>
T shuffle(T value, int delta) {
  Fiber& fiber = fibers[current];
  const int turn = fiber.turn++ & 1;
  std::memcpy(fiber.slots[turn], &value, sizeof(T));
  const int thread = current, from = thread + delta;
  wait(Fiber::kAtShuffle);
  if (from < 0 || from / kWarp != thread / kWarp) return value;
  std::memcpy(&value, fibers[from].slots[turn], sizeof(T));
  return value;
}

}  // namespace emulation

void __syncthreads() { emulation::wait(emulation::Fiber::kAtBarrier); }

template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return emulation::shuffle(value, -delta);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return emulation::shuffle(value, delta);
}

cudaError_t cudaGetDevice(int* id) { return *id = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int shared = emulation::shared_limit;
  const int values[] = {9, emulation::multiprocessors, shared, shared + 1024};
  return *value = values[attribute], cudaSuccess;
}
template <typename K>
cudaError_t cudaFuncSetAttribute(K, int, int) {
  return cudaSuccess;
}
template <typename P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(P), const P&);

#include "../csrc/cuda/pyramids.cu"

namespace dfm_fast {
namespace {
alignas(16) unsigned char shared[emulation::kMaxShared];
}
}  // namespace dfm_fast

template <typename P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& plan) {
  using namespace emulation;
  const int bytes = config->dynamicSmemBytes, threads = config->blockDim.x;
  if (bytes > shared_limit || threads % kWarp || threads > 1024) fail("launch configuration");
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  body = [&] { kernel(plan); };
  ++launches;
  largest_block = std::max(largest_block, bytes);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    std::fill_n(dfm_fast::shared, kMaxShared, 0xff);
    run_block();
    for (int i = bytes; i < kMaxShared; ++i) {
      if (dfm_fast::shared[i] != 0xff) fail("write past the end of shared memory");
    }
  }
  return cudaSuccess;
}

// --- For ctypes ----------------------------------------------------------------------------------

extern "C" {

void configure(int multiprocessors, int shared_limit, int backwards) {
  emulation::multiprocessors = multiprocessors;
  emulation::shared_limit = shared_limit;
  emulation::backwards = backwards;
}

// op in the order of pyramids.h; returns the number of launches, or -1.
int run(int op, const dfm_fast::Pyramid* pyramid, void* fine) {
  emulation::launches = 0;
  cudaError_t error = cudaSuccess;
  std::vector<char> scratch(dfm_fast::binomial_build_scratch_bytes(*pyramid) + 256);
  char* aligned = scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) & 255);
  if (op == 0) error = dfm_fast::binomial_build(fine, *pyramid, aligned, nullptr);
  if (op == 1) error = dfm_fast::binomial_collapse(*pyramid, fine, nullptr);
  if (op == 2) error = dfm_fast::binomial_build_backward(*pyramid, fine, nullptr);
  if (op == 3) error = dfm_fast::binomial_collapse_backward(fine, *pyramid, nullptr);
  return error == cudaSuccess ? emulation::launches : -1;
}

// The matrices' entries themselves: kind 0 down, 1 up; fine 2k on coarse k-1, k, k+1, fine 2k+1 on
// coarse k, k+1.
void weights(int kind, int k, int n, double out[5]) {
  using dfm_fast::Matrix;
  const auto w = kind == 0 ? dfm_fast::weights<Matrix::kDown, double>(k, n)
                           : dfm_fast::weights<Matrix::kUp, double>(k, n);
  const double values[] = {w.left, w.center, w.right, w.odd_center, w.odd_right};
  std::copy_n(values, 5, out);
}
}
