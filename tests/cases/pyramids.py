import torch
from helpers import Bad, Case, Shape

from dfm_fast.ops.pyramids import level_sizes

# name: (shape of x, levels, filter, factor)
LAPLACIAN = {
    "nearest": ((2, 3, 16, 24), 3, "nearest", (2, 2)),
    "nearest-4-levels": ((1, 2, 64, 32), 4, "nearest", (2, 2)),
    "bilinear": ((2, 3, 16, 24), 3, "bilinear", (2, 2)),
    "bilinear-smallest": ((3, 1, 2, 2), 2, "bilinear", (2, 2)),
    "bilinear-to-one-pixel": ((2, 4, 2, 2), 2, "bilinear", (2, 2)),
    "bilinear-narrow": ((2, 5, 32, 2), 2, "bilinear", (2, 2)),
    "bilinear-tiles": ((1, 2, 72, 136), 3, "bilinear", (2, 2)),
    "bilinear-whole-vectors": ((2, 2, 10, 64), 2, "bilinear", (2, 2)),
    "bilinear-bands": ((1, 1, 264, 192), 2, "bilinear", (2, 2)),
    "nearest-bands": ((1, 1, 264, 160), 2, "nearest", (2, 2)),
    "bilinear-factor-4": ((2, 2, 16, 32), 2, "bilinear", (4, 4)),
    "bilinear-one-axis": ((2, 2, 7, 16), 3, "bilinear", (1, 2)),
    "binomial": ((2, 3, 16, 24), 3, "binomial", (2, 2)),
    "binomial-odd": ((2, 2, 17, 23), 4, "binomial", (2, 2)),
    "binomial-smallest": ((2, 2, 2, 3), 2, "binomial", (2, 2)),
    "binomial-tiles": ((1, 1, 75, 150), 2, "binomial", (2, 2)),
    "binomial-whole-vectors": ((1, 2, 12, 128), 3, "binomial", (2, 2)),
    "binomial-factor-4": ((1, 2, 13, 18), 2, "binomial", (4, 4)),
    "dct": ((2, 2, 32, 16), 2, "dct", (2, 2)),
    "dct-3-levels": ((1, 3, 16, 48), 2, "dct", (4, 2)),
    "video": ((2, 2, 4, 8, 8), 2, "bilinear", (2, 2, 2)),
    "video-frames": ((1, 3, 3, 8, 12), 3, "bilinear", (1, 2, 2)),
    "video-binomial": ((1, 2, 5, 6, 7), 2, "binomial", (2, 2, 2)),
    "video-mixed": ((1, 2, 4, 8, 16), 2, "nearest", (1, 2, 4)),
}
HAAR = {
    "haar": ((2, 3, 16, 24), 3),
    "haar-smallest": ((3, 1, 2, 2), 2),
    "haar-to-one-pixel": ((2, 4, 4, 4), 3),
    "haar-tiles": ((1, 2, 72, 136), 4),
}


def _levels(shape: tuple, levels: int, factor: tuple) -> list[Shape]:
    return [Shape((*shape[:2], *s)) for s in level_sizes(shape[2:], levels, factor)]


def _cases():
    for name, (shape, levels, filter, factor) in LAPLACIAN.items():
        kwargs = {"filter": filter, "factor": factor}
        compiled = {"bilinear": "inductor", "video": "aot_eager"}.get(name, "")
        x = Shape(shape)
        # A pass of "dct" sums 8 terms with weights of absolute sum 1.6: up to 8 eps/2 * 1.6, four
        # passes and more a level. The other filters sum 2 to 5 terms of one sign.
        dct = 12.0 if filter == "dct" else 0.0
        yield Case("laplacian_build", f"build-{name}", (x, levels), kwargs, 4.0 + dct, compiled)
        parts = _levels(shape, levels, factor)
        # A sum over the levels: its own magnitude, and so its error, grows with their number.
        cap = 2.0 + levels + dct
        yield Case("laplacian_collapse", f"collapse-{name}", (parts,), kwargs, cap, compiled)
    for name, (shape, levels) in HAAR.items():
        compiled = "inductor" if name == "haar" else ""
        yield Case("haar_build", f"build-{name}", (Shape(shape), levels), compiled=compiled)
        coarse, *sizes = (s.sizes for s in _levels(shape, levels, (2, 2))[:-1])
        n, c = shape[:2]
        details = [Shape((n, 3 * c, *s[2:])) for s in (coarse, *sizes)]
        inputs = ([Shape(coarse), *details],)
        yield Case("haar_collapse", f"collapse-{name}", inputs, compiled=compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _pair(h: int = 4) -> list[torch.Tensor]:
    return [_x(1, 1, h // 2, 4), _x(1, 1, h, 8)]


BAD = [
    Bad("laplacian_build", "x", TypeError, lambda f: f([1.0])),
    Bad("laplacian_build", "x", TypeError, lambda f: f(_x(1, 1, 4, 4, dtype=torch.int64))),
    Bad("laplacian_build", "x", TypeError, lambda f: f(_x(1, 1, 4, 4).to_sparse())),
    Bad("laplacian_build", "x", ValueError, lambda f: f(_x(4, 4))),
    Bad("laplacian_build", "x", ValueError, lambda f: f(_x(1, 1, 5, 4))),
    Bad("laplacian_build", "x", ValueError, lambda f: f(_x(1, 1, 4, 4), 4)),
    Bad("laplacian_build", "x", ValueError, lambda f: f(_x(1, 1, 0, 4))),
    Bad("laplacian_build", "x", ValueError, lambda f: f(_x(1, 1, 12, 16), filter="dct")),
    Bad("laplacian_build", "x", ValueError, lambda f: f(_x(1, 1, 3, 2), 4, filter="binomial")),
    Bad("laplacian_build", "x", ValueError, lambda f: f(_x(1, 1, 6, 8), factor=4)),
    Bad("laplacian_build", "num_levels", ValueError, lambda f: f(_x(1, 1, 4, 4), -1)),
    Bad("laplacian_build", "num_levels", ValueError, lambda f: f(_x(1, 1, 4, 4), 0)),
    Bad("laplacian_build", "num_levels", TypeError, lambda f: f(_x(1, 1, 4, 4), 2.0)),
    Bad("laplacian_build", "num_levels", TypeError, lambda f: f(_x(1, 1, 4, 4), True)),
    Bad("laplacian_build", "filter", ValueError, lambda f: f(_x(1, 1, 4, 4), filter="lanczos")),
    Bad("laplacian_build", "filter", ValueError, lambda f: f(_x(1, 1, 4, 4), filter=None)),
    Bad("laplacian_build", "factor", ValueError, lambda f: f(_x(1, 1, 4, 4), factor=3)),
    Bad("laplacian_build", "factor", ValueError, lambda f: f(_x(1, 1, 4, 4), factor=(1, 1))),
    Bad("laplacian_build", "factor", ValueError, lambda f: f(_x(1, 1, 4, 4), factor=(2, 2, 2))),
    Bad("laplacian_build", "factor", TypeError, lambda f: f(_x(1, 1, 4, 4), factor=2.0)),
    Bad("laplacian_build", "factor", TypeError, lambda f: f(_x(1, 1, 4, 4), factor="22")),
    Bad("laplacian_collapse", "levels", TypeError, lambda f: f(_x(1, 1, 4, 4))),
    Bad("laplacian_collapse", "levels", ValueError, lambda f: f([])),
    Bad("laplacian_collapse", "levels[0]", TypeError, lambda f: f([None, _x(1, 1, 4, 4)])),
    Bad("laplacian_collapse", "levels[0]", ValueError, lambda f: f([_x(1, 1, 4, 4)] * 2)),
    Bad(
        "laplacian_collapse", "levels[1]", ValueError, lambda f: f([_x(1, 1, 2, 4), _x(1, 1, 3, 8)])
    ),
    Bad("laplacian_collapse", "levels[1]", TypeError, lambda f: f([_pair()[0], _pair()[1].half()])),
    Bad(
        "laplacian_collapse",
        "levels[1]",
        ValueError,
        lambda f: f([_pair()[0], _pair()[1].to("meta")]),
    ),
    Bad("laplacian_collapse", "levels[0]", ValueError, lambda f: f([_pair()[0], *_pair()])),
    Bad(
        "laplacian_collapse",
        "levels[1]",
        ValueError,
        lambda f: f([_pair()[0], _x(1, 1, 4, 4), _x(1, 1, 8, 16)]),
    ),
    Bad("laplacian_collapse", "filter", ValueError, lambda f: f(_pair(), filter="box")),
    Bad("laplacian_collapse", "factor", ValueError, lambda f: f(_pair(), factor=())),
    Bad("haar_build", "x", ValueError, lambda f: f(_x(1, 1, 2, 4, 4))),
    Bad("haar_build", "x", ValueError, lambda f: f(_x(1, 1, 6, 4), 3)),
    Bad("haar_build", "num_levels", ValueError, lambda f: f(_x(1, 1, 4, 4), -2)),
    Bad("haar_collapse", "levels", TypeError, lambda f: f("levels")),
    Bad("haar_collapse", "levels", ValueError, lambda f: f(())),
    Bad("haar_collapse", "levels[1]", ValueError, lambda f: f([_x(1, 1, 2, 2), _x(1, 1, 2, 2)])),
    Bad(
        "haar_collapse",
        "levels[2]",
        ValueError,
        lambda f: f([_x(1, 1, 2, 2), *[_x(1, 3, 2, 2)] * 2]),
    ),
    Bad(
        "haar_collapse", "levels[1]", TypeError, lambda f: f([_x(1, 1, 2, 2), _x(1, 3, 2, 2).int()])
    ),
]
