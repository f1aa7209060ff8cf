"""What else computes pyramids: the forms people write in PyTorch, OpenCV, kornia, PyWavelets.

Every form is a pair (down, up) for one level: down(x) -> coarse, up(coarse) -> fine. `build` and
`collapse` make pyramids of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Rival

Step = Callable[[Tensor], Tensor]


_WEIGHTS: dict[tuple[str, torch.dtype, torch.device, int], Tensor] = {}


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Weights, made once per (dtype, device, size), as a module's buffers would be: no work in the
    compiled graph, and no copy from the host inside a CUDA graph."""

    def get(dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
        key = (make.__name__, dtype, device, size)
        if key not in _WEIGHTS:
            _WEIGHTS[key] = make(dtype, device, size)
        return _WEIGHTS[key]

    return get


class Form(NamedTuple):
    down: Step
    up: Step


def build(form: Form, num_levels: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        details = []
        for _ in range(num_levels - 1):
            coarse = form.down(x)
            details.append(x - form.up(coarse))
            x = coarse
        return x, *reversed(details)

    return run


def collapse(up: Step) -> Callable[..., Tensor]:
    def run(x: Tensor, *details: Tensor) -> Tensor:
        for detail in details:
            x = detail + up(x)
        return x

    return run


def forms(filter: str, factor: Sequence[int]) -> dict[str, Form]:
    """Forms of one filter by name; the first is what a user writes."""
    if filter == "binomial":
        return {
            "conv2d": Form(_binomial_conv_down, _binomial_conv_up),
            "slices": Form(_binomial_slices_down, _binomial_slices_up),
        }
    if filter == "dct":
        return {
            "einsum": Form(_dct_einsum_down, _dct_einsum_up),
            "matmul": Form(_dct_matmul_down, _dct_matmul_up),
        }
    pool, mean, interpolate = _pool(factor), _reshape_mean(factor), _interpolate(filter, factor)
    slices = _expand(factor) if filter == "nearest" else _lerp(factor)
    return {
        "avg_pool + interpolate": Form(pool, interpolate),
        "avg_pool + slices": Form(pool, slices),
        "reshape-mean + slices": Form(mean, slices),
    }


# --- nearest and bilinear -------------------------------------------------------------------------


def _pool(factor: Sequence[int]) -> Step:
    pool = F.avg_pool2d if len(factor) == 2 else F.avg_pool3d
    return lambda x: pool(x, tuple(factor))


def _reshape_mean(factor: Sequence[int]) -> Step:
    def down(x: Tensor) -> Tensor:
        split = [s for n, f in zip(x.shape[2:], factor, strict=True) for s in (n // f, f)]
        return x.reshape(*x.shape[:2], *split).mean(tuple(range(3, 2 * x.ndim - 2, 2)))

    return down


def _twice(factor: Sequence[int]) -> list[tuple[int, ...]]:
    """A factor as steps of at most 2: bilinear to 4x is two steps to 2x."""
    steps = [tuple(min(f, 2) for f in factor)]
    rest = tuple(math.ceil(f / 2) for f in factor)
    return steps if max(rest) == 1 else [*steps, *_twice(rest)]


def _interpolate(filter: str, factor: Sequence[int]) -> Step:
    linear = "bilinear" if len(factor) == 2 else "trilinear"
    options = {"mode": "nearest"} if filter == "nearest" else {"mode": linear}
    if filter != "nearest":
        options["align_corners"] = False

    def up(x: Tensor) -> Tensor:
        for step in _twice(factor):
            x = F.interpolate(x, scale_factor=step, **options)
        return x

    return up


def _expand(factor: Sequence[int]) -> Step:
    def up(x: Tensor) -> Tensor:
        for axis, f in enumerate(factor, 2):
            x = x.repeat_interleave(f, axis)
        return x

    return up


def _interleave(even: Tensor, odd: Tensor, axis: int) -> Tensor:
    return torch.stack((even, odd), axis + 1).flatten(axis, axis + 1)


def _lerp(factor: Sequence[int]) -> Step:
    """[1/4, 3/4] and [3/4, 1/4] of neighbours, edges clamped."""

    def up(x: Tensor) -> Tensor:
        for step in _twice(factor):
            for axis in (a for a, f in enumerate(step, 2) if f == 2):
                n = x.shape[axis]
                before = torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, n - 1)), axis)
                after = torch.cat((x.narrow(axis, 1, n - 1), x.narrow(axis, n - 1, 1)), axis)
                x = _interleave(0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after, axis)
        return x

    return up


# --- binomial -------------------------------------------------------------------------------------


@constant
def _binomial_kernel(dtype: torch.dtype, device: torch.device, channels: int) -> Tensor:
    row = torch.tensor([1, 4, 6, 4, 1], dtype=dtype, device=device) / 16
    return torch.outer(row, row).repeat(channels, 1, 1, 1)


def _pad_coarse(x: Tensor, axis: int) -> Tensor:
    """One more on each side: -1 is 1, n is n-1 (OpenCV's pyrUp)."""
    n = x.shape[axis]
    return torch.cat((x.narrow(axis, 1, 1), x, x.narrow(axis, n - 1, 1)), axis)


def _binomial_conv_down(x: Tensor) -> Tensor:
    kernel = _binomial_kernel(x.dtype, x.device, x.shape[1])
    return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), kernel, stride=2, groups=x.shape[1])


def _binomial_conv_up(x: Tensor) -> Tensor:
    kernel = 4 * _binomial_kernel(x.dtype, x.device, x.shape[1])
    options = {"stride": 2, "padding": 4, "output_padding": 1, "groups": x.shape[1]}
    return F.conv_transpose2d(_pad_coarse(_pad_coarse(x, 2), 3), kernel, **options)


def _binomial_slices_down(x: Tensor) -> Tensor:
    for axis, pad in ((3, (2, 2, 0, 0)), (2, (0, 0, 2, 2))):
        p, n = F.pad(x, pad, "reflect"), x.shape[axis]
        a, b, c, d, e = (p.narrow(axis, k, n) for k in range(5))
        y = (a + e + 4 * (b + d) + 6 * c) / 16
        x = y[..., ::2] if axis == 3 else y[..., ::2, :]
    return x


def _binomial_slices_up(x: Tensor) -> Tensor:
    for axis, n in ((2, x.shape[2]), (3, x.shape[3])):
        p = _pad_coarse(x, axis)
        before, after = p.narrow(axis, 0, n), p.narrow(axis, 2, n)
        x = _interleave((before + 6 * x + after) / 8, (x + after) / 2, axis)
    return x


# --- dct ------------------------------------------------------------------------------------------


@constant
def _dct_matrix(dtype: torch.dtype, device: torch.device, blocks: int) -> Tensor:
    """[4 blocks, 8 blocks]: 8-point DCT, low half, 4-point inverse, mean kept."""

    def basis(n: int) -> Tensor:
        k, m = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        scale = torch.where(k == 0, math.sqrt(1 / n), math.sqrt(2 / n))
        return scale * torch.cos(math.pi * (m + 0.5) * k / n)

    block = basis(4).T @ basis(8)[:4] / math.sqrt(2)
    return torch.block_diag(*[block] * blocks).to(device, dtype)


def _dct_einsum_down(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    m, blocks = _dct_matrix(x.dtype, x.device, 1), x.reshape(n, c, h // 8, 8, w // 8, 8)
    return torch.einsum("nchiwj,ai,bj->nchawb", blocks, m, m).reshape(n, c, h // 2, w // 2)


def _dct_einsum_up(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    m, blocks = 2 * _dct_matrix(x.dtype, x.device, 1), x.reshape(n, c, h // 4, 4, w // 4, 4)
    return torch.einsum("nchawb,ai,bj->nchiwj", blocks, m, m).reshape(n, c, 2 * h, 2 * w)


def _dct_matmul_down(x: Tensor) -> Tensor:
    rows, columns = (_dct_matrix(x.dtype, x.device, n // 8) for n in x.shape[2:])
    return rows @ x @ columns.T


def _dct_matmul_up(x: Tensor) -> Tensor:
    rows, columns = (_dct_matrix(x.dtype, x.device, n // 4) for n in x.shape[2:])
    return 4 * (rows.T @ x @ columns)


# --- haar -----------------------------------------------------------------------------------------


def _haar_slices_split(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x[:, :, 0::2, 0::2], x[:, :, 0::2, 1::2]
    c, d = x[:, :, 1::2, 0::2], x[:, :, 1::2, 1::2]
    bands = (a + b - c - d, a - b + c - d, a - b - c + d)
    return (a + b + c + d) / 2, torch.cat(bands, 1) / 2


def _haar_slices_merge(x: Tensor, detail: Tensor) -> Tensor:
    lh, hl, hh = detail.chunk(3, 1)
    top = _interleave(x + lh + hl + hh, x + lh - hl - hh, 3)
    bottom = _interleave(x - lh + hl - hh, x - lh - hl + hh, 3)
    return _interleave(top, bottom, 2) / 2


@constant
def _haar_kernel(dtype: torch.dtype, device: torch.device, channels: int) -> Tensor:
    """[4C, 1, 2, 2]: per channel the low-pass, LH, HL, HH."""
    bands = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
    kernel = torch.tensor(bands, dtype=dtype, device=device) / 2
    return kernel[:, None].repeat(channels, 1, 1, 1)


def _haar_conv_split(x: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    y = F.conv2d(x, _haar_kernel(x.dtype, x.device, c), stride=2, groups=c).view(
        n, c, 4, h // 2, w // 2
    )
    return y[:, :, 0], y[:, :, 1:].transpose(1, 2).reshape(n, 3 * c, h // 2, w // 2)


def _haar_conv_merge(x: Tensor, detail: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = torch.cat((x[:, None], detail.reshape(n, 3, c, h, w)), 1).transpose(1, 2)
    y = y.reshape(n, 4 * c, h, w)
    return F.conv_transpose2d(y, _haar_kernel(x.dtype, x.device, c), stride=2, groups=c)


def haar_build(split: Callable, num_levels: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        details = []
        for _ in range(num_levels - 1):
            x, detail = split(x)
            details.append(detail)
        return x, *reversed(details)

    return run


def haar_collapse(merge: Callable) -> Callable[..., Tensor]:
    def run(x: Tensor, *details: Tensor) -> Tensor:
        for detail in details:
            x = merge(x, detail)
        return x

    return run


HAAR_SPLITS = {"slices": _haar_slices_split, "conv2d": _haar_conv_split}
HAAR_MERGES = {"slices": _haar_slices_merge, "conv2d": _haar_conv_merge}


# --- Other libraries ------------------------------------------------------------------------------


def _images(x: Tensor) -> list[Any]:
    """[N, C, H, W] -> N arrays [H, W, C], which is what OpenCV takes."""
    return [image.permute(1, 2, 0).contiguous().numpy() for image in x]


def _from_images(images: Sequence[Any]) -> Tensor:
    import numpy as np

    stacked = torch.from_numpy(np.stack(images))
    return (stacked[..., None] if stacked.ndim == 3 else stacked).permute(0, 3, 1, 2)


def _opencv_build(num_levels: int) -> Rival:
    def prepare(x: Tensor) -> Callable[[], Any]:
        import cv2

        def one(image: Any) -> list[Any]:
            details = []
            for _ in range(num_levels - 1):
                coarse = cv2.pyrDown(image)
                height, width = image.shape[:2]
                details.append(cv2.subtract(image, cv2.pyrUp(coarse, dstsize=(width, height))))
                image = coarse
            return [image, *reversed(details)]

        images = _images(x)
        return lambda: [one(image) for image in images]

    def gather(pyramids: Any) -> list[Tensor]:
        return [_from_images(level) for level in zip(*pyramids, strict=True)]

    return Rival(prepare, gather, package="cv2", device="cpu")


def _opencv_collapse() -> Rival:
    def prepare(*levels: Tensor) -> Callable[[], Any]:
        import cv2

        def one(image: Any, *details: Any) -> Any:
            for detail in details:
                height, width = detail.shape[:2]
                image = cv2.add(detail, cv2.pyrUp(image, dstsize=(width, height)))
            return image

        pyramids = list(zip(*map(_images, levels), strict=True))
        return lambda: [one(*pyramid) for pyramid in pyramids]

    return Rival(prepare, _from_images, package="cv2", device="cpu")


def _kornia_build(num_levels: int) -> Rival:
    def prepare(x: Tensor) -> Callable[[], Any]:
        from kornia.geometry.transform import build_laplacian_pyramid

        return lambda: build_laplacian_pyramid(x, num_levels)

    return Rival(prepare, package="kornia", differs="half a pixel off: blurs, then interpolates")


def _pywavelets_build(num_levels: int) -> Rival:
    def prepare(x: Tensor) -> Callable[[], Any]:
        import pywt

        array = x.numpy()
        return lambda: pywt.wavedec2(array, "haar", level=num_levels - 1)

    def gather(bands: Any) -> list[Tensor]:
        low, *details = bands
        return [
            torch.from_numpy(low),
            *(torch.cat(list(map(torch.from_numpy, d)), 1) for d in details),
        ]

    return Rival(prepare, gather, package="pywt", device="cpu")


def _pywavelets_collapse() -> Rival:
    def prepare(low: Tensor, *details: Tensor) -> Callable[[], Any]:
        import pywt

        bands = [low.numpy(), *(tuple(b.numpy() for b in d.chunk(3, 1)) for d in details)]
        return lambda: pywt.waverec2(bands, "haar")

    return Rival(prepare, torch.from_numpy, package="pywt", device="cpu")


def libraries(op: str, variant: str, num_levels: int, plain: bool) -> dict[str, Rival | str]:
    """Other libraries for a row; `plain`: float32, forward."""
    if variant == "binomial":
        found = {
            "laplacian_build": {
                "opencv": _opencv_build(num_levels),
                "kornia": _kornia_build(num_levels),
            },
            "laplacian_collapse": {"opencv": _opencv_collapse(), "kornia": "has no collapse"},
        }[op]
    elif variant == "haar":
        build_, collapse_ = _pywavelets_build(num_levels), _pywavelets_collapse()
        found = {"pywavelets": build_ if op == "haar_build" else collapse_}
    else:
        return {}
    return found if plain else dict.fromkeys(found, "float32 forward only")
