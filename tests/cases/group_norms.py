import torch
from helpers import Bad, Case, Shape

from dfm_fast.ops import ChannelStatistics

# name: (shape of x, num_groups, of weight, bias and shift those given, other arguments)
NORMS = {
    "time": ((2, 24, 6, 8), 4, "wbs", {}),
    "wide": ((1, 1408, 4, 4), 32, "wb", {}),
    "odd": ((3, 72, 7, 5), 8, "wbs", {"eps": 1e-3}),
    "pixel": ((2, 32, 1, 1), 8, "wbs", {}),
    "video": ((1, 12, 3, 4, 5), 3, "wbs", {}),
    "plain": ((2, 8, 9, 11), 2, "", {}),
    "linear": ((2, 20, 5, 3), 5, "wbs", {"activation": "none"}),
    "weight": ((1, 6, 40), 1, "w", {}),
    "large": ((1, 34, 37, 41), 17, "bs", {}),
}


def _cases():
    for name, (shape, groups, given, kwargs) in NORMS.items():
        channels = Shape(shape[1:2], batched=False)
        small = [channels if v in given else None for v in "wb"]
        small.append(Shape(shape[:2]) if "s" in given else None)
        compiled = "inductor" if name == "time" else ""
        inputs = (Shape(shape), groups, *small)
        # Gradients of weight, bias and shift are sums over pixels, whose terms are of size one.
        yield Case("group_norm_silu", name, inputs, kwargs, 64.0, compiled)
    for name in ("time", "wide", "odd", "video", "weight", "large"):
        compiled = "aot_eager" if name == "time" else ""
        yield Case("channel_statistics", name, (Shape(NORMS[name][0]),), {}, 16.0, compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _norm(**changes):
    values = {"x": _x(2, 6, 3, 3), "num_groups": 3, **changes}
    return lambda f: f(**values)


def _given(**changes):
    values = {"count": 9, "mean": _x(2, 6), "m2": _x(2, 6), **changes}
    return _norm(statistics=ChannelStatistics(**values))


def _bad(argument, error, *calls, op="group_norm_silu"):
    return [Bad(op, argument, error, call) for call in calls]


BAD = [
    *_bad("x", TypeError, _norm(x=[1.0]), _norm(x=_x(2, 6, 3).int())),
    *_bad("x", ValueError, _norm(x=_x(6)), _norm(x=_x(2, 6, 0, 3))),
    *_bad("num_groups", TypeError, _norm(num_groups=2.0)),
    *_bad("num_groups", ValueError, _norm(num_groups=4), _norm(num_groups=0)),
    *_bad("weight", ValueError, _norm(weight=_x(5)), _norm(weight=_x(1, 6))),
    *_bad("weight", ValueError, _norm(weight=_x(6).to("meta"))),
    *_bad("weight", TypeError, _norm(weight=1.0), _norm(weight=_x(6).int())),
    *_bad("bias", ValueError, _norm(bias=_x(5))),
    *_bad("shift", ValueError, _norm(shift=_x(6)), _norm(shift=_x(1, 6))),
    *_bad("activation", ValueError, _norm(activation="gelu")),
    *_bad("statistics", TypeError, _norm(statistics=(9, _x(2, 6), _x(2, 6)))),
    *_bad("statistics.count", ValueError, _given(count=8)),
    *_bad("statistics.mean", ValueError, _given(mean=_x(1, 6))),
    *_bad("statistics.mean", TypeError, _given(mean=_x(2, 6).half())),
    *_bad("statistics.m2", ValueError, _given(m2=_x(2, 3))),
    *_bad("x", TypeError, lambda f: f(None), op="channel_statistics"),
    *_bad("x", ValueError, lambda f: f(_x(3)), op="channel_statistics"),
    *_bad("x", ValueError, lambda f: f(_x(3, 2, 0)), op="channel_statistics"),
]
