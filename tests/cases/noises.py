import torch
from helpers import Bad, Case, Shape

from dfm_fast.ops._scales import level_shapes

# float64 takes its uniforms in float64. Between the two streams lies one rounding of u to float32,
# 2^-25 near 1, and sqrt(-2 ln u) makes sqrt(2 2^-25) = 2.4e-4 of it where u is that close to 1:
# 2050 eps. The comparison of normals of one dtype, which has no such term, is in test_noises.py.
CAP = 2050.0

# name: (shape of x, other arguments). Several samples, as the gradient of t has one number of each
# and level: the reference's own error, the yardstick, can be small by chance where they are few.
PYRAMIDS = {
    "bilinear": ((2, 3, 16, 24), 3, {}),
    "whole-vectors": ((2, 2, 10, 64), 2, {}),
    "coarse-only": ((3, 2, 8, 8), 2, {"active": [True, False]}),
    "fine-only": ((3, 2, 8, 8), 3, {"active": [False, False, True]}),
    "one-level": ((2, 3, 5, 7), 1, {}),
    "standardised": ((2, 2, 8, 12), 2, {"std": [0.5, 0.125]}),
    "binomial-odd": ((3, 2, 17, 23), 3, {"filter": "binomial"}),
    "factor-4": ((2, 2, 16, 32), 2, {"factor": (4, 4)}),
    "video": ((3, 2, 3, 8, 12), 2, {"factor": (1, 2, 2)}),
    "haar": ((2, 3, 16, 24), 3, {"filter": "haar"}),
    "dct": ((2, 2, 16, 16), 2, {"filter": "dct"}),
}
SEED = 20240229


def _cases():
    for name, shape, seed, offset in (
        ("vector", (1003,), SEED, 0),
        ("unaligned", (3, 5, 7), -1, 6),
        ("far", (130,), (1 << 64) - 5, (1 << 62) + 1),
        ("empty", (0, 4), SEED, 0),
    ):
        kwargs = {"seed": seed, "offset": offset}
        compiled = "inductor" if name == "unaligned" else ""
        yield Case("philox_normal", f"normal-{name}", (shape,), kwargs, CAP, compiled)
    for name, shape, offset in (
        ("latents", (3, 4, 8, 12), 0),
        ("odd", (3, 2, 5, 7), 3),
        ("video", (2, 3, 2, 4, 6), 8),
        ("vectors", (4, 33), 0),
        ("samples", (5,), 1),
    ):
        kwargs = {"seed": SEED, "offset": offset}
        compiled = "inductor" if name == "latents" else ""
        inputs = Shape(shape), Shape(shape[:1], uniform=True)
        yield Case("add_noise", f"noise-{name}", inputs, kwargs, CAP, compiled)
    for name, (shape, levels, options) in PYRAMIDS.items():
        compiled = {"bilinear": "inductor", "haar": "aot_eager"}.get(name, "")
        factor = options.get("factor", (2,) * (len(shape) - 2))
        options = {"seed": SEED, "factor": factor, **options}
        inputs = Shape(shape), Shape((shape[0], levels), uniform=True)
        # The error of level s is relative to its own magnitude, which std divides.
        cap = CAP * 8 if "std" in options else CAP
        kwargs = {**options, "num_levels": levels}
        yield Case("pyramid_add_noise", f"noise-{name}", inputs, kwargs, cap, compiled)
        shapes = level_shapes(shape, levels, options.get("filter", "bilinear"), factor)
        active = options.get("active", [True] * levels)
        parts = [Shape(s) if a else None for s, a in zip(shapes, active, strict=True)]
        kwargs = {k: v for k, v in options.items() if k != "active"}
        yield Case("velocity_loss", f"loss-{name}", (parts, Shape(shape)), kwargs, cap, compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _noise(**changes):
    values = {"x": _x(2, 1, 4, 4), "t": _x(2), "seed": 0, **changes}
    return lambda f: f(**values)


def _pyramid(**changes):
    return _noise(**{"t": _x(2, 2), **changes})


def _loss(**changes):
    predictions = [_x(2, 1, 2, 2), _x(2, 1, 4, 4)]
    values = {"predictions": predictions, "x": _x(2, 1, 4, 4), "seed": 0, **changes}
    return lambda f: f(**values)


def _bad(name, argument, error, *calls):
    return [Bad(name, argument, error, call) for call in calls]


BAD = [
    *_bad("philox_normal", "shape", TypeError, lambda f: f("12", 0), lambda f: f((2.0,), 0)),
    *_bad("philox_normal", "shape", ValueError, lambda f: f((2, -1), 0)),
    *_bad("philox_normal", "seed", TypeError, lambda f: f((2,), 0.5), lambda f: f((2,), True)),
    *_bad("philox_normal", "seed", TypeError, lambda f: f((2,), torch.zeros(2))),
    *_bad("philox_normal", "seed", ValueError, lambda f: f((2,), 1 << 64)),
    *_bad("philox_normal", "seed", ValueError, lambda f: f((2,), torch.tensor(3))),
    *_bad(
        "philox_normal",
        "seed",
        ValueError,
        lambda f: f((2,), torch.empty(2, dtype=torch.int64, device="meta")),
    ),
    *_bad("philox_normal", "offset", ValueError, lambda f: f((2,), 0, offset=-4)),
    *_bad("philox_normal", "offset", TypeError, lambda f: f((2,), 0, offset=0.5)),
    *_bad("philox_normal", "dtype", TypeError, lambda f: f((2,), 0, dtype=torch.int32)),
    *_bad("add_noise", "x", TypeError, _noise(x=3.0), _noise(x=_x(2, 4, dtype=torch.int32))),
    *_bad("add_noise", "x", ValueError, _noise(x=_x())),
    *_bad("add_noise", "t", TypeError, _noise(t=0.5), _noise(t=_x(2, dtype=torch.int64))),
    *_bad("add_noise", "t", ValueError, _noise(t=_x(3)), _noise(t=_x(2, 1)), _noise(t=_x(2) + 1.5)),
    *_bad("add_noise", "t", ValueError, _noise(t=_x(2) - 0.1), _noise(t=_x(2) * float("nan"))),
    *_bad("add_noise", "t", ValueError, _noise(t=_x(2).to("meta"))),
    *_bad("add_noise", "seed", TypeError, _noise(seed="0")),
    *_bad("pyramid_add_noise", "x", ValueError, _pyramid(x=_x(2, 4))),
    *_bad("pyramid_add_noise", "x", ValueError, _pyramid(x=_x(2, 1, 5, 4))),
    *_bad("pyramid_add_noise", "x", ValueError, _pyramid(x=_x(2, 1, 2, 4, 4), filter="haar")),
    *_bad("pyramid_add_noise", "t", ValueError, _pyramid(t=_x(2)), _pyramid(t=_x(2, 3))),
    *_bad("pyramid_add_noise", "t", ValueError, _pyramid(t=_x(2, 2) + 2)),
    *_bad("pyramid_add_noise", "num_levels", ValueError, _pyramid(num_levels=0)),
    *_bad("pyramid_add_noise", "filter", ValueError, _pyramid(filter="lanczos")),
    *_bad("pyramid_add_noise", "factor", ValueError, _pyramid(factor=3)),
    *_bad("pyramid_add_noise", "factor", ValueError, _pyramid(filter="haar", factor=4)),
    *_bad("pyramid_add_noise", "active", ValueError, _pyramid(active=[True])),
    *_bad("pyramid_add_noise", "active", TypeError, _pyramid(active=[1, 0]), _pyramid(active=True)),
    *_bad("pyramid_add_noise", "active", TypeError, _pyramid(active=_x(2, 2))),
    *_bad("pyramid_add_noise", "active", ValueError, _pyramid(active=_x(2, 3).bool())),
    *_bad("pyramid_add_noise", "std", ValueError, _pyramid(std=[1.0]), _pyramid(std=[1.0, 0.0])),
    *_bad("pyramid_add_noise", "std", TypeError, _pyramid(std=2.0)),
    *_bad("pyramid_add_noise", "dtype", TypeError, _pyramid(dtype=torch.int8)),
    *_bad("pyramid_add_noise", "seed", TypeError, _pyramid(seed=[0, 0])),
    *_bad("velocity_loss", "x", TypeError, _loss(x=None)),
    *_bad("velocity_loss", "predictions", TypeError, _loss(predictions=_x(2, 1, 4, 4))),
    *_bad("velocity_loss", "predictions", ValueError, _loss(predictions=[])),
    *_bad("velocity_loss", "predictions[0]", ValueError, _loss(predictions=[_x(2, 1, 4, 4)] * 2)),
    *_bad("velocity_loss", "predictions[1]", TypeError, _loss(predictions=[_x(2, 1, 2, 2), 1.0])),
    *_bad(
        "velocity_loss",
        "predictions[1]",
        TypeError,
        _loss(predictions=[_x(2, 1, 2, 2), None], active=[True, True]),
    ),
    *_bad(
        "velocity_loss",
        "predictions[0]",
        ValueError,
        _loss(predictions=[_x(2, 1, 2, 2).to("meta"), _x(2, 1, 4, 4)]),
    ),
    *_bad("velocity_loss", "seed", TypeError, _loss(seed=None)),
    *_bad("velocity_loss", "active", ValueError, _loss(active=[True])),
    *_bad("velocity_loss", "filter", ValueError, _loss(filter="box")),
]
