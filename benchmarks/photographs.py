"""Pyramids of real photographs: `python -m benchmarks.photographs [--out DIR] [--device cuda]`.

Takes two photographs of scikit-learn and one of Matplotlib, and a latent with the spectrum of
natural images; builds and collapses a pyramid with every filter, in float32 and bfloat16; writes a
picture per photograph; and prints the largest reconstruction error against what the library
promises: one rounding per level. Exit code 1 where one is over.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dfm_fast
from dfm_fast.ops._filters import FILTERS

LEVELS = 4
MULTIPLE = 8 << (LEVELS - 2)  # "dct" halves multiples of 8 LEVELS - 1 times
SHOWN = "bilinear"
LIMIT = 200_000  # bytes of one picture
DTYPES = (torch.float32, torch.bfloat16)


class Missing(Exception):
    """A package of the photographs, said in one line."""


# --- Inputs ---------------------------------------------------------------------------------------


def photographs() -> dict[str, Tensor]:
    """Name -> [1, 3, H, W] float32 in [0, 1], cropped to sides every filter takes."""
    try:
        from matplotlib.cbook import get_sample_data
        from PIL import Image
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise Missing(f"expected scikit-learn, Matplotlib and Pillow: {error}") from error
    samples = load_sample_images()
    found = {Path(n).stem: a for n, a in zip(samples.filenames, samples.images, strict=True)}
    with get_sample_data("grace_hopper.jpg") as file:
        import numpy as np

        found["grace_hopper"] = np.asarray(Image.open(file).convert("RGB"))
    return {name: crop(torch.tensor(array)) for name, array in found.items()}


def crop(image: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> [1, 3, h, w] in [0, 1], the middle of it."""
    sizes = [n // MULTIPLE * MULTIPLE for n in image.shape[:2]]
    top, left = ((n - s) // 2 for n, s in zip(image.shape[:2], sizes, strict=True))
    middle = image[top : top + sizes[0], left : left + sizes[1]]
    return middle.permute(2, 0, 1)[None].float().div(255).contiguous()


def latent(shape: Sequence[int] = (8, 16, 128, 128)) -> Tensor:
    """Random, amplitude 1/frequency as in natural images, unit variance."""
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    fy, fx = torch.fft.fftfreq(shape[-2])[:, None], torch.fft.rfftfreq(shape[-1])
    amplitude = 1 / (fy**2 + fx**2).sqrt().clamp_min(1 / max(shape[-2:]))
    x = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=tuple(shape[-2:]))
    return (x / x.std()).contiguous()


# --- Build, collapse, compare ---------------------------------------------------------------------


def transforms() -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]]:
    """Filter -> (build, collapse)."""

    def laplacian(filter: str) -> tuple[Callable, Callable]:
        return (
            lambda x: dfm_fast.laplacian_build(x, LEVELS, filter=filter),
            lambda levels: dfm_fast.laplacian_collapse(levels, filter=filter),
        )

    haar = (lambda x: dfm_fast.haar_build(x, LEVELS), dfm_fast.haar_collapse)
    return {**{filter: laplacian(filter) for filter in FILTERS}, "haar": haar}


def reconstructions(inputs: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """One record per input, filter and dtype."""
    for name, image in inputs.items():
        for filter, (build, collapse) in transforms().items():
            for dtype in DTYPES:
                x = image.to(dtype)
                error = (collapse(build(x)).double() - x.double()).abs().max().item()
                # One rounding per level, at the largest magnitude there is.
                bound = LEVELS * torch.finfo(dtype).eps * x.double().abs().max().item()
                yield {
                    "input": name,
                    "filter": filter,
                    "dtype": str(dtype).removeprefix("torch."),
                    "error": f"{error:.2e}",
                    "bound": f"{bound:.2e}",
                    "verdict": "ok" if error <= bound else "OVER",  # NaN is over
                }


def print_table(records: Sequence[dict[str, Any]]) -> None:
    widths = {key: max(len(key), *(len(r[key]) for r in records)) for key in records[0]}
    for record in ({key: key for key in widths}, *records):
        print("  ".join(record[key].ljust(width) for key, width in widths.items()).rstrip())


def write_table(records: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


# --- Pictures -------------------------------------------------------------------------------------


def panels(image: Tensor) -> dict[str, Tensor]:
    """Title -> [3, h, w] in [0, 1]: coarse to fine, then the collapse."""
    levels = dfm_fast.laplacian_build(image, LEVELS, filter=SHOWN)
    shown = {f"coarse, {size(levels[0])}": levels[0]}
    for s, detail in enumerate(levels[1:], 2):
        shown[f"detail {s}, {size(detail)}"] = centred(detail)
    shown["collapse"] = dfm_fast.laplacian_collapse(levels, filter=SHOWN)
    return {title: x[0].float().clamp(0, 1).cpu() for title, x in shown.items()}


def size(x: Tensor) -> str:
    return f"{x.shape[-1]} x {x.shape[-2]}"


def centred(detail: Tensor) -> Tensor:
    """Zero at mid-grey, 99 % of the values within the range."""
    magnitude = detail.float().abs().flatten()
    scale = magnitude.kthvalue(round(0.99 * len(magnitude))).values.clamp_min(1e-6)
    return 0.5 + detail.float() / (2 * scale)


def picture(name: str, image: Tensor, path: Path) -> None:
    """All panels side by side, each enlarged to the same size, under the limit of bytes."""
    from matplotlib.figure import Figure
    from PIL import Image

    shown = panels(image)
    height, width = image.shape[-2:]
    figure = Figure(figsize=(3.2 * len(shown), 3.2 * height / width + 0.5), layout="constrained")
    for axes, (title, x) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        axes.imshow(x.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.suptitle(f"{name}: Laplacian pyramid, {SHOWN}, details around grey", fontsize=11)
    for dpi in (100, 85, 70, 55, 40):
        data = io.BytesIO()
        figure.savefig(data, dpi=dpi)
        # 96 colours: grain that nobody sees makes most of a PNG's bytes.
        small, out = Image.open(data).convert("RGB").quantize(96), io.BytesIO()
        small.save(out, "PNG", optimize=True)
        if out.tell() <= LIMIT:
            break
    path.write_bytes(out.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.photographs", description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "local" / "photographs"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        images = photographs()
    except Missing as error:
        print(f"photographs: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    images = {name: x.to(args.device) for name, x in images.items()}
    for name, image in images.items():
        picture(name, image, args.out / f"{name}.png")
    records = list(reconstructions({**images, "latent": latent().to(args.device)}))
    write_table(records, args.out / "reconstruction.csv")
    print_table(records)
    over = sum(record["verdict"] != "ok" for record in records)
    print(f"{len(records) - over} of {len(records)} within one rounding per level; {args.out}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
