// CPU operators of the family `pyramids`; the definition is dfm_fast/ops/pyramids.py.
#include "pyramids.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string_view>

#include "box.h"
#include "haar.h"
#include "tensors.h"

namespace dfm_fast {
namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;

// --- Arguments ---

void check_dense(const char* op, const char* argument, const Tensor& x, at::MemoryFormat layout) {
  TORCH_CHECK(x.dim() == 4 || x.dim() == 5, op, ": expected ", argument,
              " with 4 or 5 dimensions, got ", x.sizes());
  TORCH_CHECK(x.is_contiguous(layout), op, ": expected ", argument, " dense in ", layout,
              ", got sizes ", x.sizes(), " and strides ", x.strides());
}

void check_levels(const char* op, const char* argument, TensorList levels) {
  TORCH_CHECK(!levels.empty(), op, ": expected at least one tensor in ", argument, ", got 0");
  const Tensor& finest = levels.back();
  for (const Tensor& level : levels) {
    check_dense(op, argument, level, layout_of(finest));
    TORCH_CHECK(level.scalar_type() == finest.scalar_type() && level.dim() == finest.dim(), op,
                ": expected ", argument, " of one dtype and rank, got ", level.scalar_type(), " ",
                level.sizes(), " beside ", finest.scalar_type(), " ", finest.sizes());
  }
}

Filter parse_filter(const char* op, std::string_view filter) {
  if (filter == "nearest") return Filter::nearest;
  if (filter == "bilinear") return Filter::bilinear;
  if (filter == "binomial") return Filter::binomial;
  TORCH_CHECK(filter == "dct", op, ": expected filter nearest, bilinear, binomial or dct, got ",
              filter);
  return Filter::dct;
}

// Halvings per axis (T, H, W) of a factor per spatial axis.
std::array<int, 3> parse_factor(const char* op, IntArrayRef factor, int64_t dim) {
  TORCH_CHECK(static_cast<int64_t>(factor.size()) == dim - 2, op, ": expected a factor of ",
              dim - 2, " numbers, got ", factor);
  std::array<int, 3> steps{};
  for (size_t a = 0; a < factor.size(); ++a) {
    TORCH_CHECK(factor[a] == 1 || factor[a] == 2 || factor[a] == 4, op,
                ": expected a factor of 1, 2 or 4 per axis, got ", factor);
    steps[3 - factor.size() + a] = factor[a] / 2;
  }
  return steps;
}

void check_sides(const char* op, Filter filter, Grid fine, std::array<int, 3> steps) {
  int64_t multiple = filter == Filter::binomial ? 1 : filter == Filter::dct ? 8 : 2;
  int64_t sides[3] = {fine.T, fine.H, fine.W};
  for (int a = 0; a < 3; ++a)
    for (int s = 0; s < steps[a]; ++s, sides[a] = half(sides[a]))
      TORCH_CHECK(sides[a] > 0 && sides[a] % multiple == 0, op, ": expected sides of multiples of ",
                  multiple, " at every halving, got a side of ", sides[a]);
}

// --- Layout ---

Grid grid_of(const Tensor& x, at::MemoryFormat layout) {
  int64_t T = x.dim() == 5 ? x.size(2) : 1;
  int64_t C = layout == at::MemoryFormat::Contiguous ? 1 : x.size(1);
  return {T, x.size(-2), x.size(-1), C};
}

// A tensor like x of other sides (and channels).
Tensor empty_like(const Tensor& x, int64_t channels, Grid grid) {
  std::vector<int64_t> sizes{x.size(0), channels, grid.H, grid.W};
  if (x.dim() == 5) sizes.insert(sizes.begin() + 2, grid.T);
  return at::empty(sizes, x.options(), layout_of(x));
}

Tensor copy_of(const Tensor& x) {
  Tensor y = empty_like(x, x.size(1), grid_of(x, at::MemoryFormat::Contiguous));
  return y.copy_(x);
}

template <class T>
Plane<T> plane(const Tensor& x, Grid grid, int64_t p) {
  using Bare = std::remove_const_t<T>;
  T* data;
  if constexpr (std::is_const_v<T>)
    data = static_cast<T*>(x.const_data_ptr());
  else
    data = static_cast<Bare*>(x.mutable_data_ptr());
  return {data + p * grid.plane(), grid};
}

// --- Scheduling ---

// Where the work of an operator lies: grids of the levels, coarse to fine, of every plane.
struct Work {
  int64_t planes;
  std::vector<Grid> grids;

  // Many planes: each thread takes planes through all levels, which stay in its cache. Few: level
  // after level, bands of rows in parallel.
  bool by_plane() const {
    constexpr int64_t cheap = 1 << 15;
    int64_t threads = at::get_num_threads();
    return planes >= 4 * threads || grids.back().plane() <= cheap || threads == 1;
  }
  int64_t slots() const { return by_plane() ? at::get_num_threads() : planes; }
};

// run(s, plane, slot, begin, end, workspace): coarse rows begin .. end of the step between levels s
// and s + 1, for s from coarse to fine or from fine to coarse. `slot` < work.slots() names scratch.
template <class MakeWorkspace, class Run>
void run_levels(const Work& work, bool to_coarse, MakeWorkspace make_workspace, Run run) {
  const auto& grids = work.grids;
  int64_t steps = static_cast<int64_t>(grids.size()) - 1;
  auto step = [&](int64_t k) { return to_coarse ? steps - 1 - k : k; };
  if (work.by_plane()) {
    int64_t grain = std::max<int64_t>(1, (1 << 14) / grids.back().plane());
    at::parallel_for(0, work.planes, grain, [&](int64_t begin, int64_t end) {
      auto ws = make_workspace();
      for (int64_t p = begin; p < end; ++p)
        for (int64_t k = 0; k < steps; ++k)
          run(step(k), p, at::get_thread_num(), 0, grids[step(k)].H, ws);
    });
    return;
  }
  for (int64_t k = 0; k < steps; ++k) {
    constexpr int64_t least = 8;  // rows of a band: bands recompute up to two rows of another
    int64_t s = step(k), rows = grids[s].H;
    int64_t wanted = (4 * at::get_num_threads() + work.planes - 1) / work.planes;
    int64_t band = std::max(least, (rows / wanted + least - 1) / least * least);
    int64_t bands = (rows + band - 1) / band;
    at::parallel_for(0, work.planes * bands, 1, [&](int64_t begin, int64_t end) {
      auto ws = make_workspace();
      for (int64_t task = begin; task < end; ++task) {
        int64_t first = task % bands * band;
        run(s, task / bands, task / bands, first, std::min(first + band, rows), ws);
      }
    });
  }
}

// Intermediate levels, in `slots` copies of a plane each.
template <class T>
struct Scratch {
  std::vector<Grid> grids;
  std::vector<std::unique_ptr<T[]>> data;

  explicit Scratch(const Work& work) : grids(work.grids), data(grids.size()) {
    for (size_t s = 1; s + 1 < grids.size(); ++s)
      data[s].reset(new T[work.slots() * grids[s].plane()]);
  }
  Plane<T> plane(int64_t s, int64_t slot) const {
    return {data[s].get() + slot * grids[s].plane(), grids[s]};
  }
};

template <class T>
Plane<const T> readable(Plane<T> p) {
  return {p.data, p.grid};
}

// --- Laplacian ---

// The plans of all levels of a pyramid, coarse to fine, and all grids.
template <class A>
struct Plans {
  std::array<int64_t, 12> key;  // what they were made of
  std::vector<LevelPlan<A>> levels;
  std::vector<Grid> grids;
};

// `work` gets the grids. The last few plans of each thread are kept: making them took 50 us of the
// 105 us in which one thread builds two binomial levels of 512x512, and 7 of 13 us at 64x64.
template <class A>
const std::vector<LevelPlan<A>>& make_plans(const char* op, const Tensor& finest,
                                            int64_t num_levels, Filter filter, IntArrayRef factor,
                                            bool backward, A sign, Work& work) {
  auto layout = layout_of(finest);
  auto steps = parse_factor(op, factor, finest.dim());
  Grid grid = grid_of(finest, layout);
  work.planes = finest.size(0) * (layout == at::MemoryFormat::Contiguous ? finest.size(1) : 1);
  std::array<int64_t, 12> key{grid.T,   grid.H,   grid.W,   grid.C,   num_levels, int64_t(filter),
                              steps[0], steps[1], steps[2], backward, sign < 0,   1};
  static thread_local std::array<Plans<A>, 8> kept{};
  static thread_local size_t oldest = 0;
  for (const auto& plans : kept)
    if (plans.key == key) return work.grids = plans.grids, plans.levels;
  Plans<A> made{key, {}, {grid}};
  for (int64_t s = 0; s < num_levels - 1; ++s) {
    check_sides(op, filter, grid, steps);
    made.levels.emplace_back(grid, filter, steps, backward, sign);
    made.grids.push_back(grid = made.levels.back().coarse);
  }
  std::reverse(made.levels.begin(), made.levels.end());
  std::reverse(made.grids.begin(), made.grids.end());
  Plans<A>& slot = kept[oldest++ % kept.size()] = std::move(made);
  return work.grids = slot.grids, slot.levels;
}

void check_grids(const char* op, TensorList levels, const Work& work) {
  for (size_t s = 0; s < levels.size(); ++s) {
    Grid expected = work.grids[s], got = grid_of(levels[s], layout_of(levels.back()));
    TORCH_CHECK(levels[s].size(0) == levels.back().size(0) &&
                    levels[s].size(1) == levels.back().size(1) && expected.T == got.T &&
                    expected.H == got.H && expected.W == got.W,
                op, ": expected level ", s, " with sides ", expected.T, " ", expected.H, " ",
                expected.W, ", got sizes ", levels[s].sizes());
  }
}

std::vector<Tensor> laplacian_build_cpu(const Tensor& x, int64_t num_levels,
                                        std::string_view filter_name, IntArrayRef factor) {
  const char* op = "laplacian_build";
  check_dense(op, "x", x, layout_of(x));
  if (num_levels == 1) return {copy_of(x)};
  Filter filter = parse_filter(op, filter_name);
  std::vector<Tensor> levels;
  dispatch(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Work work;
    const auto& plans = make_plans<A>(op, x, num_levels, filter, factor, false, -1, work);
    for (Grid grid : work.grids) levels.push_back(empty_like(x, x.size(1), grid));
    if (x.numel() == 0) return;
    Scratch<T> scratch(work);
    int64_t finest = num_levels - 1;
    run_levels(
        work, true, [&] { return Workspace<A>(plans); },
        [&](int64_t s, int64_t p, int64_t slot, int64_t begin, int64_t end, Workspace<A>& ws) {
          Grid grid = work.grids[s];
          auto fine = s + 1 == finest ? plane<const T>(x, work.grids[finest], p)
                                      : readable(scratch.plane(s + 1, slot));
          auto coarse = s == 0 ? plane<T>(levels[0], grid, p) : scratch.plane(s, slot);
          auto detail = plane<T>(levels[s + 1], work.grids[s + 1], p);
          Band band = plans[s].band(begin, end);
          if (!plans[s].box) return build_level(plans[s], ws, band, fine, coarse, detail);
          for (int64_t t = 0; t < grid.T; ++t)
            box_build(plans[s], ws, band, fine.row(t, 0), coarse.row(t, 0), detail.row(t, 0));
        });
  });
  return levels;
}

Tensor laplacian_collapse_cpu(TensorList levels, std::string_view filter_name, IntArrayRef factor) {
  const char* op = "laplacian_collapse";
  check_levels(op, "levels", levels);
  if (levels.size() == 1) return copy_of(levels[0]);
  Filter filter = parse_filter(op, filter_name);
  const Tensor& finest = levels.back();
  Tensor x = empty_like(finest, finest.size(1), grid_of(finest, at::MemoryFormat::Contiguous));
  dispatch(finest.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Work work;
    const auto& plans = make_plans<A>(op, finest, levels.size(), filter, factor, false, 1, work);
    check_grids(op, levels, work);
    if (finest.numel() == 0) return;
    Scratch<T> scratch(work);
    int64_t last = static_cast<int64_t>(plans.size()) - 1;
    run_levels(
        work, false, [&] { return Workspace<A>(plans); },
        [&](int64_t s, int64_t p, int64_t slot, int64_t begin, int64_t end, Workspace<A>& ws) {
          Grid grid = work.grids[s + 1];
          auto coarse = s == 0 ? plane<const T>(levels[0], work.grids[0], p)
                               : readable(scratch.plane(s, slot));
          auto fine = s == last ? plane<T>(x, grid, p) : scratch.plane(s + 1, slot);
          auto detail = plane<const T>(levels[s + 1], grid, p);
          Band band = plans[s].band(begin, end);
          if (!plans[s].box) return collapse_level(plans[s], ws, band, coarse, detail, fine);
          for (int64_t t = 0; t < grid.T; ++t)
            box_collapse(plans[s], ws, band, coarse.row(t, 0), detail.row(t, 0), fine.row(t, 0));
        });
  });
  return x;
}

Tensor laplacian_build_backward_cpu(TensorList grads, std::string_view filter_name,
                                    IntArrayRef factor) {
  const char* op = "laplacian_build_backward";
  check_levels(op, "grads", grads);
  if (grads.size() == 1) return copy_of(grads[0]);
  Filter filter = parse_filter(op, filter_name);
  const Tensor& finest = grads.back();
  Tensor dx = empty_like(finest, finest.size(1), grid_of(finest, at::MemoryFormat::Contiguous));
  dispatch(finest.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Work work;
    const auto& plans = make_plans<A>(op, finest, grads.size(), filter, factor, true, 1, work);
    check_grids(op, grads, work);
    if (finest.numel() == 0) return;
    Scratch<A> scratch(work);
    int64_t last = static_cast<int64_t>(plans.size()) - 1;
    run_levels(
        work, false, [&] { return Workspace<A>(plans); },
        [&](int64_t s, int64_t p, int64_t slot, int64_t begin, int64_t end, Workspace<A>& ws) {
          const auto& plan = plans[s];
          Grid grid = work.grids[s + 1];
          auto detail = plane<const T>(grads[s + 1], grid, p);
          auto level = [&](auto coarse) {
            Band band = plan.band(begin, end);
            auto into = [&](auto fine) {
              if (!plan.box) return build_backward_level(plan, ws, band, coarse, detail, fine);
              for (int64_t t = 0; t < grid.T; ++t)
                box_build_backward(plan, ws, band, coarse.row(t, 0), detail.row(t, 0),
                                   fine.row(t, 0));
            };
            if (s == last)
              into(plane<T>(dx, grid, p));
            else
              into(scratch.plane(s + 1, slot));
          };
          if (s == 0)
            level(plane<const T>(grads[0], work.grids[0], p));
          else
            level(readable(scratch.plane(s, slot)));
        });
  });
  return dx;
}

std::vector<Tensor> laplacian_collapse_backward_cpu(const Tensor& grad, int64_t num_levels,
                                                    std::string_view filter_name,
                                                    IntArrayRef factor) {
  const char* op = "laplacian_collapse_backward";
  check_dense(op, "grad", grad, layout_of(grad));
  Filter filter = parse_filter(op, filter_name);
  std::vector<Tensor> grads;
  dispatch(grad.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    Work work;
    const auto& plans = make_plans<A>(op, grad, num_levels, filter, factor, true, 1, work);
    for (int64_t s = 0; s < num_levels - 1; ++s)
      grads.push_back(empty_like(grad, grad.size(1), work.grids[s]));
    if (grad.numel() == 0) return;
    Scratch<A> scratch(work);
    int64_t last = num_levels - 2;
    run_levels(
        work, true, [&] { return Workspace<A>(plans); },
        [&](int64_t s, int64_t p, int64_t slot, int64_t begin, int64_t end, Workspace<A>& ws) {
          Band band = plans[s].band(begin, end);
          auto rounded = plane<T>(grads[s], work.grids[s], p);
          auto exact = s > 0 ? scratch.plane(s, slot) : Plane<A>{};
          auto from = [&](auto fine) {
            const auto& plan = plans[s];
            if (!plan.box) return collapse_backward_level(plan, ws, band, fine, exact, rounded);
            for (int64_t t = 0; t < work.grids[s].T; ++t)
              box_collapse_backward(plan, ws, band, fine.row(t, 0),
                                    exact.data ? exact.row(t, 0) : nullptr, rounded.row(t, 0));
          };
          if (s == last)
            from(plane<const T>(grad, work.grids[s + 1], p));
          else
            from(readable(scratch.plane(s + 1, slot)));
        });
  });
  return grads;
}

// --- Haar ---

// The work on images of C channels, each plane of which is `grid` at the finest level.
Work haar_work(const char* op, int64_t N, int64_t C, Grid grid, int64_t num_levels) {
  Work work{grid.C == C ? N : N * C, {grid}};
  for (int64_t s = 0; s < num_levels - 1; ++s) {
    check_sides(op, Filter::nearest, grid, {0, 1, 1});
    grid.H /= 2, grid.W /= 2;
    work.grids.insert(work.grids.begin(), grid);
  }
  return work;
}

// Detail bands of plane p of a tensor [N, 3C, h, w].
template <class T>
Bands<T> bands(const Tensor& detail, at::MemoryFormat layout, Grid grid, int64_t p) {
  auto whole = plane<T>(detail, grid, 0);
  if (layout != at::MemoryFormat::Contiguous)
    return {whole.data + p * 3 * grid.plane(), grid, true, 0};
  int64_t C = detail.size(1) / 3, n = p / C, c = p % C;
  return {whole.data + (n * 3 * C + c) * grid.plane(), grid, false, C * grid.plane()};
}

void check_haar_levels(const char* op, TensorList levels, const Work& work) {
  const Tensor& coarsest = levels[0];
  for (size_t s = 0; s < levels.size(); ++s) {
    Grid grid = work.grids[s == 0 ? 0 : s - 1];
    int64_t channels = coarsest.size(1) * (s == 0 ? 1 : 3);
    at::IntArrayRef sizes = levels[s].sizes();
    TORCH_CHECK(sizes.size() == 4 && sizes[0] == coarsest.size(0) && sizes[1] == channels &&
                    sizes[2] == grid.H && sizes[3] == grid.W,
                op, ": expected level ", s, " with ", channels, " channels and sides ", grid.H, " ",
                grid.W, ", got sizes ", sizes);
  }
}

std::vector<Tensor> haar_build_cpu(const Tensor& x, int64_t num_levels) {
  const char* op = "haar_build";
  check_dense(op, "x", x, layout_of(x));
  TORCH_CHECK(x.dim() == 4, op, ": expected x with 4 dimensions, got ", x.sizes());
  if (num_levels == 1) return {copy_of(x)};
  int64_t C = x.size(1);
  auto layout = layout_of(x);
  Work work = haar_work(op, x.size(0), C, grid_of(x, layout), num_levels);
  std::vector<Tensor> levels{empty_like(x, C, work.grids[0])};
  for (int64_t s = 0; s < num_levels - 1; ++s)
    levels.push_back(empty_like(x, 3 * C, work.grids[s]));
  if (x.numel() == 0) return levels;
  dispatch(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using Ws = HaarWorkspace<acc_t<T>>;
    Scratch<T> scratch(work);
    run_levels(
        work, true, [&] { return Ws(work.grids.back()); },
        [&](int64_t s, int64_t p, int64_t slot, int64_t begin, int64_t end, Ws& ws) {
          auto fine = s == num_levels - 2 ? plane<const T>(x, work.grids[s + 1], p)
                                          : readable(scratch.plane(s + 1, slot));
          auto coarse = s == 0 ? plane<T>(levels[0], work.grids[0], p) : scratch.plane(s, slot);
          haar_build_rows(ws, begin, end, fine, coarse,
                          bands<T>(levels[s + 1], layout, work.grids[s], p));
        });
  });
  return levels;
}

Tensor haar_collapse_cpu(TensorList levels) {
  const char* op = "haar_collapse";
  check_levels(op, "levels", levels);
  if (levels.size() == 1) return copy_of(levels[0]);
  const Tensor& finest = levels.back();
  int64_t C = levels[0].size(1);
  auto layout = layout_of(finest);
  Grid grid = grid_of(finest, layout);
  grid.H *= 2, grid.W *= 2, grid.C = layout == at::MemoryFormat::Contiguous ? 1 : C;
  Tensor x = empty_like(finest, C, grid);
  Work work = haar_work(op, x.size(0), C, grid, levels.size());
  check_haar_levels(op, levels, work);
  if (x.numel() == 0) return x;
  dispatch(finest.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using Ws = HaarWorkspace<acc_t<T>>;
    Scratch<T> scratch(work);
    int64_t last = static_cast<int64_t>(levels.size()) - 2;
    run_levels(
        work, false, [&] { return Ws(work.grids.back()); },
        [&](int64_t s, int64_t p, int64_t slot, int64_t begin, int64_t end, Ws& ws) {
          auto coarse = s == 0 ? plane<const T>(levels[0], work.grids[0], p)
                               : readable(scratch.plane(s, slot));
          auto fine = s == last ? plane<T>(x, work.grids[s + 1], p) : scratch.plane(s + 1, slot);
          haar_collapse_rows(ws, begin, end, coarse,
                             bands<const T>(levels[s + 1], layout, work.grids[s], p), fine);
        });
  });
  return x;
}

TORCH_LIBRARY_IMPL(dfm_fast, CPU, m) {
  m.impl("laplacian_build", laplacian_build_cpu);
  m.impl("laplacian_build_backward", laplacian_build_backward_cpu);
  m.impl("laplacian_collapse", laplacian_collapse_cpu);
  m.impl("laplacian_collapse_backward", laplacian_collapse_backward_cpu);
  m.impl("haar_build", haar_build_cpu);
  m.impl("haar_collapse", haar_collapse_cpu);
}

}  // namespace
}  // namespace dfm_fast
