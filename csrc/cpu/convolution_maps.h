// How threads walk through the maps of a depthwise convolution: what its forward and its gradients
// have in common.
#pragma once

#include "convolutions.h"

namespace dfm_fast {

constexpr int64_t kRingBytes = 1 << 16;   // of a thread's ring of activated rows
constexpr int64_t kPlaneBytes = 1 << 15;  // of a thread's padded rows of a plane

// A map and what is done to it on the way into the convolution.
template <class T>
struct Input {
  using A = acc_t<T>;
  const T* x;  // [N, C, H, W], or [N, H, W, C]
  const Affines<A>* norms = nullptr;
  bool spread = false;  // zeros between all pixels: the gradient of a convolution of stride 2
};

struct Sizes {
  int64_t samples, channels;
  Window window;
  int kernel, stride;
  bool last;

  int64_t in_pixels() const { return window.height * window.width; }
  int64_t out_pixels() const { return window.out_height * window.out_width; }
};

// Number of parts of `least` or more that n is cut into, at most `most`.
inline int64_t parts(int64_t n, int64_t least, int64_t most) {
  return std::max<int64_t>(1, std::min(most, n / std::max<int64_t>(least, 1)));
}

// --- channels_last ---

// Channels of a ring whose rows are that long: whole lines.
template <class A>
int64_t ring_channels(int64_t pixels, int64_t channels) {
  const int64_t fit = kRingBytes / (sizeof(A) * std::max<int64_t>(pixels, 1));
  return std::min(channels, std::max<int64_t>(fit / 32 * 32, 32));
}

// f(n, first row, end, first channel, channels, scratch) for bands of rows and blocks of channels:
// as many bands as keep all threads busy, as rows at their borders are computed twice.
template <class A, class F>
void parallel_bands(const Sizes& s, int64_t block, int64_t scratch, F f) {
  const int64_t rows = s.window.out_height, blocks = (s.channels + block - 1) / block;
  const int64_t wanted = 4 * at::get_num_threads(), have = s.samples * blocks;
  const int64_t bands = have ? parts(rows, 4 * kRows, (wanted + have - 1) / have) : 1;
  const int64_t band = ((rows + bands - 1) / bands + kRows - 1) / kRows * kRows;
  const int64_t work = band * s.window.out_width * block;
  at::parallel_for(0, have * bands, std::max<int64_t>(1, kTask / std::max<int64_t>(work, 1)),
                   [&](int64_t begin, int64_t end) {
                     Scratch<A> memory(scratch);
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t c = i % blocks * block, first = i / blocks % bands * band;
                       const int64_t last = std::min(first + band, rows);
                       if (first < last)
                         f(i / blocks / bands, first, last, c, std::min(block, s.channels - c),
                           memory.data());
                     }
                   });
}

// --- contiguous ---

// Row i of the window of a plane, with zeros left where it has them.
template <class T>
void pad_row(const Sizes& s, const Input<T>& in, int64_t plane, int64_t i, acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t W = s.window.width;
  if (in.spread) {
    const int64_t rows = (s.window.height + 1) / 2, cols = (W + 1) / 2;
    const T* from = in.x + (plane * rows + i / 2) * cols;
    for (int64_t j = 0; j < cols; ++j) to[2 * j] = i % 2 ? A(0) : load_one(from + j);
    return;
  }
  const T* from = in.x + (plane * s.window.height + i) * W;
  // The next plane, while this one is convolved: there is nothing else to wait for it behind.
  for (int64_t j = 0; j < W; j += 64 / sizeof(T))
    __builtin_prefetch(from + s.in_pixels() + j, 0, 2);
  if (!in.norms) return convert_row(to, from, W);
  const Affine<A> norm = in.norms->of(0, plane);
  const Vec<A> scale = Vec<A>{} + *norm.scale, offset = Vec<A>{} + *norm.offset;
  const A centre = *norm.centre;
  for_vectors<A>(W, [=](int64_t j, auto count) DFM_INLINE {
    store(to + j, silu((load(from + j, count) - centre) * scale + offset), count);
  });
}

// Padded rows of a plane in scratch, from `first` on; outside of the map they are zeros.
template <class A>
struct PaddedRows {
  const A* zeros;
  A* rows;
  int64_t first, size, height;

  const A* operator()(int64_t i) const {
    return i >= 0 && i < height ? rows + (i - first) * size : zeros;
  }
};

// f(plane, first row of output, end, PaddedRows) for all planes, in blocks whose padded rows fit in
// the first-level cache. The rows that two blocks share move up.
template <bool split = true, class T, class F>
void parallel_planes(const Sizes& s, const Input<T>& in, F f) {
  using A = acc_t<T>;
  const Window& g = s.window;
  const int64_t size = padded_row<A>(g, s.kernel, s.stride), seen = s.kernel - s.stride;
  const int64_t fit = (kPlaneBytes / static_cast<int64_t>(sizeof(A)) / size - seen) / s.stride;
  const int64_t block = std::min(std::max(fit / kPlaneRows, int64_t(1)) * kPlaneRows,
                                 (g.out_height + kPlaneRows - 1) / kPlaneRows * kPlaneRows);
  // Threads that have fewer planes than that take parts of one, where nothing is summed.
  const int64_t planes = s.samples * s.channels, blocks = (g.out_height + block - 1) / block;
  const int64_t bands = split && planes < 4 * at::get_num_threads() ? parts(blocks, 1, 16) : 1;
  const int64_t band = (blocks + bands - 1) / bands * block;
  const int64_t rows = block * s.stride + std::max<int64_t>(seen, 0);
  at::parallel_for(
      0, planes * bands, std::max<int64_t>(1, kTask / std::max<int64_t>(s.out_pixels(), 1)),
      [&](int64_t begin, int64_t end) {
        Scratch<A> memory((rows + 1) * size);
        A* scratch = memory.data() + size;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t plane = i / bands, start = i % bands * band;
          const int64_t stop = std::min(start + band, g.out_height);
          int64_t have = 0;  // rows before this one are there
          for (int64_t first = start; first < stop; first += block) {
            const int64_t last = std::min(first + block, stop);
            const int64_t from = first * s.stride - g.pad_h;
            const int64_t until = (last - 1) * s.stride - g.pad_h + s.kernel;
            const int64_t kept = std::max<int64_t>(from, 0), moved = block * s.stride;
            int64_t next = first > start ? std::max(have, kept) : kept;
            for (int64_t row = kept; first > start && row < have; ++row)
              std::copy_n(scratch + (row - from + moved) * size, size,
                          scratch + (row - from) * size);
            for (; next < std::min(until, g.height); ++next)
              pad_row(s, in, plane, next, scratch + (next - from) * size + g.pad_w);
            have = next;
            f(plane, first, last, PaddedRows<A>{memory.data(), scratch, from, size, g.height});
          }
        }
      });
}

}  // namespace dfm_fast
