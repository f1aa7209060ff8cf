// CPU operators of the family `noises`; the definitions are dfm_fast/ops/noises.py and
// _velocity.py.
#include "noises.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

namespace dfm_fast {
namespace {

using at::ArrayRef;
using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using State = std::optional<Tensor>;

// --- Arguments ---

// channels_last where x is that and not contiguous, as `memory_format` in the reference.
at::MemoryFormat layout_of(const Tensor& x) {
  if ((x.dim() != 4 && x.dim() != 5) || x.is_contiguous()) return at::MemoryFormat::Contiguous;
  auto last = x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return x.is_contiguous(last) ? last : at::MemoryFormat::Contiguous;
}

void check_dense(const char* op, const char* argument, const Tensor& x, at::MemoryFormat layout) {
  TORCH_CHECK(x.is_contiguous(layout), op, ": expected ", argument, " dense in ", layout,
              ", got sizes ", x.sizes(), " and strides ", x.strides());
}

at::ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
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

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void dispatch(at::ScalarType dtype, const char* op, F f) {
  if (dtype == at::kFloat) return f(Tag<float>{});
  if (dtype == at::kBFloat16) return f(Tag<bf16>{});
  if (dtype == at::kHalf) return f(Tag<fp16>{});
  TORCH_CHECK(dtype == at::kDouble, op, ": expected float32, bfloat16, float16 or float64, got ",
              dtype);
  f(Tag<double>{});
}

// The dtype in which a tensor beside x is read or written: `dtype` itself if that is x's, or one of
// them is float32 and neither float64; else the arithmetic's, which a copy converts.
at::ScalarType beside(const Tensor& x, at::ScalarType dtype) {
  bool direct = dtype == x.scalar_type() ||
                (x.scalar_type() == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf));
  return direct ? dtype : accumulation(x);
}

// f(x's type, other type), for a dtype from `beside`.
template <class F>
void dispatch_beside(const Tensor& x, at::ScalarType dtype, const char* op, F f) {
  dispatch(x.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (dtype == x.scalar_type()) return f(tag, tag);
    if constexpr (sizeof(T) == 2) return f(tag, Tag<float>{});
    if constexpr (std::is_same_v<T, float>) {
      if (dtype == at::kBFloat16) return f(tag, Tag<bf16>{});
      return f(tag, Tag<fp16>{});
    }
  });
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// --- philox_normal, add_noise ---

Tensor philox_normal_cpu(const Tensor& like, const State& state, int64_t seed, int64_t offset) {
  const char* op = "philox_normal";
  Normals normals = normals_of(op, state, seed, offset);
  Tensor out = at::empty(like.sizes(), like.options(), at::MemoryFormat::Contiguous);
  dispatch(out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    Samples samples(1, out.numel(), 1);
    Plain<T> to{mutable_data<T>(out)};
    for_tiles<A>(samples, [&](int64_t n, int64_t tile, NoiseBuffer<A>& buffer) {
      for_tile(normals, samples, n, tile, buffer, to);
    });
  });
  return out;
}

// Column s of what samples have, of `levels` levels.
struct Column {
  int64_t s = 0, levels = 1;
  const bool* mask = nullptr;  // [N, levels]

  bool active(int64_t n) const { return !mask || mask[n * levels + s]; }
  template <class A>
  A of(const Tensor& table, int64_t n) const {
    return data<A>(table)[n * levels + s];
  }
};

// x_t and, if given, v of a level X; t [N, levels].
void noise_level(const char* op, const Tensor& x, const Tensor& t, Column column, double gain,
                 const Normals& normals, const Tensor& x_t, const Tensor* v) {
  Samples samples = samples_of(x, layout_of(x));
  dispatch_beside(x, x_t.scalar_type(), op, [&](auto tag, auto to_tag) {
    using T = typename decltype(tag)::type;
    using To = typename decltype(to_tag)::type;
    using A = acc_t<T>;
    const T* from = data<T>(x);
    To *to = mutable_data<To>(x_t), *to_v = v ? mutable_data<To>(*v) : nullptr;
    for_tiles<A>(samples, [&](int64_t n, int64_t tile, NoiseBuffer<A>& buffer) {
      int64_t at = n * samples.elements();
      To* sample_v = to_v ? to_v + at : nullptr;
      if (!column.active(n)) {
        if (tile > 0) return;
        std::fill_n(to + at, samples.elements(), To{});
        if (v) std::fill_n(sample_v, samples.elements(), To{});
        return;
      }
      Noised<T, To> noised(from + at, to + at, sample_v, column.of<A>(t, n), static_cast<A>(gain));
      for_tile(normals, samples, n, tile, buffer, noised);
    });
  });
}

std::tuple<Tensor, Tensor> add_noise_cpu(const Tensor& x, const Tensor& t, const State& state,
                                         int64_t seed, int64_t offset) {
  const char* op = "add_noise";
  auto layout = layout_of(x);
  check_dense(op, "x", x, layout);
  TORCH_CHECK(x.dim() > 0, op, ": expected x with at least one dimension, got ", x.sizes());
  check_table(op, "t", t, accumulation(x), x.sizes().slice(0, 1));
  Tensor x_t = at::empty(x.sizes(), x.options(), layout);
  Tensor v = at::empty(x.sizes(), x.options(), layout);
  noise_level(op, x, t, {}, 1, normals_of(op, state, seed, offset), x_t, &v);
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

  int64_t levels() const { return static_cast<int64_t>(wanted.size()); }

  void check() const {
    TORCH_CHECK(x.dim() == 4 || x.dim() == 5, op, ": expected x with 4 or 5 dimensions, got ",
                x.sizes());
    check_dense(op, "x", x, layout_of(x));
    TORCH_CHECK(levels() > 0 && offsets.size() == wanted.size() && gains.size() == wanted.size(),
                op, ": expected offsets and gains of ", levels(), " levels, got ", offsets.size(),
                " and ", gains.size());
    if (mask) check_table(op, "mask", *mask, at::kBool, {x.size(0), levels()});
  }

  Column column(int64_t s) const { return {s, levels(), mask ? data<bool>(*mask) : nullptr}; }

  // f(s, level, normals) for every wanted level.
  template <class F>
  void for_levels(F f) const {
    auto built = build(x, levels(), filter, factor);
    for (int64_t s = 0; s < levels(); ++s)
      if (wanted[s]) f(s, built[s], normals_of(op, state, seed, offsets[s]));
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
  check_table(op, "t", t, accumulation(x), {x.size(0), scales.levels()});
  auto options = x.options().dtype(beside(x, dtype));
  std::vector<Tensor> x_t, v;
  scales.for_levels([&](int64_t s, const Tensor& level, const Normals& normals) {
    x_t.push_back(at::empty(level.sizes(), options, layout_of(x)));
    if (targets) v.push_back(at::empty(level.sizes(), options, layout_of(x)));
    noise_level(op, level, t, scales.column(s), gains[s], normals, x_t.back(),
                targets ? &v.back() : nullptr);
  });
  x_t.insert(x_t.end(), v.begin(), v.end());
  for (Tensor& level : x_t) level = level.to(dtype);
  return x_t;
}

// f(s, level, normals, predictions of the level in a dtype that can be read beside it).
template <class F>
void for_predictions(const Scales& scales, TensorList predictions, F f) {
  size_t next = 0;
  scales.check();
  scales.for_levels([&](int64_t s, const Tensor& level, const Normals& normals) {
    TORCH_CHECK(next < predictions.size(), scales.op, ": expected a prediction of level ", s,
                ", got ", predictions.size(), " tensors");
    const Tensor& given = predictions[next++];
    TORCH_CHECK(given.sizes() == level.sizes(), scales.op, ": expected predictions[", next - 1,
                "] of sizes ", level.sizes(), ", got ", given.sizes());
    check_dense(scales.op, "predictions", given, layout_of(scales.x));
    f(s, level, normals, given.to(beside(level, given.scalar_type())));
  });
}

Tensor velocity_loss_cpu(TensorList predictions, const Tensor& x, const State& mask,
                         c10::List<bool> wanted, const State& state, int64_t seed,
                         IntArrayRef offsets, std::string_view filter, IntArrayRef factor,
                         ArrayRef<double> gains) {
  const char* op = "velocity_loss";
  Scales scales{op, x, mask, wanted, state, seed, offsets, filter, factor, gains};
  int64_t levels = scales.levels();
  Tensor loss = at::zeros({x.size(0), levels}, x.options().dtype(accumulation(x)));
  for_predictions(scales, predictions,
                  [&](int64_t s, const Tensor& level, const Normals& normals, const Tensor& given) {
                    Column column = scales.column(s);
                    Samples samples = samples_of(level, layout_of(level));
                    // Of every tile, so that their order does not depend on threads.
                    std::vector<double> sums(samples.count * samples.tiles());
                    dispatch_beside(level, given.scalar_type(), op, [&](auto tag, auto given_tag) {
                      using T = typename decltype(tag)::type;
                      using G = typename decltype(given_tag)::type;
                      using A = acc_t<T>;
                      for_tiles<A>(samples, [&](int64_t n, int64_t tile, NoiseBuffer<A>& buffer) {
                        if (!column.active(n)) return;
                        int64_t at = n * samples.elements();
                        Residual<T, G> residual{data<T>(level) + at, data<G>(given) + at,
                                                static_cast<A>(gains[s])};
                        SquareSum<A> sum;
                        for_tile(normals, samples, n, tile, buffer,
                                 [&](int64_t m, Vec<A> z, auto count)
                                     DFM_INLINE { sum.add(residual(m, z, count), count); });
                        sums[n * samples.tiles() + tile] = sum.total();
                      });
                      for (int64_t n = 0; n < samples.count; ++n) {
                        if (!column.active(n)) continue;
                        double sum = 0;
                        for (int64_t tile = 0; tile < samples.tiles(); ++tile)
                          sum += sums[n * samples.tiles() + tile];
                        mutable_data<A>(loss)[n * levels + s] =
                            static_cast<A>(sum / samples.elements());
                      }
                    });
                  });
  return loss;
}

std::vector<Tensor> velocity_loss_backward_cpu(const Tensor& grad, TensorList predictions,
                                               const Tensor& x, const State& mask,
                                               c10::List<bool> wanted, const State& state,
                                               int64_t seed, IntArrayRef offsets,
                                               std::string_view filter, IntArrayRef factor,
                                               ArrayRef<double> gains) {
  const char* op = "velocity_loss_backward";
  Scales scales{op, x, mask, wanted, state, seed, offsets, filter, factor, gains};
  check_table(op, "grad", grad, accumulation(x), {x.size(0), scales.levels()});
  std::vector<Tensor> out;
  for_predictions(scales, predictions,
                  [&](int64_t s, const Tensor& level, const Normals& normals, const Tensor& given) {
                    Column column = scales.column(s);
                    Samples samples = samples_of(level, layout_of(level));
                    Tensor dg = at::empty(given.sizes(), given.options(), layout_of(x));
                    dispatch_beside(level, given.scalar_type(), op, [&](auto tag, auto given_tag) {
                      using T = typename decltype(tag)::type;
                      using G = typename decltype(given_tag)::type;
                      using A = acc_t<T>;
                      for_tiles<A>(samples, [&](int64_t n, int64_t tile, NoiseBuffer<A>& buffer) {
                        int64_t at = n * samples.elements();
                        G* to = mutable_data<G>(dg) + at;
                        if (!column.active(n)) {
                          if (tile == 0) std::fill_n(to, samples.elements(), G{});
                          return;
                        }
                        Residual<T, G> residual{data<T>(level) + at, data<G>(given) + at,
                                                static_cast<A>(gains[s])};
                        A scale = column.of<A>(grad, n) * static_cast<A>(2. / samples.elements());
                        for_tile(normals, samples, n, tile, buffer,
                                 [&](int64_t m, Vec<A> z, auto count) DFM_INLINE {
                                   store(to + m, scale * residual(m, z, count), count);
                                 });
                      });
                    });
                    out.push_back(dg.to(predictions[out.size()].scalar_type()));
                  });
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
