// The library's random stream, dfm_fast/ops/_philox.py: Philox4x32-10 and Box-Muller.
//
// Compilers vectorise neither well, so both are written for vectors: of 64-bit lanes whose low
// words count for Philox (its products are of 32 by 32 bits), of floats for Box-Muller. Every
// product that is added to is a `mul_add`: what the compiler contracted by itself could differ from
// one copy of the code to the next, and a normal must not depend on where in a loop it falls.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dfm_fast {

// a b + c, in one rounding where the CPU has that.
template <class A>
inline Vec<A> mul_add(Vec<A> a, Vec<A> b, Vec<A> c) {
  constexpr bool wide = std::is_same_v<A, double>;
#if defined(__AVX512F__)
  using detail::bits_as;
  if constexpr (wide)
    return bits_as<Vec<A>>(
        _mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
  else
    return bits_as<Vec<A>>(
        _mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
#elif defined(__FMA__)
  using detail::bits_as;
  if constexpr (wide)
    return bits_as<Vec<A>>(
        _mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(c)));
  else
    return bits_as<Vec<A>>(
        _mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
#else
  static_cast<void>(wide);
  return a * b + c;
#endif
}

namespace detail {

using Wide = Vec<uint64_t>;

// Products of the low words.
inline Wide multiply(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return bits_as<Wide>(_mm512_maskz_mul_epu32(0xff, bits_as<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bits_as<Wide>(_mm256_mul_epu32(bits_as<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bits_as<Wide>(_mm_mul_epu32(bits_as<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffff) * b;
#endif
}

inline Float square_root(Float v) {
#if defined(__AVX512F__)
  return bits_as<Float>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(v)));
#elif defined(__AVX2__)
  return bits_as<Float>(_mm256_sqrt_ps(bits_as<__m256>(v)));
#elif defined(__SSE2__)
  return bits_as<Float>(_mm_sqrt_ps(bits_as<__m128>(v)));
#else
  for (int i = 0; i < kFloats; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// float32(words) 2^-32 + 2^-33
inline Float uniform(Word words) {
#if defined(__AVX512F__)
  Float v = bits_as<Float>(_mm512_maskz_cvtepu32_ps(0xffff, bits_as<__m512i>(words)));
#else
  using Int = Vec<int32_t>;
  auto half = [](Word w) { return __builtin_convertvector(bits_as<Int>(w), Float); };
  Float v = mul_add<float>(half(words >> 16), Float{} + 0x1p16f, half(words & 0xffff));
#endif
  return mul_add<float>(v, Float{} + 0x1p-32f, Float{} + 0x1p-33f);
}

// sqrt(-2 ln u). With u = 2^e (1 + f), 2^-1/2 <= 1 + f < 2^1/2, -2 ln(1 + f) is f (-2 + f p(f)), p
// the minimax polynomial (3e-8 of the result): right near u = 1, too, where e is 0 and f exact.
inline Float radius(Float u) {
  constexpr float p[] = {-0.17469686f, 0.28615043f, -0.29835947f, 0.33141016f,
                         -0.39924144f, 0.50003511f, -0.666679f,   0.99999983f};
  using Int = Vec<int32_t>;
  Int bits = bits_as<Int>(u), e = (bits - 0x3f3504f3) >> 23;
  Float f = bits_as<Float>(bits - (e << 23)) - 1, sum = Float{} + p[0];
  for (int k = 1; k < 8; ++k) sum = mul_add<float>(sum, f, Float{} + p[k]);
  sum = f * mul_add<float>(sum, f, Float{} - 2);
  Float exponent = __builtin_convertvector(e, Float);
  return square_root(mul_add<float>(exponent, Float{} - 1.38629436f, sum));
}

// r (sin 2 pi u, cos 2 pi u): 4 u = q + g exactly, q whole and |g| <= 1/2; minimax polynomials
// (5e-9 and 3e-8) of pi/2 g, then by quadrant q.
inline std::array<Float, 2> polar(Float r, Float u) {
  constexpr float round = 0x1.8p23f;  // its unit in the last place is 1
  Float shifted = mul_add<float>(u, Float{} + 4, Float{} + round);
  Float g = mul_add<float>(u, Float{} + 4, round - shifted), g2 = g * g;
  Float s = mul_add<float>(Float{} - 0.00460218f, g2, Float{} + 0.07968023f);
  s = mul_add<float>(s, g2, Float{} - 0.64596348f);
  s = g * mul_add<float>(s, g2, Float{} + 1.57079632f);
  Float c = mul_add<float>(Float{} - 0.02042625f, g2, Float{} + 0.25360636f);
  c = mul_add<float>(c, g2, Float{} - 1.23369795f);
  c = mul_add<float>(c, g2, Float{} + 1);
  Word q = bits_as<Word>(shifted);
  auto odd = (q & 1) != 0;
  auto with_sign = [](Float v, Word q) {
    return bits_as<Float>(bits_as<Word>(v) ^ ((q << 30) & 0x80000000));
  };
  return {r * with_sign(odd ? c : s, q), r * with_sign(odd ? s : c, q + 1)};
}

template <class V, size_t... I>
inline V unpacked(V a, V b, std::index_sequence<I...>, int upper) {
  // Of every 16 bytes the lower or the upper lanes of a and b in turn.
  constexpr size_t each = 16 / sizeof(a[0]), n = sizeof...(I);
  constexpr auto lane = [](size_t i, size_t upper) {
    return i / each * each + upper * each / 2 + i % each / 2 + i % 2 * n;
  };
  return upper ? __builtin_shufflevector(a, b, lane(I, 1)...)
               : __builtin_shufflevector(a, b, lane(I, 0)...);
}

}  // namespace detail

// Normals of one stream; A is float or double.
class Normals {
 public:
  Normals(uint64_t key, uint64_t first) : first(first) {
    uint32_t low = key, high = key >> 32;
    for (int r = 0; r < 10; ++r, low += 0x9E3779B9, high += 0xBB67AE85)
      keys_[2 * r] = low, keys_[2 * r + 1] = high;
  }

  uint64_t first;  // of a tensor: its element i is normal first + i

  // Four normals of each of kLanes<float> counters, in order.
  DFM_INLINE std::array<Vec<float>, 4> operator()(uint64_t counter) const {
    using namespace detail;
    Wide words[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      Wide lanes{};
      for (int i = 0; i < kFloats / 2; ++i) lanes[i] = counter_of(2 * i + odd);
      lanes += counter;
      words[odd][0] = lanes, words[odd][1] = lanes >> 32 & kHigh,
      words[odd][2] = words[odd][3] = Wide{};
    }
    for (int r = 0; r < 10; ++r) {
      for (auto& c : words) {
        Wide p = multiply(c[0], kMultipliers[0]), q = multiply(c[2], kMultipliers[1]);
        c[0] = (q >> 32) ^ c[1] ^ keys_[2 * r], c[1] = q;
        c[2] = (p >> 32) ^ c[3] ^ keys_[2 * r + 1], c[3] = p;
      }
    }
    Float u[4], z[4];
    for (int k = 0; k < 4; ++k) {
      Wide even = words[0][k] & 0xffffffff, odd = words[1][k] << 32;
      u[k] = uniform(bits_as<Word>(even | odd));
    }
    for (int k = 0; k < 4; k += 2) {
      auto pair = polar(radius(u[k]), u[k + 1]);
      z[k] = pair[0], z[k + 1] = pair[1];
    }
    return in_order(z);
  }

  // The same of one counter in float64.
  std::array<double, 4> wide(uint64_t counter) const {
    uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32) & kHigh};
    for (int r = 0; r < 10; ++r) {
      uint64_t p = uint64_t{c[0]} * kMultipliers[0], q = uint64_t{c[2]} * kMultipliers[1];
      c[0] = (q >> 32) ^ c[1] ^ keys_[2 * r], c[1] = q;
      c[2] = (p >> 32) ^ c[3] ^ keys_[2 * r + 1], c[3] = p;
    }
    std::array<double, 4> z;
    for (int k = 0; k < 4; k += 2) {
      double r = std::sqrt(-2 * std::log(c[k] * 0x1p-32 + 0x1p-33));
      double angle = 2 * M_PI * (c[k + 1] * 0x1p-32 + 0x1p-33);
      z[k] = r * std::sin(angle), z[k + 1] = r * std::cos(angle);
    }
    return z;
  }

 private:
  static constexpr uint32_t kMultipliers[] = {0xD2511F53, 0xCD9E8D57};
  static constexpr uint32_t kHigh = 0x3fffffff;  // counters are 62 bits: normals wrap at 2^64

  // Which counter a lane holds, so that `in_order` need not cross the 16-byte parts of a vector.
  static constexpr int counter_of(int lane) { return detail::kFloats / 4 * (lane % 4) + lane / 4; }

  DFM_INLINE static std::array<Vec<float>, 4> in_order(const detail::Float z[4]) {
    using namespace detail;
    std::make_index_sequence<kFloats> floats;
    std::make_index_sequence<kFloats / 2> pairs;
    std::array<Float, 4> out;
    for (int upper = 0; upper < 2; ++upper) {
      Wide a = bits_as<Wide>(unpacked(z[0], z[1], floats, upper));
      Wide b = bits_as<Wide>(unpacked(z[2], z[3], floats, upper));
      for (int k = 0; k < 2; ++k) out[2 * upper + k] = bits_as<Float>(unpacked(a, b, pairs, k));
    }
    return out;
  }

  uint64_t keys_[20];  // low words
};

}  // namespace dfm_fast
