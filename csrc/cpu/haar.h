// Orthonormal Haar pyramids by rows: sums and differences of two rows, then of two pixels.
#pragma once

#include <cstdint>
#include <memory>

#include "horizontal.h"
#include "pyramids.h"
#include "rows.h"

namespace dfm_fast {

// The three detail bands of a coarse plane, LH, HL, HH: three planes, or (channels_last) 3C
// channels in every pixel.
template <class T>
struct Bands {
  T* data;
  Grid grid;  // of one band
  bool interleaved;
  int64_t band_stride;  // where not interleaved

  T* row(int band, int64_t i) const {
    return interleaved ? data + i * 3 * grid.row() : data + band * band_stride + i * grid.row();
  }
};

template <class A>
struct HaarWorkspace {
  std::unique_ptr<A[]> buffer;
  A* rows[6];

  explicit HaarWorkspace(Grid fine) {
    int64_t margin = 2 * fine.C + kRowMargin, stride = 2 * fine.row() + 2 * margin;
    buffer.reset(new A[6 * stride]);
    for (int k = 0; k < 6; ++k) rows[k] = buffer.get() + k * stride + margin;
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

// low, high = sums and differences of neighbouring pixels of a weighted sum of two rows.
template <class T, class A>
inline void gather_pairs(const WeightedRows<2, T>& rows, A* sum, A* low, A* high, int64_t w,
                         int64_t C) {
  if (C == 1) {
    return for_split_vectors<A>(rows, 2 * w, [=](Split<A> v) mutable DFM_INLINE {
      store(low, v.even + v.odd);
      store(high, v.even - v.odd);
      low += kLanes<A>, high += kLanes<A>;
    });
  }
  const A plus[5] = {0, 0, 1, 1, 0}, minus[5] = {0, 0, 1, -1, 0};
  weighted_sum(sum, rows, 2 * w * C);
  gather_pixels<Vec<A>>(Box{}, sum, low, w, C, plus);
  gather_pixels<Vec<A>>(Box{}, sum, high, w, C, minus);
}

template <class T, class A>
void haar_build_rows(HaarWorkspace<A>& ws, int64_t begin, int64_t end, Plane<const T> x,
                     Plane<T> coarse, Bands<T> bands) {
  int64_t w = coarse.grid.W, C = coarse.grid.C, n = coarse.grid.row();
  auto [sum, ll, lh, hl, hh, pixels] = ws.rows;
  for (int64_t i = begin; i < end; ++i) {
    const T *top = x.row(0, 2 * i), *bottom = x.row(0, 2 * i + 1);
    gather_pairs<T>({{top, bottom}, {A(.5), A(.5)}}, sum, ll, hl, w, C);
    gather_pairs<T>({{top, bottom}, {A(.5), A(-.5)}}, sum, lh, hh, w, C);
    convert_row(coarse.row(0, i), ll, n);
    const A* packed[3] = {lh, hl, hh};
    if (bands.interleaved) {
      interleave3(packed, pixels, w, C);
      convert_row(bands.row(0, i), pixels, 3 * n);
    } else {
      for (int band = 0; band < 3; ++band) convert_row(bands.row(band, i), packed[band], n);
    }
  }
}

// y[2i], y[2i+1] = low[i] + high[i], low[i] - high[i], of weighted sums of two rows each.
template <class A>
inline void spread_pairs(const WeightedRows<2, A>& low, const WeightedRows<2, A>& high, A* y,
                         int64_t w, int64_t C) {
  if (C == 1) {
    for (int64_t i = 0; i < w; i += kLanes<A>) {
      Vec<A> l = low.sum(i, Whole<A>{}), h = high.sum(i, Whole<A>{});
      store_zipped<A>(y + 2 * i, l + h, l - h);
    }
    return;
  }
  for (int64_t i = 0; i < w; ++i, y += 2 * C) {
    for (int64_t c = 0; c < C; c += kLanes<A>)
      store(y + c, low.sum(i * C + c, Whole<A>{}) + high.sum(i * C + c, Whole<A>{}));
    for (int64_t c = 0; c < C; c += kLanes<A>)
      store(y + C + c, low.sum(i * C + c, Whole<A>{}) - high.sum(i * C + c, Whole<A>{}));
  }
}

template <class T, class A>
void haar_collapse_rows(HaarWorkspace<A>& ws, int64_t begin, int64_t end, Plane<const T> coarse,
                        Bands<const T> bands, Plane<T> fine) {
  int64_t w = coarse.grid.W, C = coarse.grid.C, n = coarse.grid.row();
  A *ll = ws.rows[0], *lh = ws.rows[1], *hl = ws.rows[2], *hh = ws.rows[3], *pixels = ws.rows[4];
  for (int64_t i = begin; i < end; ++i) {
    convert_row(ll, coarse.row(0, i), n);
    A* packed[3] = {lh, hl, hh};
    if (bands.interleaved) {
      convert_row(pixels, bands.row(0, i), 3 * n);
      deinterleave3(pixels, packed, w, C);
    } else {
      for (int band = 0; band < 3; ++band) convert_row(packed[band], bands.row(band, i), n);
    }
    for (int bottom = 0; bottom < 2; ++bottom) {
      A other = bottom ? A(-.5) : A(.5);
      spread_pairs<A>({{ll, lh}, {A(.5), other}}, {{hl, hh}, {A(.5), other}}, pixels, w, C);
      convert_row(fine.row(0, 2 * i + bottom), pixels, 2 * n);
    }
  }
}

}  // namespace dfm_fast
