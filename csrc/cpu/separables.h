// What operators that end in a pointwise convolution have in common: its weights, ready for the
// products of bands of pixels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "convolutions.h"
#include "matrices.h"

namespace dfm_fast {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Terms of a sum over channels, a zero among them where they are odd: bfloat16 comes in pairs.
inline int64_t terms_of(int64_t channels) { return (channels + 1) / 2 * 2; }

// Of pixels [.., leading]: a distance of a power of two would put what a tile of a product reads
// into one place of the first-level cache.
inline int64_t leading(int64_t channels) { return (channels + 15) / 16 * 16 + 16; }

// Panels of the transpose of a weight [O, C, 1, 1], of the numbers that are multiplied: A, or bf16
// as they are.
template <class E, class T>
Aligned<E> packed(const Tensor& weight) {
  using A = acc_t<T>;
  const int64_t O = weight.size(0), C = weight.size(1), K = terms_of(C);
  const int64_t panels = panels_of(O, kPanel<A>);
  Aligned<E> to(panels * K * kPanel<A>);
  parallel(panels, C * kPanel<A>, [&](int64_t p) {
    const int64_t first = p * kPanel<A>;
    const T* from = data<T>(weight) + first * C;
    if constexpr (std::is_same_v<E, A>) {
      pack_panel(C, O - first, from, C, &to[first * K]);
      std::fill(&to[first * K + C * kPanel<A>], &to[first * K] + K * kPanel<A>, A(0));
    } else {
      pack_pairs(K, O - first, from, C, &to[first * K]);
    }
  });
  return to;
}

// Few numbers in the arithmetic type: `at` is null where there are none. Tensors of torch would
// take some microseconds each.
template <class A>
struct Widened {
  Tensor given;
  std::vector<A> own;
  const A* at = nullptr;

  explicit Widened(const MaybeTensor& v) {
    if (!v) return;
    given = v->contiguous();
    dispatch(given.scalar_type(), "separable_conv2d", [&](auto t) {
      using T = decltype(t);
      if constexpr (std::is_same_v<T, A>) {
        at = data<T>(given);
      } else {
        own.resize(given.numel());
        for (size_t i = 0; i < own.size(); ++i) own[i] = load_one(data<T>(given) + i);
        at = own.data();
      }
    });
  }
};

constexpr int64_t kTilePixels = 2 * kTileSums;  // whole tiles, however many vectors they have

// The weights of a separable convolution with a 3x3 kernel.
template <class A, class E>
struct Convolution {
  int64_t inputs, outputs;
  PackedWeights<A> taps;
  Aligned<E> panels;
  std::vector<A> bias;

  int64_t ld() const { return leading(inputs); }
  // f(row, first pixel, pixels, first output, outputs, tile) for some pixels of a row and a panel
  // of outputs at a time, so that a tile stays in the first-level cache; a [rows, pixels, ld].
  template <class F>
  void multiply(int64_t rows, int64_t pixels, const E* a, A* tile, F f) const {
    const int64_t terms = terms_of(inputs);
    for (int64_t i = 0; i < rows * panels_of(pixels, kTilePixels); ++i) {
      const int64_t row = i / panels_of(pixels, kTilePixels);
      const int64_t first = i % panels_of(pixels, kTilePixels) * kTilePixels;
      const int64_t some = std::min(pixels - first, kTilePixels);
      const E* from = a + (row * pixels + first) * ld();
      for (int64_t o = 0; o < outputs; o += kPanel<A>) {
        const int64_t columns = std::min(outputs - o, kPanel<A>);
        with_vectors<A>(columns, [&](auto vectors) {
          multiply_panel<vectors>(some, terms, from, ld(), &panels[o * terms], tile, kPanel<A>);
        });
        f(row, first, some, o, columns, tile);
      }
    }
  }
};

}  // namespace dfm_fast
