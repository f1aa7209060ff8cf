r"""Noise per element and per scale: flow matching's inputs, targets and loss from one seed.

    x_t = (1 - t) x + t eps        v = dx_t/dt = eps - x        eps ~ N(0, 1)

t is the noise level: 1 is pure noise, 0 is data. With a pyramid of L levels X_1 .. X_L (coarse to
fine) every level s of every sample n has its own t[n, s] and its own noise (DFM, arXiv 2506.19839,
§3): x_t,s = (1 - t_s) X_s + t_s eps_s, v_s = eps_s - X_s, and the loss is the mean over C, H, W of
(G_s - v_s)^2. Levels that are not active come out as zeros, or not at all, and lose nothing.

The noise is a function of (seed, offset) and the element's index (`_philox`): it is never stored.
Level s starts at offset + sum over r < s of the elements of level r of the whole batch, each sum
rounded up to 4, whether r is active or not. So a loss, a recomputed activation, another device or
another sharding sees the same noise.

Saved for backward: x and t; of a loss G_s - v_s in float32, so that a training step makes the noise
of its targets once. All arithmetic in float32 (float64 for float64), rounded once; levels
are rounded to x's dtype first, as `laplacian_build` does. Bytes moved at least, N elements of x and
N_tot of all levels, b bytes each: add_noise 3 N b; pyramid_add_noise (N + 2 N_tot) b, or
(N + N_tot) b without targets; velocity_loss (N + N_tot) b, 4 N_tot more where autograd will ask for
gradients, and N_tot (4 + b) for these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_fast import _checks
from dfm_fast._library import Shard, define, differentiable, operator
from dfm_fast.ops import pyramids
from dfm_fast.ops._layouts import dense, empty_in, lay_out, memory_format
from dfm_fast.ops._philox import Seed, normals_ref, seed_of
from dfm_fast.ops._scales import (
    NORMAL_FLOPS,
    PYRAMID,
    STREAM,
    accumulation,
    build_backward,
    check_active,
    check_decomposition,
    check_std,
    gains_of,
    level_flops,
    level_offsets,
    level_shapes,
    levels_ref,
    per_sample,
    split,
    wanted_levels,
    where_active,
)

_ops = torch.ops.dfm_fast
Levels = list[Tensor | None]

# --- References ----------------------------------------------------------------------------------


def _noised(
    x: Tensor, t: Tensor, state: Tensor | None, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    """(x_t, v), not yet rounded. x [N, ...], t [N]."""
    eps = normals_ref(x.shape, state, seed, offset, x)
    wide, t = x.to(eps.dtype), per_sample(t.to(eps.dtype), x)
    return (1 - t) * wide + t * eps, eps - wide


def _add_noise(x: Tensor, t: Tensor, *stream: Any) -> tuple[Tensor, Tensor]:
    x_t, v = (lay_out(y.to(x.dtype), memory_format(x)) for y in _noised(x, t, *stream))
    return x_t, v


def philox_normal_ref(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Defines `philox_normal`."""
    like = torch.empty((), dtype=dtype, device=device)
    return normals_ref(shape, *split(seed), offset, like).to(dtype)


def add_noise_ref(
    x: Tensor, t: Tensor, seed: int | Tensor, *, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """x [N, ...], t [N] -> (x_t, v); defines `add_noise`."""
    return _add_noise(x, t, *split(seed), offset)


def _pyramid_add_noise(
    x: Tensor,
    t: Tensor,
    mask: Tensor | None,
    wanted: Sequence[bool],
    state: Tensor | None,
    seed: int,
    offsets: Sequence[int],
    filter: str,
    factor: Sequence[int],
    gains: Sequence[float],
    targets: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """x_t of the wanted levels, then v of them."""
    x_t: list[Tensor] = []
    v: list[Tensor] = []
    layout = memory_format(x)
    for s, level in enumerate(levels_ref(x, len(wanted), filter, factor, gains)):
        if wanted[s]:
            both = _noised(level, t[:, s], state, seed, offsets[s])
            for to, y in zip((x_t, v), both, strict=True):
                to.append(lay_out(where_active(y, mask, s).to(dtype), layout))
    return [*x_t, *v] if targets else x_t


def pyramid_add_noise_ref(
    x: Tensor,
    t: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    num_levels: int = 2,
    filter: str = "bilinear",
    factor: Sequence[int] = (2, 2),
    active: Sequence[bool] | Tensor | None = None,
    targets: bool = True,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Levels, Levels | None]:
    """x [N, C, (T,) H, W], t [N, L] -> levels of x_t and v; defines `pyramid_add_noise`."""
    wanted, mask = wanted_levels(active, num_levels)
    offsets = level_offsets(level_shapes(x.shape, num_levels, filter, factor), offset)
    state, seed = split(seed)
    out = _pyramid_add_noise(
        x, t, mask, wanted, state, seed, offsets, filter, factor, gains_of(std, num_levels),
        targets, dtype or x.dtype,
    )  # fmt: skip
    return _unpack(out, wanted, targets)


def _unpack(
    out: Sequence[Tensor], wanted: Sequence[bool], targets: bool
) -> tuple[Levels, Levels | None]:
    """Raw outputs -> (levels of x_t, levels of v), None where a level is not wanted."""
    given = iter(out)
    x_t: Levels = [next(given) if w else None for w in wanted]
    return x_t, [next(given) if w else None for w in wanted] if targets else None


# --- Registration ---------------------------------------------------------------------------------


def _philox_normal(like: Tensor, state: Tensor | None, seed: int, offset: int) -> Tensor:
    return normals_ref(like.shape, state, seed, offset, like).to(like.dtype)


def _add_noise_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    layout = memory_format(x)
    return empty_in(layout, x, x.shape), empty_in(layout, x, x.shape)


def _pyramid_fake(
    x: Tensor, t: Any, mask: Any, wanted: Any, state: Any, seed: Any, offsets: Any,
    filter: str, factor: Sequence[int], gains: Any, targets: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    like, layout = x.new_empty(0, dtype=dtype), memory_format(x)
    shapes = level_shapes(x.shape, len(wanted), filter, factor)
    shapes = [s for s, w in zip(shapes, wanted, strict=True) if w]
    return [empty_in(layout, like, s) for s in shapes * (1 + targets)]


define(
    f"philox_normal(Tensor like, {STREAM}, int offset) -> Tensor",
    reference=_philox_normal,
    fake=lambda like, *_: like.new_empty(like.shape),
    kernel="noises:philox_normal",
    flops=lambda like, *_: NORMAL_FLOPS * math.prod(like),
)
define(
    f"add_noise(Tensor x, Tensor t, {STREAM}, int offset) -> (Tensor, Tensor)",
    reference=_add_noise,
    fake=_add_noise_fake,
    kernel="noises:add_noise",
    flops=lambda x, *_: (NORMAL_FLOPS + 4) * math.prod(x),
)
define(
    f"pyramid_add_noise(Tensor x, Tensor t, Tensor? mask, bool[] wanted, {STREAM}, "
    f"int[] offsets, {PYRAMID}, bool targets, ScalarType dtype) -> Tensor[]",
    reference=_pyramid_add_noise,
    fake=_pyramid_fake,
    kernel="noises:pyramid_add_noise",
    flops=lambda x, t, mask, wanted, state, seed, offsets, filter, factor, *_: level_flops(
        x, wanted, filter, factor, NORMAL_FLOPS + 5
    ),
)
# --- Gradients ------------------------------------------------------------------------------------


def _wide_sum(grad: Tensor, v: Tensor) -> Tensor:
    """Sum over each sample of grad * v. [N]"""
    product = (grad.to(v.dtype) * v).unsqueeze(-1).flatten(1)
    return product.sum(1, dtype=torch.float64).to(v.dtype)


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t, state, seed, offset):
        ctx.save_for_backward(x, t, state)
        ctx.seed, ctx.offset = seed, offset
        return _ops.add_noise(x, t, state, seed, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_t, dv):
        x, t, state = ctx.saved_tensors
        dx = dt = None
        if ctx.needs_input_grad[0]:
            dx = dx_t.to(t.dtype) * (1 - per_sample(t, x)) - dv
            dx = lay_out(dx.to(x.dtype), memory_format(x))
        if ctx.needs_input_grad[1]:
            _, v = _ops.add_noise(x.to(t.dtype), t, state, ctx.seed, ctx.offset)
            dt = _wide_sum(dx_t, v)
        return dx, dt, None, None, None


class _PyramidAddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t, mask, wanted, state, seed, offsets, options):
        ctx.save_for_backward(x, t, mask, state)
        ctx.rest = wanted, seed, offsets, options
        stream = state, seed, offsets
        return tuple(_ops.pyramid_add_noise(x, t, mask, wanted, *stream, *options))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, t, mask, state = ctx.saved_tensors
        wanted, seed, offsets, (filter, factor, gains, targets, _) = ctx.rest
        dx_t, dv = _unpack(grads, wanted, targets)
        dx = dt = None
        if ctx.needs_input_grad[0]:
            levels = []
            for s, shape in enumerate(level_shapes(x.shape, len(wanted), filter, factor)):
                if (own := dx_t[s]) is None:
                    levels.append(empty_in(memory_format(x), x, shape).zero_())
                    continue
                g = own.to(t.dtype) * (1 - per_sample(t[:, s], own))
                g = (g if dv is None or (e := dv[s]) is None else g - e) * gains[s]
                g = where_active(g, mask, s).to(x.dtype)
                levels.append(lay_out(g, memory_format(x)))
            dx = build_backward(levels, filter, factor)
        if ctx.needs_input_grad[1]:
            options = filter, factor, gains, True, t.dtype
            stream = state, seed, offsets
            out = _ops.pyramid_add_noise(x.to(t.dtype), t, mask, wanted, *stream, *options)
            _, v = _unpack(out, wanted, True)
            columns = [
                t.new_zeros(len(t)) if g is None or e is None else _wide_sum(g, e)
                for g, e in zip(dx_t, v or [], strict=True)
            ]
            dt = torch.stack(columns, 1)
        return dx, dt, *[None] * 6


# --- Arguments ------------------------------------------------------------------------------------


def _check_t(op: str, t: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Noise levels, in the dtype of the arithmetic. Their range is checked where that needs no
    synchronisation: on the CPU."""
    _checks.tensor(op, "t", t, (len(shape),))
    if t.shape != shape:
        _checks.fail(op, "t", f"shape {list(shape)}", list(t.shape))
    if t.device != x.device:
        _checks.fail(op, "t", f"device {x.device} like x", t.device)
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        low, high = (v.item() for v in t.detach().aminmax())
        if not (low >= 0 and high <= 1):
            _checks.fail(op, "t", "noise levels in [0, 1]", f"{low:g} to {high:g}")
    return t.to(accumulation(x)).contiguous()


# --- Public functions -----------------------------------------------------------------------------


@operator(
    reference=philox_normal_ref,
    raw=("philox_normal",),
    cost=lambda shape, dtype=torch.float32, **_: math.prod(shape) * dtype.itemsize,
)
def philox_normal(
    shape: Sequence[int],
    seed: Seed = None,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = "cpu",
) -> Tensor:
    """Standard normals that are the same on every device.

    Args:
        shape: of the result.
        seed: 64 bits; or an int64 tensor [2] on `device` of a seed and an offset (a CUDA graph that
            advances it replays with fresh noise); None draws both from the device's generator.
        offset: index of the first normal in the seed's stream; the tensor's offset is added.
        dtype: float32, bfloat16, float16 or float64.
        device: of the result; None is torch's default.

    Returns:
        A contiguous tensor; element i (row-major) is normal offset + i of the stream.

    Raises:
        TypeError: dtype, or the seed's type or dtype. ValueError: shape, offset, seed's shape,
            device or range.

    Philox4x32-10 (Salmon et al. 2011), Box-Muller in cuRAND's order.
    """
    op = "philox_normal"
    shape = _checks.shape(op, "shape", shape)
    if dtype not in _checks.FLOATING:
        _checks.fail(op, "dtype", "float32, bfloat16, float16 or float64", dtype, TypeError)
    # A tensor of one element that stands for one of `shape`, as dispatch needs a tensor.
    like = torch.empty((), dtype=dtype, device=device).expand(shape)
    state, seed, offset = seed_of(op, seed, offset, like.device)
    return _ops.philox_normal(like, state, seed, offset)


def _add_noise_shard(
    x: Tensor, t: Tensor, seed: Seed = None, *, offset: int = 0, shard: Shard | None = None
) -> tuple[Tensor, Tensor]:
    op = "add_noise"
    _checks.tensor(op, "x", x, range(1, 65))
    t = _check_t(op, t, x, (x.shape[0],))
    state, seed, offset = seed_of(op, seed, offset, x.device, shard)
    if shard is not None:
        offset += shard.start * math.prod(x.shape[1:])
    x = dense(x)
    if not differentiable(x, t):
        return _ops.add_noise(x, t, state, seed, offset)
    return _AddNoise.apply(x, t, state, seed, offset)


@operator(
    reference=add_noise_ref,
    raw=("add_noise",),
    cost=lambda x, t, *_, **__: 3 * pyramids.nbytes(x) + pyramids.nbytes(t),
    on_shard=_add_noise_shard,
)
def add_noise(x: Tensor, t: Tensor, seed: Seed = None, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Flow matching's input and target: x_t = (1 - t) x + t eps and v = eps - x.

    Args:
        x: data [N, ...]; float32, bfloat16, float16 or float64; contiguous or channels_last.
        t: noise levels [N] in [0, 1], floating; 1 is pure noise. The range is checked on the CPU.
        seed, offset: as `philox_normal`; None draws them. eps has x's shape.

    Returns:
        (x_t, v), like x.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, t outside [0, 1].

    Gradients of x and t; nothing of the noise is stored. DFM (arXiv 2506.19839) §2.
    """
    return _add_noise_shard(x, t, seed, offset=offset)


def pyramid_add_noise_shard(
    x: Tensor,
    t: Tensor,
    seed: Seed = None,
    *,
    offset: int = 0,
    num_levels: int = 2,
    filter: str = "bilinear",
    factor: int | Sequence[int] = 2,
    active: Sequence[bool] | Tensor | None = None,
    targets: bool = True,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    shard: Shard | None = None,
) -> tuple[Levels, Levels | None]:
    op = "pyramid_add_noise"
    _checks.tensor(op, "x", x, (4, 5))
    num_levels = _checks.integer(op, "num_levels", num_levels, 1)
    factor = check_decomposition(op, x, num_levels, filter, factor)
    t = _check_t(op, t, x, (x.shape[0], num_levels))
    check_active(op, active, x, num_levels)
    gains = check_std(op, std, num_levels)
    dtype = dtype or x.dtype
    if dtype not in _checks.FLOATING:
        _checks.fail(op, "dtype", "float32, bfloat16, float16 or float64", dtype, TypeError)
    state, seed, offset = seed_of(op, seed, offset, x.device, shard)
    offsets = level_offsets(level_shapes(x.shape, num_levels, filter, factor), offset, shard)
    wanted, mask = wanted_levels(active, num_levels)
    x, options = dense(x), (filter, factor, gains, targets, dtype)
    arguments = x, t, mask, wanted, state, seed, offsets
    if differentiable(x, t):
        out = _PyramidAddNoise.apply(*arguments, options)
    else:
        out = _ops.pyramid_add_noise(*arguments, *options)
    return _unpack(out, wanted, targets)


def _pyramid_cost(
    x: Tensor,
    t: Tensor,
    *_: Any,
    num_levels: int = 2,
    filter: str = "bilinear",
    factor: int | Sequence[int] = 2,
    active: Any = None,
    targets: bool = True,
    dtype: torch.dtype | None = None,
    **__: Any,
) -> int:
    per_axis = pyramids.check_factor("pyramid_add_noise", factor, x.ndim - 2)
    wanted, mask = wanted_levels(active, num_levels)
    shapes = level_shapes(x.shape, num_levels, filter, per_axis)
    out = sum(math.prod(s) for s, w in zip(shapes, wanted, strict=True) if w)
    read = pyramids.nbytes(x, t, *([] if mask is None else [mask]))
    return read + (1 + targets) * out * (dtype or x.dtype).itemsize


@operator(
    reference=pyramid_add_noise_ref,
    raw=("pyramid_add_noise",),
    cost=_pyramid_cost,
    on_shard=pyramid_add_noise_shard,
)
def pyramid_add_noise(
    x: Tensor,
    t: Tensor,
    seed: Seed = None,
    *,
    offset: int = 0,
    num_levels: int = 2,
    filter: str = "bilinear",
    factor: int | Sequence[int] = 2,
    active: Sequence[bool] | Tensor | None = None,
    targets: bool = True,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Levels, Levels | None]:
    """Pyramid, noise and targets of all levels: what one step of DFM training feeds the model.

    Equal to `add_noise` of every level of `laplacian_build(x)` (or of `haar_build`), level s with
    t[:, s] and its own part of the seed's stream.

    Args:
        x: data [N, C, H, W] or [N, C, T, H, W].
        t: noise levels [N, L] in [0, 1] (1 is pure noise; checked on the CPU only).
        seed, offset: as `philox_normal`; None draws them.
        num_levels, filter, factor: as `laplacian_build`; also filter "haar", for images.
        active: None (all), L bools (a level that is False is not computed and comes out as None),
            or a bool tensor [N, L] (a sample's level that is False comes out as zeros).
        targets: False leaves out v.
        std: L numbers that the levels are divided by before the noise, None for none.
        dtype: of the results; x's by default.

    Returns:
        (levels of x_t, levels of v), lists of L, coarse to fine; v is None without targets.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, t outside [0, 1], lengths, filter, factor.

    Gradients of x and t. DFM (arXiv 2506.19839) §3.
    """
    return pyramid_add_noise_shard(
        x, t, seed, offset=offset, num_levels=num_levels, filter=filter, factor=factor,
        active=active, targets=targets, std=std, dtype=dtype,
    )  # fmt: skip
