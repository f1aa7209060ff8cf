import torch
from helpers import Bad, Case, Shape

from dfm_fast.ops import ChannelStatistics

# name: (shape of x, outputs, side of the kernel, of bias, shift, residual, norm's weight (n) and
# bias (w) those given, num_groups)
CONVOLUTIONS = {
    "block_in": ((2, 32, 6, 8), 64, 3, "snw", 8),
    "block_out": ((2, 64, 6, 8), 32, 3, "rnw", 8),
    "everything": ((2, 24, 9, 7), 20, 3, "bsrnw", 4),
    "plain": ((2, 19, 5, 11), 7, 3, "", None),
    "five": ((1, 20, 10, 9), 33, 5, "b", None),
    "seven": ((1, 12, 8, 12), 16, 7, "sr", 3),
    "pixel": ((3, 8, 1, 1), 5, 3, "bsr", None),
    "bands": ((1, 40, 34, 21), 70, 3, "snw", 5),  # several bands and panels, with rests
}


def _cases():
    for name, (shape, outputs, kernel, given, groups) in CONVOLUTIONS.items():
        n, channels, height, width = shape
        small = {
            "b": Shape((outputs,), batched=False),
            "s": Shape((n, outputs)),
            "r": Shape((n, outputs, height, width)),
            "n": Shape((channels,), batched=False),
            "w": Shape((channels,), batched=False),
        }
        weights = (channels, 1, kernel, kernel), (outputs, channels, 1, 1)
        weights = [Shape(size, batched=False) for size in weights]
        epilogue = [v if key in given else None for key, v in small.items()]
        inputs = Shape(shape), *weights, *epilogue
        compiled = "inductor" if name == "everything" else ""
        kwargs = {"num_groups": groups}
        # Gradients of weights are sums over pixels, whose terms are of size one.
        yield Case("separable_conv2d", f"separable_{name}", inputs, kwargs, 64.0, compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _call(**changes):
    values = {
        "x": _x(2, 6, 4, 3),
        "depthwise_weight": _x(6, 1, 3, 3),
        "pointwise_weight": _x(5, 6, 1, 1),
        "num_groups": 3,
        **changes,
    }
    return lambda f: f(**values)


def _given(**changes):
    values = {"count": 12, "mean": _x(2, 6), "m2": _x(2, 6), **changes}
    return _call(statistics=ChannelStatistics(**values))


def _bad(argument, error, *calls):
    return [Bad("separable_conv2d", argument, error, call) for call in calls]


_W, _P = "depthwise_weight", "pointwise_weight"
BAD = [
    *_bad("x", TypeError, _call(x=None), _call(x=_x(2, 6, 4, 3).int())),
    *_bad("x", ValueError, _call(x=_x(6, 4, 3)), _call(x=_x(2, 6, 0, 3))),
    *_bad(_W, TypeError, _call(depthwise_weight=None)),
    *_bad(_W, ValueError, _call(depthwise_weight=_x(6, 1, 4, 4))),
    *_bad(_W, ValueError, _call(depthwise_weight=_x(5, 1, 3, 3))),
    *_bad(_P, TypeError, _call(pointwise_weight=1.0)),
    *_bad(_P, TypeError, _call(pointwise_weight=_x(5, 6, 1, 1).half())),
    *_bad(_P, ValueError, _call(pointwise_weight=_x(5, 6))),
    *_bad(_P, ValueError, _call(pointwise_weight=_x(5, 7, 1, 1))),
    *_bad(_P, ValueError, _call(pointwise_weight=_x(5, 6, 1, 1).to("meta"))),
    *_bad("bias", ValueError, _call(bias=_x(6)), _call(bias=_x(1, 5))),
    *_bad("shift", ValueError, _call(shift=_x(5)), _call(shift=_x(2, 6))),
    *_bad("residual", TypeError, _call(residual=_x(2, 5, 4, 3).half())),
    *_bad("residual", ValueError, _call(residual=_x(2, 6, 4, 3)), _call(residual=_x(2, 5))),
    *_bad("norm_weight", ValueError, _call(norm_weight=_x(5))),
    *_bad("norm_weight", ValueError, _call(norm_weight=_x(6), num_groups=None)),
    *_bad("norm_bias", ValueError, _call(norm_bias=_x(5))),
    *_bad("norm_bias", ValueError, _call(norm_bias=_x(6), num_groups=None)),
    *_bad("num_groups", TypeError, _call(num_groups=2.0)),
    *_bad("num_groups", ValueError, _call(num_groups=4), _call(num_groups=0)),
    *_bad("statistics", TypeError, _call(statistics=(12, _x(2, 6), _x(2, 6)))),
    *_bad("statistics.count", ValueError, _given(count=9)),
    *_bad("statistics.mean", ValueError, _given(mean=_x(1, 6))),
    *_bad("statistics.m2", TypeError, _given(m2=_x(2, 6).half())),
]
