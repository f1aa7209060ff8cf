// Maps as the operators that normalise them walk through them, and the statistics of their
// channels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "group_norms.h"
#include "tensors.h"

namespace dfm_fast {

constexpr int64_t kTask = 1 << 15;  // elements, at least, that a thread takes at once
constexpr int64_t kBlock = 64;      // pixels whose sums are centred together
constexpr int64_t kChain = 16;      // pixels that are added one after the other

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
    return kBlock * std::max<int64_t>(1, kTask / (kBlock * std::max<int64_t>(channels, 1)));
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

// Pixels [first, end) of a channels_last sample, into [mean, m2] of `padded` channels.
template <class T>
void pixel_moments(const Map& map, const T* sample, int64_t first, int64_t end, double* means) {
  using A = acc_t<T>;
  const int64_t C = map.channels;
  for (int64_t begin = first; begin < end; begin += kBlock) {
    const int64_t size = std::min(kBlock, end - begin);
    const T* x = sample + begin * C;
    for_channels<A, kSideBySide>(C, [&](int64_t c, auto count, auto vectors) DFM_INLINE {
      constexpr int K = vectors, lanes = kLanes<A>;
      Vec<A> sum[K] = {}, centre[K], d[K] = {}, squares[K] = {};
      for (int64_t q = 0; q < size; q += kChain) {
        Vec<A> some[K] = {};
        for (int64_t p = q; p < std::min(q + kChain, size); ++p)
          for (int k = 0; k < K; ++k) some[k] += load(x + p * C + c + k * lanes, count);
        for (int k = 0; k < K; ++k) sum[k] += some[k];
      }
      for (int k = 0; k < K; ++k) centre[k] = sum[k] * (A(1) / size);
      for (int64_t q = 0; q < size; q += kChain) {
        Vec<A> some[K] = {}, some_squares[K] = {};
        for (int64_t p = q; p < std::min(q + kChain, size); ++p)
          for (int k = 0; k < K; ++k) {
            Vec<A> v = load(x + p * C + c + k * lanes, count) - centre[k];
            some[k] += v;
            some_squares[k] += v * v;
          }
        for (int k = 0; k < K; ++k) d[k] += some[k], squares[k] += some_squares[k];
      }
      for (int k = 0; k < K; ++k) {
        double *mean = means + c + k * lanes, *m2 = mean + map.padded();
        for (int i = 0; i < lanes; ++i) {
          Moments moments{mean[i], m2[i], double(begin - first)};
          moments.add(size, sum[k][i], centre[k][i], d[k][i], squares[k][i]);
          mean[i] = moments.mean, m2[i] = moments.m2;
        }
      }
    });
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
    for (int64_t c = 0; c < C; ++c) {
      Moments all;
      for (int64_t task = 0; task < tasks; ++task) {
        const double* from = means.data() + (n * tasks + task) * row + c;
        int64_t pixels = std::min(map.task_pixels(), map.pixels - task * map.task_pixels());
        all.merge(pixels, from[0], from[map.padded()]);
      }
      mean[n * C + c] = all.mean;
      m2[n * C + c] = all.m2;
    }
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
