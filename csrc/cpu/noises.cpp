// CPU operators of the family `noises`; the definitions are dfm_fast/ops/noises.py and
// _velocity.py.
#include "noises.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "tensors.h"

namespace dfm_fast {
namespace {

using at::ArrayRef;
using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using State = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth another thread

// --- Arguments ---

void check_dense(const char* op, const char* argument, const Tensor& x, at::MemoryFormat layout) {
  TORCH_CHECK(x.is_contiguous(layout), op, ": expected ", argument, " dense in ", layout,
              ", got sizes ", x.sizes(), " and strides ", x.strides());
}

// One number per sample (and level): t, mask, grad.
void check_table(const char* op, const char* argument, const Tensor& table, at::ScalarType dtype,
                 IntArrayRef sizes) {
  TORCH_CHECK(table.scalar_type() == dtype && table.sizes() == sizes && table.is_contiguous(), op,
              ": expected ", argument, " contiguous ", dtype, " of sizes ", sizes, ", got ",
              table.scalar_type(), " ", table.sizes(), " with strides ", table.strides());
}

Normals normals_of(const char* op, const State& state, int64_t seed, int64_t offset) {
  if (!state) return {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  TORCH_CHECK(state->scalar_type() == at::kLong && state->dim() == 1 && state->size(0) == 2, op,
              ": expected state int64 [2], got ", state->scalar_type(), " ", state->sizes());
  const int64_t* numbers = state->const_data_ptr<int64_t>();
  uint64_t start = numbers[state->stride(0)];
  return {static_cast<uint64_t>(numbers[0]), start + static_cast<uint64_t>(offset)};
}

Samples samples_of(const Tensor& x, at::MemoryFormat layout) {
  int64_t N = x.size(0), elements = 1;
  for (int64_t size : x.sizes().slice(1)) elements *= size;
  int64_t C = layout == at::MemoryFormat::Contiguous ? 1 : x.size(1);
  return {N, C ? elements / C : 0, C};
}

// --- Types ---

// The dtype in which a tensor beside x is read or written: `dtype` itself if that is x's, or one of
// them is float32 and neither float64; else the arithmetic's, which a copy converts.
at::ScalarType beside(const Tensor& x, at::ScalarType dtype) {
  bool direct = dtype == x.scalar_type() ||
                (x.scalar_type() == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf));
  return direct ? dtype : accumulation(x);
}

// f(zero of x's type, of the other type), for a dtype from `beside`.
template <class F>
void dispatch_beside(const Tensor& x, at::ScalarType dtype, const char* op, F f) {
  dispatch(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    if (dtype == x.scalar_type()) return f(zero, zero);
    if constexpr (sizeof(T) == 2) return f(zero, float{});
    if constexpr (std::is_same_v<T, float>) {
      if (dtype == at::kBFloat16) return f(zero, bf16{});
      return f(zero, fp16{});
    }
  });
}

// --- philox_normal, add_noise ---

Tensor philox_normal_cpu(const Tensor& like, const State& state, int64_t seed, int64_t offset) {
  const char* op = "philox_normal";
  Normals normals = normals_of(op, state, seed, offset);
  Tensor out = at::empty(like.sizes(), like.options(), at::MemoryFormat::Contiguous);
  dispatch(out.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Samples samples(1, out.numel(), 1);
    Plain<T> to{mutable_data<T>(out)};
    for_tiles<A>(samples, [&](int64_t n, int64_t tile, NoiseBuffer<A>& buffer) {
      for_tile(normals, samples, n, tile, buffer, to);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> add_noise_cpu(const Tensor& x, const Tensor& t, const State& state,
                                         int64_t seed, int64_t offset) {
  const char* op = "add_noise";
  auto layout = layout_of(x);
  check_dense(op, "x", x, layout);
  TORCH_CHECK(x.dim() > 0, op, ": expected x with at least one dimension, got ", x.sizes());
  check_table(op, "t", t, accumulation(x), x.sizes().slice(0, 1));
  Normals normals = normals_of(op, state, seed, offset);
  Tensor x_t = at::empty(x.sizes(), x.options(), layout);
  Tensor v = at::empty(x.sizes(), x.options(), layout);
  Samples samples = samples_of(x, layout);
  int64_t each = samples.elements();
  bool few = samples.channels == 1 && each < Samples::kLeast;  // less than come at once
  dispatch(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* from = data<T>(x);
    T *to = mutable_data<T>(x_t), *to_v = mutable_data<T>(v);
    auto noised = [&](int64_t n) {
      int64_t at = n * each;
      return Noised<T, T>(from + at, to + at, to_v + at, data<A>(t)[n], 1);
    };
    if (!few)
      return for_tiles<A>(samples, [&](int64_t n, int64_t tile, NoiseBuffer<A>& buffer) {
        for_tile(normals, samples, n, tile, buffer, noised(n));
      });
    Samples all(1, x.numel(), 1);
    for_tiles<A>(all, [&](int64_t, int64_t tile, NoiseBuffer<A>& buffer) {
      int64_t i = tile * all.tile_pixels, end = std::min(i + all.tile_pixels, all.pixels);
      const A* z = fill(normals, normals.first + i, end - i, buffer.rows.get());
      while (i < end) {
        int64_t n = i / each, m = i % each, length = std::min(each - m, end - i);
        auto f = noised(n);
        for_vectors<A>(length,
                       [&](int64_t k, auto count) DFM_INLINE { f(m + k, load(z + k), count); });
        i += length, z += length;
      }
    });
  });
  return {x_t, v};
}

// --- Levels ---

// Levels of x, coarse to fine, in its dtype.
std::vector<Tensor> build(const Tensor& x, int64_t num_levels, std::string_view filter,
                          IntArrayRef factor) {
  using Build = std::vector<Tensor>(const Tensor&, int64_t, std::string_view, IntArrayRef);
  using HaarBuild = std::vector<Tensor>(const Tensor&, int64_t);
  auto find = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  };
  static auto laplacian = find("dfm_fast::laplacian_build").typed<Build>();
  static auto haar = find("dfm_fast::haar_build").typed<HaarBuild>();
  c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  if (filter == "haar") return haar.redispatch(cpu, x, num_levels);
  return laplacian.redispatch(cpu, x, num_levels, filter, factor);
}

std::vector<std::vector<int64_t>> level_sizes(const Tensor& x, int64_t num_levels, bool haar,
                                              IntArrayRef factor) {
  std::vector<std::vector<int64_t>> all(num_levels, x.sizes().vec());
  for (int64_t s = num_levels - 2; s >= 0; --s) {
    all[s] = all[s + 1];
    for (size_t a = 0; a < factor.size(); ++a)
      for (int64_t f = factor[a]; f > 1; f /= 2) all[s][a + 2] = (all[s][a + 2] + 1) / 2;
  }
  if (haar && num_levels > 1) {  // a level has the sides of the next coarser image
    for (int64_t s = num_levels - 1; s > 0; --s) all[s] = all[s - 1], all[s][1] *= 3;
  }
  return all;
}

// Some channels of one sample of a level.
struct Part {
  const void* x;    // where it begins, of x's type
  int64_t n;        // the sample
  int64_t at;       // where it begins in its level, in memory and in the random stream
  int64_t slot;     // of its first tile, among all tiles of the level
  Samples samples;  // one
  Normals normals;
};

// The arguments that the operators of all levels share.
struct Scales {
  const char* op;
  const Tensor& x;
  const State& mask;
  const c10::List<bool>& wanted;
  const State& state;
  int64_t seed;
  IntArrayRef offsets;
  std::string_view filter;
  IntArrayRef factor;
  ArrayRef<double> gains;

  at::MemoryFormat layout{};
  int64_t levels = 0, channels = 0, slices = 0;  // channels of a slice, slices of a sample
  std::vector<std::vector<int64_t>> sizes;       // of the levels

  // A slice goes through all levels while they are in the second-level cache. What it is depends on
  // sizes only, so that sums do, too.
  static constexpr int64_t kSlice = 1 << 16;  // elements

  void check() {
    TORCH_CHECK(x.dim() == 4 || x.dim() == 5, op, ": expected x with 4 or 5 dimensions, got ",
                x.sizes());
    layout = layout_of(x), levels = static_cast<int64_t>(wanted.size());
    check_dense(op, "x", x, layout);
    TORCH_CHECK(levels > 0 && offsets.size() == wanted.size() && gains.size() == wanted.size(), op,
                ": expected offsets and gains of ", levels, " levels, got ", offsets.size(),
                " and ", gains.size());
    TORCH_CHECK(static_cast<int64_t>(factor.size()) == x.dim() - 2, op, ": expected a factor of ",
                x.dim() - 2, " numbers, got ", factor);
    if (mask) check_table(op, "mask", *mask, at::kBool, {x.size(0), levels});
    bool haar = filter == "haar";
    sizes = level_sizes(x, levels, haar, factor);
    int64_t C = x.size(1);
    bool by_channel = layout == at::MemoryFormat::Contiguous && !haar && x.numel() > 0;
    channels = by_channel ? std::clamp<int64_t>(kSlice * C * x.size(0) / x.numel(), 1, C) : C;
    slices = C ? (C + channels - 1) / channels : 1;
  }

  bool active(int64_t n, int64_t s) const { return !mask || data<bool>(*mask)[n * levels + s]; }
  template <class A>
  A of(const Tensor& table, int64_t n, int64_t s) const {
    return data<A>(table)[n * levels + s];
  }
  int64_t elements(int64_t s) const {  // of a sample
    int64_t product = 1;
    for (size_t a = 1; a < sizes[s].size(); ++a) product *= sizes[s][a];
    return product;
  }
  int64_t tiles(int64_t s) const { return x.size(0) * slices * samples(s, channels).tiles(); }
  Tensor empty(int64_t s, at::ScalarType dtype) const {
    return at::empty(sizes[s], x.options().dtype(dtype), layout);
  }

  // f(s, part) for every part of every wanted level. Slices in parallel, or, where they are few,
  // one after the other with its tiles in parallel.
  template <class F>
  void for_parts(const F& f) const {
    if (x.numel() == 0) return;
    std::vector<Normals> normals;
    for (int64_t s = 0; s < levels; ++s) normals.push_back(normals_of(op, state, seed, offsets[s]));
    auto run = [&](const std::vector<Tensor>& built, int64_t i, bool whole) {
      int64_t n = i / slices, c = i % slices * channels;
      for (int64_t s = 0; s < levels; ++s) {
        if (!wanted[s]) continue;
        int64_t plane = elements(s) / x.size(1), at = n * elements(s) + c * plane;
        int64_t slot = i * samples(s, channels).tiles();
        auto start = static_cast<const char*>(built[s].const_data_ptr());
        Part part{start + (whole ? at * x.element_size() : 0),   n,         at, slot,
                  samples(s, std::min(channels, x.size(1) - c)), normals[s]};
        part.normals.first += at;
        f(s, part);
      }
    };
    int64_t count = x.size(0) * slices;
    if (count < 2 * at::get_num_threads() || x.numel() < kSlice) {
      auto built = build(x, levels, filter, factor);
      for (int64_t i = 0; i < count; ++i) run(built, i, true);
      return;
    }
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      for (int64_t i = begin; i < end; ++i) {
        int64_t c = i % slices * channels;
        Tensor slice = x.narrow(0, i / slices, 1);
        if (slices > 1) slice = slice.narrow(1, c, std::min(channels, x.size(1) - c));
        run(build(slice, levels, filter, factor), i, false);
      }
    });
  }

 private:
  Samples samples(int64_t s, int64_t c) const {
    int64_t plane = elements(s) / std::max<int64_t>(x.size(1), 1);
    if (layout == at::MemoryFormat::Contiguous) return {1, c * plane, 1};
    return {1, elements(s) / std::max<int64_t>(sizes[s][1], 1), sizes[s][1]};
  }
};

std::vector<Tensor> pyramid_add_noise_cpu(const Tensor& x, const Tensor& t, const State& mask,
                                          c10::List<bool> wanted, const State& state, int64_t seed,
                                          IntArrayRef offsets, std::string_view filter,
                                          IntArrayRef factor, ArrayRef<double> gains, bool targets,
                                          at::ScalarType dtype) {
  const char* op = "pyramid_add_noise";
  Scales scales{op, x, mask, wanted, state, seed, offsets, filter, factor, gains};
  scales.check();
  check_table(op, "t", t, accumulation(x), {x.size(0), scales.levels});
  at::ScalarType type = beside(x, dtype);
  std::vector<Tensor> x_t, v;
  std::vector<int64_t> place(scales.levels);
  for (int64_t s = 0; s < scales.levels; ++s) {
    place[s] = static_cast<int64_t>(x_t.size());
    if (wanted[s]) x_t.push_back(scales.empty(s, type));
    if (wanted[s] && targets) v.push_back(scales.empty(s, type));
  }
  dispatch_beside(x, type, op, [&](auto zero, auto to_zero) {
    using T = decltype(zero);
    using To = decltype(to_zero);
    using A = acc_t<T>;
    scales.for_parts([&](int64_t s, const Part& part) {
      To* to = mutable_data<To>(x_t[place[s]]) + part.at;
      To* to_v = targets ? mutable_data<To>(v[place[s]]) + part.at : nullptr;
      if (!scales.active(part.n, s)) {
        std::fill_n(to, part.samples.elements(), To{});
        if (targets) std::fill_n(to_v, part.samples.elements(), To{});
        return;
      }
      Noised<T, To> noised(static_cast<const T*>(part.x), to, to_v, scales.of<A>(t, part.n, s),
                           static_cast<A>(gains[s]));
      for_tiles<A>(part.samples, [&](int64_t, int64_t tile, NoiseBuffer<A>& buffer) {
        for_tile(part.normals, part.samples, 0, tile, buffer, noised);
      });
    });
  });
  x_t.insert(x_t.end(), v.begin(), v.end());
  for (Tensor& level : x_t) level = level.to(dtype);
  return x_t;
}

// --- Loss ---

// Predictions per level, in dtypes that can be read beside x.
std::vector<Tensor> place_predictions(const Scales& scales, TensorList predictions) {
  std::vector<Tensor> placed(scales.levels);
  size_t next = 0;
  for (int64_t s = 0; s < scales.levels; ++s) {
    if (!scales.wanted[s]) continue;
    TORCH_CHECK(next < predictions.size(), scales.op, ": expected a prediction of level ", s,
                ", got ", predictions.size(), " tensors");
    const Tensor& given = predictions[next++];
    TORCH_CHECK(given.sizes() == IntArrayRef(scales.sizes[s]), scales.op,
                ": expected a prediction of sizes ", IntArrayRef(scales.sizes[s]), ", got ",
                given.sizes());
    check_dense(scales.op, "predictions", given, scales.layout);
    placed[s] = given.to(beside(scales.x, given.scalar_type()));
  }
  return placed;
}

std::tuple<Tensor, std::vector<Tensor>> velocity_loss_cpu(
    TensorList predictions, const Tensor& x, const State& mask, c10::List<bool> wanted,
    const State& state, int64_t seed, IntArrayRef offsets, std::string_view filter,
    IntArrayRef factor, ArrayRef<double> gains, bool save) {
  const char* op = "velocity_loss";
  Scales scales{op, x, mask, wanted, state, seed, offsets, filter, factor, gains};
  scales.check();
  int64_t N = x.size(0), L = scales.levels;
  auto placed = place_predictions(scales, predictions);
  std::vector<Tensor> residuals(L);
  // Of every tile, so that their order does not depend on threads.
  std::vector<std::vector<double>> sums(L);
  for (int64_t s = 0; s < L; ++s) {
    if (!wanted[s]) continue;
    sums[s].resize(scales.tiles(s));
    if (save) residuals[s] = scales.empty(s, accumulation(x));
  }
  scales.for_parts([&](int64_t s, const Part& part) {
    dispatch_beside(x, placed[s].scalar_type(), op, [&](auto zero, auto given_zero) {
      using T = decltype(zero);
      using G = decltype(given_zero);
      using A = acc_t<T>;
      A* to = save ? mutable_data<A>(residuals[s]) + part.at : nullptr;
      if (!scales.active(part.n, s)) {
        if (save) std::fill_n(to, part.samples.elements(), A{});
        return;
      }
      Residual<T, G> residual{static_cast<const T*>(part.x), data<G>(placed[s]) + part.at,
                              static_cast<A>(gains[s])};
      for_tiles<A>(part.samples, [&](int64_t, int64_t tile, NoiseBuffer<A>& buffer) {
        SquareSum<A> sum;
        for_tile(part.normals, part.samples, 0, tile, buffer,
                 [&](int64_t m, Vec<A> z, auto count) DFM_INLINE {
                   Vec<A> r = residual(m, z, count);
                   if (save) store(to + m, r, count);
                   sum.add(r, count);
                 });
        sums[s][part.slot + tile] = sum.total();
      });
    });
  });
  Tensor loss = at::zeros({N, L}, x.options().dtype(accumulation(x)));
  for (int64_t s = 0; s < L; ++s)
    for (int64_t n = 0; n < N; ++n) {
      if (!wanted[s] || !scales.active(n, s)) continue;
      int64_t tiles = scales.tiles(s) / N;
      double sum =
          std::accumulate(sums[s].begin() + n * tiles, sums[s].begin() + (n + 1) * tiles, 0.);
      double mean = sum / scales.elements(s);
      if (loss.scalar_type() == at::kDouble)
        mutable_data<double>(loss)[n * L + s] = mean;
      else
        mutable_data<float>(loss)[n * L + s] = static_cast<float>(mean);
    }
  std::erase_if(residuals, [](const Tensor& r) { return !r.defined(); });
  return {loss, residuals};
}

std::vector<Tensor> velocity_loss_backward_cpu(const Tensor& grad, TensorList residuals,
                                               const State& mask, c10::List<bool> wanted,
                                               at::ScalarType dtype) {
  const char* op = "velocity_loss_backward";
  std::vector<int64_t> levels;
  for (int64_t s = 0; s < static_cast<int64_t>(wanted.size()); ++s)
    if (wanted[s]) levels.push_back(s);
  TORCH_CHECK(residuals.size() == levels.size(), op, ": expected residuals of ", levels.size(),
              " levels, got ", residuals.size());
  int64_t N = grad.size(0), L = static_cast<int64_t>(wanted.size());
  check_table(op, "grad", grad, accumulation(grad), {N, L});
  if (mask) check_table(op, "mask", *mask, at::kBool, {N, L});
  std::vector<Tensor> out;
  for (size_t i = 0; i < residuals.size(); ++i) {
    const Tensor& r = residuals[i];
    auto layout = layout_of(r);
    check_dense(op, "residuals", r, layout);
    TORCH_CHECK(r.dim() > 0 && r.size(0) == N, op, ": expected residuals of ", N,
                " samples, got sizes ", r.sizes());
    at::ScalarType type = beside(r, dtype);
    Tensor dg = at::empty(r.sizes(), r.options().dtype(type), layout);
    int64_t each = r.numel() / std::max<int64_t>(N, 1), s = levels[i];
    dispatch_beside(r, type, op, [&](auto zero, auto to_zero) {
      using T = decltype(zero);
      using To = decltype(to_zero);
      using A = acc_t<T>;
      const T* from = data<T>(r);
      To* to = mutable_data<To>(dg);
      at::parallel_for(0, r.numel(), kGrain, [&](int64_t begin, int64_t end) {
        while (begin < end) {
          int64_t n = begin / each, stop = std::min(end, (n + 1) * each), at = n * L + s;
          const T* part = from + begin;
          To* part_to = to + begin;
          double upstream =
              grad.scalar_type() == at::kDouble ? data<double>(grad)[at] : data<float>(grad)[at];
          A scale = static_cast<A>(upstream * (2. / each));
          if (mask && !data<bool>(*mask)[at])
            std::fill_n(part_to, stop - begin, To{});
          else
            for_vectors<A>(stop - begin, [&](int64_t k, auto count) DFM_INLINE {
              store(part_to + k, scale * load(part + k, count), count);
            });
          begin = stop;
        }
      });
    });
    out.push_back(dg.to(dtype));
  }
  return out;
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("philox_normal", philox_normal_cpu);
  m.impl("add_noise", add_noise_cpu);
  m.impl("pyramid_add_noise", pyramid_add_noise_cpu);
  m.impl("velocity_loss", velocity_loss_cpu);
  m.impl("velocity_loss_backward", velocity_loss_backward_cpu);
}

}  // namespace
}  // namespace dfm_fast
