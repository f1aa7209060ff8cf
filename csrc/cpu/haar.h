// Orthonormal Haar pyramids by rows: sums and differences of two rows, then of two pixels.
#pragma once

#include <cstdint>
#include <memory>

#include "horizontal.h"
#include "pyramids.h"
#include "rows.h"

namespace dfm_fast {

// The three detail bands of a coarse plane: LH, HL, HH (C = 1: three planes, `band_stride` apart;
// channels_last: 3C channels per pixel).
template <class T>
struct Bands {
  T* data;
  Grid grid;  // of one band
  int64_t band_stride;

  T* row(int band, int64_t i) const {
    return data + band * band_stride + i * grid.row() * (grid.C > 1 ? 3 : 1);
  }
};

template <class A>
struct HaarWorkspace {
  std::unique_ptr<A[]> buffer;
  A* rows[7];

  explicit HaarWorkspace(Grid fine) {
    int64_t margin = 2 * fine.C + kRowMargin, stride = 2 * fine.row() + 2 * margin;
    buffer.reset(new A[7 * stride]);
    for (int k = 0; k < 7; ++k) rows[k] = buffer.get() + k * stride + margin;
  }
};

// Pixels of C channels between packed rows and one row of three times as many channels. Every copy
// is of whole vectors, whose excess the next copy overwrites.
template <class A>
inline void interleave3(const A* const* packed, A* pixels, int64_t n, int64_t C) {
  for (int64_t i = 0; i < n; ++i)
    for (int band = 0; band < 3; ++band)
      for (int64_t c = 0; c < C; c += kLanes<A>)
        store(pixels + (3 * i + band) * C + c, load(packed[band] + i * C + c));
}
template <class A>
inline void deinterleave3(const A* pixels, A* const* packed, int64_t n, int64_t C) {
  for (int64_t i = 0; i < n; ++i)
    for (int band = 0; band < 3; ++band)
      for (int64_t c = 0; c < C; c += kLanes<A>)
        store(packed[band] + i * C + c, load(pixels + (3 * i + band) * C + c));
}

template <class T, class A>
void haar_build_rows(HaarWorkspace<A>& ws, int64_t begin, int64_t end, Plane<const T> x,
                     Plane<T> coarse, Bands<T> bands) {
  int64_t w = coarse.grid.W, C = coarse.grid.C, n = coarse.grid.row();
  const A half[2] = {A(.5), A(.5)}, half_difference[2] = {A(.5), A(-.5)};
  const A low[5] = {0, 0, 1, 1, 0}, high[5] = {0, 0, 1, -1, 0};
  auto gather = pick_filter<0, 1, A>(false, C);
  auto [sum, difference, ll, lh, hl, hh, pixels] = ws.rows;
  for (int64_t i = begin; i < end; ++i) {
    const T* rows[2] = {x.row(0, 2 * i), x.row(0, 2 * i + 1)};
    weighted_sum_of<2, false>(sum, sum, rows, half, 2 * n);
    weighted_sum_of<2, false>(difference, sum, rows, half_difference, 2 * n);
    gather(sum, ll, w, C, low);
    gather(difference, lh, w, C, low);
    gather(sum, hl, w, C, high);
    gather(difference, hh, w, C, high);
    convert_row(coarse.row(0, i), ll, n);
    const A* packed[3] = {lh, hl, hh};
    if (C > 1) {
      interleave3(packed, pixels, w, C);
      convert_row(bands.row(0, i), pixels, 3 * n);
    } else {
      for (int band = 0; band < 3; ++band) convert_row(bands.row(band, i), packed[band], n);
    }
  }
}

template <class T, class A>
void haar_collapse_rows(HaarWorkspace<A>& ws, int64_t begin, int64_t end, Plane<const T> coarse,
                        Bands<const T> bands, Plane<T> fine) {
  int64_t w = coarse.grid.W, C = coarse.grid.C, n = coarse.grid.row();
  const A half[2] = {A(.5), A(.5)}, half_difference[2] = {A(.5), A(-.5)}, one[2] = {1, 1};
  const A low[5] = {0, 0, 1, 1, 0}, high[5] = {0, 0, 1, -1, 0};
  auto spread = pick_filter<0, 1, A>(true, C);
  auto [ll, lh, hl, hh, packed_low, packed_high, pixels] = ws.rows;
  for (int64_t i = begin; i < end; ++i) {
    convert_row(ll, coarse.row(0, i), n);
    A* packed[3] = {lh, hl, hh};
    if (C > 1) {
      convert_row(pixels, bands.row(0, i), 3 * n);
      deinterleave3(pixels, packed, w, C);
    } else {
      for (int band = 0; band < 3; ++band) convert_row(packed[band], bands.row(band, i), n);
    }
    for (int bottom = 0; bottom < 2; ++bottom) {
      const A *lows[2] = {ll, lh}, *highs[2] = {hl, hh};
      weighted_sum_of<2, false>(packed_low, ll, lows, bottom ? half_difference : half, n);
      weighted_sum_of<2, false>(packed_high, ll, highs, bottom ? half_difference : half, n);
      A* fine_low = pixels;
      A* fine_high = pixels + 2 * n + kRowMargin;
      spread(packed_low, fine_low, w, C, low);
      spread(packed_high, fine_high, w, C, high);
      const A* sums[2] = {fine_low, fine_high};
      weighted_sum_of<2, false>(fine.row(0, 2 * i + bottom), ll, sums, one, 2 * n);
    }
  }
}

}  // namespace dfm_fast
