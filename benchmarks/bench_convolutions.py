"""Depthwise convolutions: rows only; the measuring is in harness.py.

Least bytes: x read once and y written once (2 elements; with the norm too, whose statistics are
given); a training row 5: x and dy are read again, dx is written. `other layout` is torch's own
convolution, of the same map laid out the other way: nobody has to take the slower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dfm_fast
from benchmarks.harness import Rival, Row
from benchmarks.shapes import MAPS
from dfm_fast.ops import convolutions

F32, BF16 = torch.float32, torch.bfloat16
GROUPS = 32
LAYOUTS = ("contiguous", "channels_last")


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])


def written_out(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    return conv2d(F.silu(F.group_norm(x, GROUPS, norm_weight, norm_bias)), weight)


def prepare_other_layout(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    last = x.is_contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)
    return lambda: conv2d(x, weight)


def least_bytes(name: str, direction: str, kernel: int, dtype: torch.dtype) -> int:
    elements = math.prod(MAPS[name]) * (5 if direction == "training" else 2)
    return (elements + MAPS[name][1] * kernel**2) * dtype.itemsize


def plain_row(
    name: str,
    layout: str,
    dtype: torch.dtype = F32,
    kernel: int = 3,
    direction: str = "forward",
    **options: Any,
) -> Row:
    shape = MAPS[name]
    return Row(
        op="depthwise_conv2d",
        variant=f"{kernel}x{kernel}",
        case=name,
        shapes=(shape, (shape[1], 1, kernel, kernel)),
        ours=dfm_fast.depthwise_conv2d,
        reference=convolutions.depthwise_conv2d_ref,
        least_bytes=least_bytes(name, direction, kernel, dtype),
        eager=conv2d,
        compiled={"conv2d": conv2d},
        rivals={"other layout": Rival(prepare_other_layout)} if direction == "forward" else {},
        dtype=dtype,
        layout=layout,
        direction=direction,
        **options,
    )


def with_given_statistics() -> Callable[..., Tensor]:
    """Taken once for each map, as its producer hands them on."""
    cache: dict[Any, Any] = {}

    def ours(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
        key = x.data_ptr(), x.dtype
        if key not in cache:
            cache[key] = dfm_fast.channel_statistics(x.detach())
        return dfm_fast.norm_silu_depthwise_conv2d(
            x, cache[key], norm_weight, norm_bias, weight, num_groups=GROUPS
        )

    return ours


def own_statistics(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    return dfm_fast.norm_silu_depthwise_conv2d(
        x, None, norm_weight, norm_bias, weight, num_groups=GROUPS
    )


def reference(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    return convolutions.norm_silu_depthwise_conv2d_ref(
        x, None, norm_weight, norm_bias, weight, num_groups=GROUPS
    )


def norm_row(
    name: str,
    layout: str,
    dtype: torch.dtype = F32,
    given: bool = True,
    direction: str = "forward",
    **options: Any,
) -> Row:
    shape = MAPS[name]
    return Row(
        op="norm_silu_depthwise_conv2d",
        variant="given" if given else "taken",
        case=name,
        shapes=(shape, *[shape[1:2]] * 2, (shape[1], 1, 3, 3)),
        ours=with_given_statistics() if given else own_statistics,
        reference=reference,
        least_bytes=least_bytes(name, direction, 3, dtype),
        eager=written_out,
        compiled={"written out": written_out},
        dtype=dtype,
        layout=layout,
        direction=direction,
        **options,
    )


def rows() -> Iterator[Row]:
    for row in (plain_row, norm_row):
        for layout in LAYOUTS:
            yield row("unet_256_64", layout, quick=True)
    for row in (plain_row, norm_row):
        for layout in LAYOUTS:
            yield row("unet_256_64", layout, BF16)
            for dtype in (F32, BF16):
                for name in ("unet_256_64", "unet_512_32", "unet_896_16"):
                    yield row(name, layout, dtype, direction="training")
            for name in ("unet_512_32", "unet_896_16", "unet_1792_16"):
                yield row(name, layout)
                yield row(name, layout, BF16)
            for name in ("unet_256_128", "unet_512_64", "unet_896_32", "unet_1792_32"):
                yield row(name, layout, BF16)
                yield row(name, layout, BF16, direction="training", device="cuda")
            yield row("maps_past_l2", layout, BF16, device="cuda", quick=True)
    for layout in LAYOUTS:
        yield norm_row("unet_256_64", layout, given=False)
        for kernel in (5, 7):
            yield plain_row("unet_256_64", layout, kernel=kernel)


ROWS = {r.id: r for r in rows()}


@pytest.mark.parametrize("row", [pytest.param(r, id=r.id) for r in ROWS.values()])
def test_convolutions(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
