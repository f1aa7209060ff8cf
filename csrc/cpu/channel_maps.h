// Maps as the operators that normalise them walk through them, and the statistics of their
// channels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "group_norms.h"
#include "tensors.h"

namespace dfm_fast {

constexpr int64_t kTask = 1 << 15;   // elements, at least, that a thread takes at once
constexpr int64_t kBlock = 1 << 16;  // elements whose sums are centred together
constexpr int64_t kChain = 16;       // pixels that are added one after the other

// --- Maps ---

// [N, C, P] in memory, or [N, P, C] in channels_last.
struct Map {
  int64_t samples, channels, pixels, groups;
  bool last;

  Map(const at::Tensor& x, int64_t groups)
      : samples(x.size(0)),
        channels(x.size(1)),
        pixels(1),
        groups(groups),
        last(layout_of(x) != at::MemoryFormat::Contiguous) {
    for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  }

  int64_t planes() const { return samples * channels; }
  int64_t size() const { return channels / groups; }  // of a group
  // channels_last is worked through in tasks of some pixels of a sample, which say what is added to
  // what: sizes that depend on the shape alone.
  int64_t task_pixels() const {
    int64_t block = block_pixels();
    return block * std::max<int64_t>(1, kTask / (block * std::max<int64_t>(channels, 1)));
  }
  // Pixels that are read twice for their moments, from a second-level cache the second time.
  int64_t block_pixels() const {
    int64_t chains = kBlock / (kChain * std::max<int64_t>(channels, 1));
    return kChain * std::clamp<int64_t>(chains, 1, 8);
  }
  int64_t tasks() const { return (pixels + task_pixels() - 1) / task_pixels(); }  // of a sample
  int64_t padded() const { return (channels + 31) / 32 * 32; }  // a row of channels in scratch
};

// f(i) for i < n, each of so many elements.
template <class F>
void parallel(int64_t n, int64_t elements, F f) {
  at::parallel_for(0, n, std::max<int64_t>(1, kTask / std::max<int64_t>(elements, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) f(i);
                   });
}

// f(n, task, first pixel, end) for the pixels of channels_last samples.
template <class F>
void parallel_pixels(const Map& map, F f) {
  parallel(map.samples * map.tasks(), map.task_pixels() * map.channels, [&](int64_t i) {
    int64_t task = i % map.tasks(), first = task * map.task_pixels();
    f(i / map.tasks(), task, first, std::min(first + map.task_pixels(), map.pixels));
  });
}

// f(c, count, number of vectors) for all channels: several whole vectors at once, so that sums of
// pixels do not wait for one another.
template <class A, int most, class F>
DFM_INLINE inline void for_channels(int64_t channels, F f) {
  constexpr int lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + most * lanes <= channels; c += most * lanes)
    f(c, Whole<A>{}, std::integral_constant<int, most>{});
  for (; c + lanes <= channels; c += lanes) f(c, Whole<A>{}, std::integral_constant<int, 1>{});
  if (c < channels) f(c, static_cast<int>(channels - c), std::integral_constant<int, 1>{});
}

// --- Statistics of channels ---

constexpr int kSideBySide = 4;  // vectors, so that sums do not wait for one another

// to[k][c] += the sum over pixels of function k; f(i, count, c, sum) adds to Vec<A> sum[K] what
// lies at x + i. Chain by chain, so that memory is read in order.
template <int K, class A, class F>
DFM_INLINE inline void add_pixels(int64_t channels, int64_t pixels, A* to, int64_t stride, F f) {
  for (int64_t first = 0; first < pixels; first += kChain) {
    const int64_t begin = first * channels;
    const int64_t end = std::min(first + kChain, pixels) * channels;
    for_channels<A, kSideBySide>(channels, [&](int64_t c, auto count, auto vectors) DFM_INLINE {
      constexpr int lanes = kLanes<A>;
      Vec<A> sum[vectors][K] = {};
      for (int64_t i = begin + c; i < end; i += channels)
        for (int v = 0; v < vectors; ++v) f(i + v * lanes, count, c + v * lanes, sum[v]);
      for (int v = 0; v < vectors; ++v)
        for (int k = 0; k < K; ++k) {
          A* here = to + k * stride + c + v * lanes;  // padded: a whole vector always
          store(here, load(here) + sum[v][k]);
        }
    });
  }
}

// Pixels [first, end) of a channels_last sample, into [mean, m2] of `padded` channels.
template <class T>
void pixel_moments(const Map& map, const T* sample, int64_t first, int64_t end, double* means) {
  using A = acc_t<T>;
  const int64_t C = map.channels, row = map.padded(), block = map.block_pixels();
  std::vector<A> scratch(4 * row);
  A *sum = scratch.data(), *centre = sum + row, *rest = centre + row, *squares = rest + row;
  for (int64_t begin = first; begin < end; begin += block) {
    const int64_t size = std::min(block, end - begin);
    const T* x = sample + begin * C;
    std::fill(scratch.begin(), scratch.end(), A(0));
    add_pixels<1, A>(C, size, sum, row,
                     [=](int64_t i, auto count, int64_t, Vec<A>(&s)[1])
                         DFM_INLINE { s[0] += load(x + i, count); });
    for (int64_t c = 0; c < C; ++c) centre[c] = sum[c] * (A(1) / size);
    add_pixels<2, A>(C, size, rest, row,
                     [=](int64_t i, auto count, int64_t c, Vec<A>(&s)[2]) DFM_INLINE {
                       Vec<A> d = load(x + i, count) - load(centre + c);
                       s[0] += d;
                       s[1] += d * d;
                     });
    for (int64_t c = 0; c < C; ++c) {
      Moments moments{means[c], means[row + c], double(begin - first)};
      moments.add(size, sum[c], centre[c], rest[c], squares[c]);
      means[c] = moments.mean, means[row + c] = moments.m2;
    }
  }
}

// The moments of `more` pixels into those of `count`: [mean, m2] of n channels each.
inline void merge_rows(double* to, const double* from, int64_t n, double count, double more) {
  for (int64_t c = 0; c < n; ++c) {
    Moments moments{to[c], to[n + c], count};
    moments.merge(more, from[c], from[n + c]);
    to[c] = moments.mean, to[n + c] = moments.m2;
  }
}

template <class T>
void statistics_last(const Map& map, const T* x, acc_t<T>* mean, acc_t<T>* m2) {
  const int64_t row = 2 * map.padded(), tasks = map.tasks(), C = map.channels;
  std::vector<double> means(map.samples * tasks * row);
  parallel_pixels(map, [&](int64_t n, int64_t task, int64_t first, int64_t end) {
    double* to = means.data() + (n * tasks + task) * row;
    pixel_moments(map, x + n * map.pixels * C, first, end, to);
  });
  parallel(map.samples, tasks * C, [&](int64_t n) {
    double* all = means.data() + n * tasks * row;  // the first task's, which gets the others
    for (int64_t task = 1; task < tasks; ++task) {
      const double before = double(task * map.task_pixels());
      const double pixels = std::min<double>(map.task_pixels(), map.pixels - before);
      merge_rows(all, all + task * row, row / 2, before, pixels);
    }
    for (int64_t c = 0; c < C; ++c) mean[n * C + c] = all[c], m2[n * C + c] = all[row / 2 + c];
  });
}

template <class T>
void statistics_plane(const Map& map, const T* x, int64_t plane, acc_t<T>* mean, acc_t<T>* m2) {
  auto moments = row_moments(x + plane * map.pixels, map.pixels);
  mean[plane] = moments.mean;
  m2[plane] = moments.m2;
}

template <class T>
void statistics(const Map& map, const T* x, acc_t<T>* mean, acc_t<T>* m2) {
  if (map.last) return statistics_last(map, x, mean, m2);
  parallel(map.planes(), map.pixels, [&](int64_t i) { statistics_plane(map, x, i, mean, m2); });
}

}  // namespace dfm_fast
