// Tiles of a pyramid in shared memory, and the two stencils between a level and the next.
// pyramids.cu explains the whole.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "pyramids.h"

namespace dfm_fast {
namespace {

// --- Types ---------------------------------------------------------------------------------------

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulate<T>::type;

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T round_to(Acc<T> x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 round_to<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half round_to<__half>(float x) {
  return __float2half_rn(x);
}

// One level of a launch, finest first.
struct Level {
  void* data;         // [planes, height, width], or null
  int height, width;  // of a plane
  int before, after;  // halo of the region
  int offset, pitch;  // of the region in shared memory: bytes, elements
  int alignment;      // bytes, at most 16, that divide the address of every row
};

struct Plan {
  Level levels[kMaxLevels];
  void* fine;  // [planes, levels[0].height, levels[0].width]
  int fine_alignment;
  int steps;  // levels - 1
  int tile_h, tile_w, tiles_x, tiles;
  int shared_bytes;
};

struct Box {
  int y0, y1, x0, x1;  // rows [y0, y1), columns [x0, x1)
};

// A box of a level in shared memory; x0 is a multiple of 16 bytes and of 4.
template <typename T>
struct Region : Box {
  T* data;
  int pitch;
  int height, width;  // of the plane

  __device__ T* at(int y, int x) const { return data + (y - y0) * pitch + (x - x0); }
};

// Columns to which a region's first is rounded down: whole quads, and whole 16 bytes.
__host__ __device__ constexpr int column_alignment(int bytes) {
  return bytes >= 4 ? 4 : 16 / bytes;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// --- The matrices ----------------------------------------------------------------------------

enum class Matrix { kDown, kUp };

// Entries of fine 2k against coarse k-1, k, k+1 and of fine 2k+1 against coarse k, k+1.
template <typename A>
struct Weights {
  A left, center, right, odd_center, odd_right;
};

template <Matrix M, typename A>
constexpr A kUnit = A(1) / (M == Matrix::kDown ? 16 : 8);

// Away from the borders: 2 <= k < m - 2.
template <Matrix M, typename A>
__host__ __device__ constexpr Weights<A> inner_weights() {
  constexpr A u = kUnit<M, A>;
  return {u, 6 * u, u, 4 * u, 4 * u};
}

// n: the fine side, at least 2. Entries outside the matrix are 0.
template <Matrix M, typename A>
__host__ __device__ inline Weights<A> weights(int k, int n) {
  const int m = (n + 1) / 2;
  constexpr A u = kUnit<M, A>;
  if (k >= 2 && k < m - 2) return inner_weights<M, A>();
  const A inner = k + 1 < m ? u : 0;
  if (M == Matrix::kDown) {  // taps beyond a border fold back: 0 at the left, n-1 at the right
    const A fold = n % 2 == 1 && k == m - 2 ? 2 : 1;
    return {k == 1 ? 2 * u : (k > 1 ? u : 0), u * (6 + (n % 2 == 0 && k == m - 1) + (n == 2)),
            fold * inner, k == 0 ? 8 * u : 4 * u, 4 * fold * inner};
  }
  return {k > 0 ? u : 0, u * (6 + (k == m - 1) + (m == 1)), k == 0 ? 2 * inner : inner,
          k == m - 1 ? 8 * u : 4 * u, 4 * inner};
}

// --- Tiles, loads, stores --------------------------------------------------------------------

// Threads, a power of two, as groups of `width` lanes: the least power of two, 4 to 32, that covers
// `count`. Shifts, as divisions would cost more than a row of pixels.
struct Lanes {
  int width, lane, group, groups, log2_groups;

  __device__ explicit Lanes(int count) {
    const int shift = count >= 32 ? 5 : (count <= 4 ? 2 : 32 - __clz(count - 1));
    width = 1 << shift;
    lane = threadIdx.x & (width - 1);
    group = threadIdx.x >> shift;
    groups = blockDim.x >> shift;
    log2_groups = 31 - __clz(groups);
  }
};

// `rows` rows of `chunks` chunks, dealt to groups of lanes; there are at least as many as chunks.
struct Share {
  int chunk, first_row, rows;

  __device__ Share(const Lanes& lanes, int all_rows, int chunks) {
    if (chunks == 1) {
      chunk = 0;
      rows = (all_rows + lanes.groups - 1) >> lanes.log2_groups;
      first_row = lanes.group * rows;
    } else {
      const unsigned group = lanes.group, n = chunks, parts = unsigned(lanes.groups) / n;
      rows = (all_rows + parts - 1) / parts;
      chunk = group % n;
      first_row = group / n * rows;
    }
  }
};

// What a thread block works on: a tile of a plane.
struct Tile {
  int y, x;
  int64_t plane;

  __device__ explicit Tile(const Plan& plan) {
    const unsigned tiles = plan.tiles, tiles_x = plan.tiles_x, i = blockIdx.x % tiles;
    y = i / tiles_x * plan.tile_h;
    x = i % tiles_x * plan.tile_w;
    plane = blockIdx.x / tiles;
  }
};

// The tile's part of level s with a margin, within the plane.
__device__ inline Box box(const Plan& plan, const Tile& tile, int s, int before, int after) {
  const Level& level = plan.levels[s];
  const int round_up = (1 << s) - 1, y = tile.y, x = tile.x;
  return {max((y >> s) - before, 0), min(((y + plan.tile_h + round_up) >> s) + after, level.height),
          max((x >> s) - before, 0), min(((x + plan.tile_w + round_up) >> s) + after, level.width)};
}

extern __shared__ __align__(16) unsigned char shared[];

template <typename T, typename S>
__device__ inline Region<S> region(const Plan& plan, const Tile& tile, int s) {
  const Level& level = plan.levels[s];
  Region<S> r;
  static_cast<Box&>(r) = box(plan, tile, s, level.before, level.after);
  r.x0 &= -column_alignment(sizeof(T));
  r.data = reinterpret_cast<S*>(shared + level.offset);
  r.pitch = level.pitch;
  r.height = level.height;
  r.width = level.width;
  return r;
}

template <typename T>
__device__ inline T* plane(const Tile& tile, void* data, const Level& level) {
  return static_cast<T*>(data) + tile.plane * level.height * level.width;
}

template <int kBytes>
__device__ inline void copy_async(void* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes));
#else
  using Bytes = Pack<unsigned char, kBytes>;
  *static_cast<Bytes*>(to) = *static_cast<const Bytes*>(from);
#endif
}

// N elements of T at a time, 16 bytes or one element, down the columns.
template <int N, typename T, typename S>
__device__ void load_columns(const Region<S>& to, const T* from) {
  const Lanes lanes(ceil_div(to.x1 - to.x0, N));
  const int64_t stride = int64_t(lanes.groups) * to.width;
  for (int x = to.x0 + lanes.lane * N; x < to.x1; x += lanes.width * N) {
    const int y = to.y0 + lanes.group;
    const T* p = from + int64_t(y) * to.width + x;
    S* to_p = to.at(y, x);
#pragma unroll 4
    for (int i = y; i < to.y1; i += lanes.groups) {
      if constexpr (sizeof(T) == sizeof(S) && N * sizeof(T) >= 4) {
        copy_async<N * sizeof(T)>(to_p, p);
      } else {
        const auto pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
        for (int c = 0; c < N; ++c) to_p[c] = round_to<S>(widen(pack.v[c]));
      }
      p += stride;
      to_p += lanes.groups * to.pitch;
    }
  }
}

// The region of a plane into shared memory; complete after `arrive`.
template <typename T, typename S>
__device__ void load(const Region<S>& to, const T* from, int alignment) {
  if (alignment >= 16) {
    load_columns<16 / sizeof(T)>(to, from);
  } else {
    load_columns<1>(to, from);
  }
}

__device__ inline void arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncthreads();
}

// Where a launch follows another of the same operation: start early, read late.
__device__ inline void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename S, int N>
__device__ inline void read(const S* from, Acc<S> (&v)[N]) {
  const auto pack = *reinterpret_cast<const Pack<S, N>*>(from);
#pragma unroll
  for (int c = 0; c < N; ++c) v[c] = widen(pack.v[c]);
}

template <typename S, int N>
__device__ inline void write(S* to, const Acc<S> (&v)[N]) {
  Pack<S, N> pack;
#pragma unroll
  for (int c = 0; c < N; ++c) pack.v[c] = round_to<S>(v[c]);
  *reinterpret_cast<Pack<S, N>*>(to) = pack;
}

// The part of a plane [.., width] that a tile owns, from column x on, N columns at a time.
template <typename T, int N>
class Output {
 public:
  __device__ Output(T* plane, int width, int alignment, const Box& own, int x)
      : to_(reinterpret_cast<char*>(plane + int64_t(own.y0) * width + x)),
        row_bytes_(width * int(sizeof(T))),
        y0_(own.y0),
        rows_(own.y1 - own.y0),
        begin_(own.x0 - x),
        end_(own.x1 - x),
        vector_(alignment >= int(alignof(Pack<T, N>)) && begin_ <= 0 && end_ >= N) {}

  __device__ bool has_row(int y) const { return unsigned(y - y0_) < unsigned(rows_); }

  __device__ void put(int y, const Acc<T> (&v)[N]) const {
    T* row = reinterpret_cast<T*>(to_ + int64_t(y - y0_) * row_bytes_);
    if (vector_) {
      write(row, v);
    } else {
#pragma unroll
      for (int c = 0; c < N; ++c) {
        if (c >= begin_ && c < end_) row[c] = round_to<T>(v[c]);
      }
    }
  }

 private:
  char* to_;
  int row_bytes_, y0_, rows_, begin_, end_;
  bool vector_;
};

// The tile's part of a region to its plane.
template <typename T>
__device__ void store(const Region<T>& from, T* to, int alignment, const Box& own) {
  const int first = own.x0 & ~3;  // a quad, which a coarse level's tile can begin within
  const Lanes lanes(ceil_div(own.x1 - first, 4));
  for (int x = first + 4 * lanes.lane; x < own.x1; x += 4 * lanes.width) {
    const Output<T, 4> out(to, from.width, alignment, own, x);
    for (int y = own.y0 + lanes.group; y < own.y1; y += lanes.groups) {
      Acc<T> v[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = widen(from.at(y, x)[c]);
      out.put(y, v);
    }
  }
}

// --- The two stencils ------------------------------------------------------------------------

// sink(i, 2q) gives put({c_2q, c_2q+1}), which is called for the coarse rows i, i + 1, ... of the
// column pairs that cover `want`; c = M fine (down) or M^T fine (up^T). Neighbouring lanes hold
// neighbouring quads; where a row has more than 32, the outer two of each group of lanes are
// computed twice.
template <Matrix M, typename F, typename Sink>
__device__ void coarsen(const Region<F>& fine, const Box& want, Sink sink) {
  using A = Acc<F>;
  const int first = max(want.x0 / 2 - 1, fine.x0 / 4);
  const int last = min((want.x1 + 1) / 2 + 1, ceil_div(fine.x1, 4));
  const Lanes lanes(last - first);
  const int chunks = last - first <= lanes.width ? 1 : ceil_div(last - first - 2, 30);
  const Share share(lanes, want.y1 - want.y0, chunks);
  const int chunk = share.chunk, begin = want.y0 + share.first_row, end = begin + share.rows;
  const int q = first + chunk * (lanes.width - 2) + lanes.lane;
  const bool inside = begin < want.y1 && q < last;
  const bool leftmost = lanes.lane == 0, rightmost = lanes.lane == lanes.width - 1;
  const bool emits = inside && (!leftmost || chunk == 0) && (!rightmost || chunk == chunks - 1) &&
                     q >= want.x0 / 2 && 2 * q < want.x1;
  const int emits_end = emits ? min(end, want.y1) : begin;
  const int valid = fine.width - 4 * q;
  const bool ragged = fine.width % 4 != 0;
  const auto w0 = weights<M, A>(2 * q, fine.width), w1 = weights<M, A>(2 * q + 1, fine.width);
  auto put = sink(begin, 2 * q);

  A sum[4] = {}, next[4] = {};  // of coarse rows k and k + 1, over the fine rows so far
  A v[4];                       // row k - 1, complete down the rows
  const auto add_rows = [&](const Weights<A>& w, const A(&even)[4], const A(&odd)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      v[c] = sum[c] + w.left * even[c];
      sum[c] = next[c] + w.center * even[c] + w.odd_center * odd[c];
      next[c] = w.right * even[c] + w.odd_right * odd[c];
    }
  };
  const int inner_begin = max(2, (fine.y0 + 1) / 2);
  const int inner_end = inside ? min((fine.height + 1) / 2 - 2, fine.y1 / 2) : 0;
  const F* row = fine.at(2 * begin - 2, 4 * q);
  for (int k = begin - 1; k <= end; ++k, row += 2 * fine.pitch) {
    A even[4] = {}, odd[4] = {};
    if (k >= inner_begin && k < inner_end) {
      read(row, even);
      read(row + fine.pitch, odd);
      add_rows(inner_weights<M, A>(), even, odd);
    } else {
      if (inside && 2 * k >= fine.y0 && 2 * k < fine.y1) read(row, even);
      if (inside && 2 * k + 1 >= fine.y0 && 2 * k + 1 < fine.y1) read(row + fine.pitch, odd);
      add_rows(weights<M, A>(k, fine.height), even, odd);
    }
    if (k <= begin) continue;
    if (ragged) {  // not in the plane: whatever the region holds there
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = c < valid ? v[c] : 0;
    }
    A left = __shfl_up_sync(0xffffffffu, w1.right * v[2] + w1.odd_right * v[3], 1);
    A right = __shfl_down_sync(0xffffffffu, w0.left * v[0], 1);
    left = leftmost ? 0 : left;
    right = rightmost ? 0 : right;
    const A pair[2] = {
        left + w0.center * v[0] + w0.odd_center * v[1] + w1.left * v[2],
        w0.right * v[0] + w0.odd_right * v[1] + w1.center * v[2] + w1.odd_center * v[3] + right};
    if (k <= emits_end) put(pair);
  }
}

// What `refine` computes, quad after quad down a column, plus (or minus) what the region of the
// same level holds: in place, or to the plane, with rows aligned for vectors or not.
enum class To { kRegion, kVector, kScalar };

template <typename T, typename F, To kTo, bool kSubtract>
class Combine {
 public:
  // At (y, x) of `want`, the part of the region to be written.
  __device__ Combine(const Region<F>& region, T* plane, const Box& want, int y, int x)
      : from_(region.at(y, x)),
        pitch_(region.pitch),
        to_(plane + int64_t(y) * region.width + x),
        width_(region.width),
        count_(want.x1 - x) {}

  __device__ void operator()(int row, const Acc<T> (&f)[4]) const {
    F* from = from_ + row * pitch_;
    T* to = to_ + row * width_;
    Acc<T> v[4];
    read(from, v);
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = kSubtract ? v[c] - f[c] : v[c] + f[c];
    if constexpr (kTo == To::kRegion) {
      write(from, v);
    } else if constexpr (kTo == To::kVector) {
      write(to, v);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (c < count_) to[c] = round_to<T>(v[c]);
      }
    }
  }

  __device__ void advance() {
    from_ += 2 * pitch_;
    to_ += 2 * width_;
  }

 private:
  F* from_;
  int pitch_;
  T* to_;
  int64_t width_;
  int count_;
};

// fine (+ or -) M coarse (up) or M^T coarse (down^T) over `want`, which begins at a whole quad.
// What goes to the plane begins at an even row, and ends at one but at the plane's end.
template <Matrix M, bool kSubtract, To kTo, typename T, typename F, typename C>
__device__ void refine(const Region<C>& coarse, const Region<F>& fine, T* plane, const Box& want) {
  using A = Acc<C>;
  const int first = want.x0 / 4, last = ceil_div(want.x1, 4);
  const int k0 = want.y0 / 2, k1 = ceil_div(want.y1, 2);
  const Lanes lanes(last - first);
  const Share share(lanes, k1 - k0, ceil_div(last - first, 32));
  const int begin = k0 + share.first_row, end = min(begin + share.rows, k1);
  const int q = first + share.chunk * 32 + lanes.lane;
  if (q >= last || begin >= end) return;
  const int inner_end = (fine.height + 1) / 2 - 3;
  constexpr bool to_plane = kTo != To::kRegion;
  const auto w0 = weights<M, A>(2 * q, fine.width), w1 = weights<M, A>(2 * q + 1, fine.width);
  // Columns 2q - 1 .. 2q + 2. Beyond the plane, where the weight is 0, stands the neighbour,
  // which the same outputs depend on anyway: an infinity spreads no further than it must.
  const int x = min(max(2 * q, coarse.x0), (coarse.x1 - 1) & ~1);
  const bool leftmost = x <= coarse.x0, single = x + 1 >= coarse.x1, last_two = x + 2 >= coarse.x1;
  const C* row = coarse.at(min(max(begin - 1, coarse.y0), coarse.y1 - 1), x);
  const auto refine_columns = [&](A(&h)[4]) {
    A c0 = widen(row[-1]), c3 = widen(row[2]), c[2];  // may be another row's, then unused
    read(row, c);
    c0 = leftmost ? c[0] : c0;
    c[1] = single ? c[0] : c[1];
    c3 = last_two ? c[1] : c3;
    h[0] = w0.left * c0 + w0.center * c[0] + w0.right * c[1];
    h[1] = w0.odd_center * c[0] + w0.odd_right * c[1];
    h[2] = w1.left * c[0] + w1.center * c[1] + w1.right * c3;
    h[3] = w1.odd_center * c[1] + w1.odd_right * c3;
  };
  const auto to_row = [&](int i) { row += i > coarse.y0 && i < coarse.y1 ? coarse.pitch : 0; };

  Combine<T, F, kTo, kSubtract> combine(fine, plane, want, 2 * begin, 4 * q);
  A here[4], below[4], even[4], odd[4];  // even: of row 2k, but for `below`
  refine_columns(even);
  to_row(begin);
  refine_columns(here);
  const auto w = weights<M, A>(begin, fine.height);
#pragma unroll
  for (int c = 0; c < 4; ++c) even[c] = w.left * even[c] + w.center * here[c];
  for (int k = begin; k < end; ++k) {
    to_row(k + 1);
    refine_columns(below);
    const auto put_rows = [&](const Weights<A>& w, const Weights<A>& next, bool inner) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        even[c] += w.right * below[c];
        odd[c] = w.odd_center * here[c] + w.odd_right * below[c];
      }
      if (to_plane || 2 * k >= want.y0) combine(0, even);
      if ((to_plane && inner) || 2 * k + 1 < want.y1) combine(1, odd);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        even[c] = next.left * here[c] + next.center * below[c];
        here[c] = below[c];
      }
    };
    if (k >= 2 && k < inner_end) {
      put_rows(inner_weights<M, A>(), inner_weights<M, A>(), true);
    } else {
      put_rows(weights<M, A>(k, fine.height), weights<M, A>(k + 1, fine.height), false);
    }
    combine.advance();
  }
}

template <Matrix M, bool kSubtract, typename T, typename F, typename C>
__device__ void refine_to_plane(const Region<C>& coarse, const Region<F>& fine, T* plane,
                                int alignment, const Box& want) {
  if (alignment >= int(alignof(Pack<T, 4>)) && fine.width % 4 == 0) {
    refine<M, kSubtract, To::kVector>(coarse, fine, plane, want);
  } else {
    refine<M, kSubtract, To::kScalar>(coarse, fine, plane, want);
  }
}

}  // namespace
}  // namespace dfm_fast
