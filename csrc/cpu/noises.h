// Passes over tensors and their noise: tiles of samples, each element with its own normal.
//
// The normals of a tensor are numbered by its row-major logical index, whatever its memory format.
// In channels_last memory a tile is some pixels of some channels: its normals are made channel by
// channel and transposed.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "philox.h"
#include "rows.h"

namespace dfm_fast {

// Samples of pixels x channels in memory. A contiguous tensor has one channel: all its elements.
struct Samples {
  int64_t count, pixels, channels;
  int64_t tile_pixels, tile_channels;

  static constexpr int64_t kTile = 1 << 12;  // elements: what fits in the first-level cache
  static constexpr int64_t kLeast = 64;      // pixels, of many channels: normals come in this many

  Samples(int64_t count, int64_t pixels, int64_t channels)
      : count(count), pixels(pixels), channels(channels) {
    tile_channels = std::min(channels, kTile / kLeast);
    tile_pixels = kTile / std::max<int64_t>(tile_channels, 1) / kLeast * kLeast;
  }

  int64_t elements() const { return pixels * channels; }
  int64_t pixel_tiles() const { return (pixels + tile_pixels - 1) / tile_pixels; }
  int64_t tiles() const {  // of a sample
    if (elements() == 0) return 0;
    return pixel_tiles() * ((channels + tile_channels - 1) / tile_channels);
  }
};

// Scratch of one thread.
template <class A>
struct NoiseBuffer {
  static constexpr int64_t kSlack = 4 * kLanes<float> + 4;  // of one row of normals
  static constexpr int64_t kRows = Samples::kTile + Samples::kTile / Samples::kLeast * kSlack;

  std::unique_ptr<A[]> rows{new A[kRows]};
  std::unique_ptr<A[]> pixels{new A[Samples::kTile + kLanes<A>]};
};

// At least n normals of a stream, the first of which is number e; returns where it lies.
inline const float* fill(const Normals& normals, uint64_t e, int64_t n, float* to) {
  constexpr int64_t lanes = kLanes<float>;
  const float* first = to + e % 4;
  uint64_t counter = e / 4;
  for (int64_t end = n + e % 4; end > 0; end -= 4 * lanes, to += 4 * lanes, counter += lanes) {
    auto z = normals(counter);
    for (int k = 0; k < 4; ++k) store(to + k * lanes, z[k]);
  }
  return first;
}
inline const double* fill(const Normals& normals, uint64_t e, int64_t n, double* to) {
  const double* first = to + e % 4;
  uint64_t counter = e / 4;
  for (int64_t end = n + e % 4; end > 0; end -= 4, to += 4) {
    auto z = normals.wide(counter++);
    std::copy(z.begin(), z.end(), to);
  }
  return first;
}

// f(i, z, count) for vectors of the normals e .. e + n; n <= kTile.
template <class A, class F>
DFM_INLINE inline void for_normals(const Normals& normals, uint64_t e, int64_t n, A* scratch,
                                   const F& f) {
  int64_t i = 0;
  if constexpr (std::is_same_v<A, float>) {
    constexpr int64_t lanes = kLanes<float>;
    if (e % 4 == 0)  // in registers
      for (; i + 4 * lanes <= n; i += 4 * lanes) {
        auto z = normals((e + i) / 4);
        for (int k = 0; k < 4; ++k) f(i + k * lanes, z[k], Whole<A>{});
      }
  }
  if (i == n) return;
  const A* z = fill(normals, e + i, n - i, scratch);
  for_vectors<A>(n - i, [&](int64_t k, auto count) DFM_INLINE { f(i + k, load(z + k), count); });
}

// f(m, z, count) for vectors of a tile of sample n; m counts elements of the sample in memory.
template <class A, class F>
DFM_INLINE inline void for_tile(const Normals& normals, const Samples& samples, int64_t n,
                                int64_t tile, NoiseBuffer<A>& buffer, const F& f) {
  uint64_t e = normals.first + static_cast<uint64_t>(n) * samples.elements();
  int64_t p = tile % samples.pixel_tiles() * samples.tile_pixels;
  int64_t c = tile / samples.pixel_tiles() * samples.tile_channels;
  int64_t width = std::min(samples.tile_pixels, samples.pixels - p);
  int64_t depth = std::min(samples.tile_channels, samples.channels - c);
  if (samples.channels == 1)
    return for_normals<A>(normals, e + p, width, buffer.rows.get(),
                          [&](int64_t k, Vec<A> z, auto count) DFM_INLINE { f(p + k, z, count); });
  const A* rows[Samples::kTile / Samples::kLeast];
  for (int64_t k = 0; k < depth; ++k)
    rows[k] = fill(normals, e + (c + k) * samples.pixels + p, width,
                   buffer.rows.get() + k * (samples.tile_pixels + NoiseBuffer<A>::kSlack));
  A* pixels = buffer.pixels.get();
  for (int64_t j = 0; j < width; ++j)
    for (int64_t k = 0; k < depth; ++k) pixels[j * depth + k] = rows[k][j];
  bool whole = depth == samples.channels;
  int64_t runs = whole ? 1 : width, run = whole ? width * depth : depth;
  for (int64_t r = 0; r < runs; ++r) {
    int64_t m = (p + r) * samples.channels + c;
    for_vectors<A>(run, [&](int64_t k, auto count)
                            DFM_INLINE { f(m + k, load(pixels + r * depth + k), count); });
  }
}

// run(n, tile, buffer) for every tile of every sample.
template <class A, class Run>
inline void for_tiles(const Samples& samples, const Run& run) {
  constexpr int64_t least = 1 << 14;  // elements: 9 us
  int64_t tiles = samples.tiles();
  int64_t grain = std::max<int64_t>(1, least * tiles / std::max<int64_t>(samples.elements(), 1));
  at::parallel_for(0, samples.count * tiles, grain, [&](int64_t begin, int64_t end) {
    NoiseBuffer<A> buffer;
    for (int64_t i = begin; i < end; ++i) run(i / tiles, i % tiles, buffer);
  });
}

// --- What is done with an element and its normal ---

template <class T>
struct Plain {
  T* to;

  template <class Count>
  DFM_INLINE void operator()(int64_t m, Vec<acc_t<T>> z, Count count) const {
    store(to + m, z, count);
  }
};

// v = z - gain x, x_t = (1 - t) gain x + t z.
template <class T, class To>
struct Noised {
  using A = acc_t<T>;
  const T* x;
  To *x_t, *v;  // v may be null
  A t, keep, gain;

  Noised(const T* x, To* x_t, To* v, A t, A gain)
      : x(x), x_t(x_t), v(v), t(t), keep((1 - t) * gain), gain(gain) {}

  template <class Count>
  DFM_INLINE void operator()(int64_t m, Vec<A> z, Count count) const {
    Vec<A> value = load(x + m, count);
    store(x_t + m, mul_add<A>(Vec<A>{} + t, z, keep * value), count);
    if (v) store(v + m, mul_add<A>(Vec<A>{} - gain, value, z), count);
  }
};

// g - v
template <class T, class G>
struct Residual {
  using A = acc_t<T>;
  const T* x;
  const G* g;
  A gain;

  template <class Count>
  DFM_INLINE Vec<A> operator()(int64_t m, Vec<A> z, Count count) const {
    return load(g + m, count) - mul_add<A>(Vec<A>{} - gain, load(x + m, count), z);
  }
};

// Squares of vectors: few are summed in A, then all in double.
template <class A>
class SquareSum {
 public:
  DFM_INLINE void add(Vec<A> r, Whole<A>) {
    few_ = mul_add<A>(r, r, few_);
    if (++count_ % 8 == 0) flush();
  }
  DFM_INLINE void add(Vec<A> r, int count) {
    for (int i = 0; i < kLanes<A>; ++i) r[i] = i < count ? r[i] : 0;
    add(r, Whole<A>{});
  }
  double total() {
    flush();
    double sum = 0;
    for (int i = 0; i < kLanes<double>; ++i) sum += all_[i];
    return sum;
  }

 private:
  template <size_t... I>
  DFM_INLINE void flush(std::index_sequence<I...>) {
    constexpr size_t n = sizeof...(I);
    all_ += __builtin_convertvector(__builtin_shufflevector(few_, few_, I...), Vec<double>) +
            __builtin_convertvector(__builtin_shufflevector(few_, few_, (n + I)...), Vec<double>);
  }
  DFM_INLINE void flush() {
    if constexpr (std::is_same_v<A, double>)
      all_ += few_;
    else
      flush(std::make_index_sequence<kLanes<double>>{});
    few_ = Vec<A>{};
  }

  Vec<A> few_{};
  Vec<double> all_{};
  int64_t count_ = 0;
};

}  // namespace dfm_fast
