import torch
from helpers import Bad, Case, Shape

from dfm_fast.ops import ChannelStatistics

# name: (shape of x, side of the kernel, with bias, other arguments)
CONVOLUTIONS = {
    "unet": ((2, 32, 9, 11), 3, False, {}),
    "odd": ((3, 37, 5, 7), 3, True, {}),
    "pixel": ((2, 19, 1, 1), 3, True, {}),
    "row": ((1, 20, 1, 18), 3, False, {}),
    "column": ((1, 5, 21, 1), 5, True, {}),
    "narrow": ((2, 16, 6, 2), 7, False, {}),
    "half": ((2, 24, 11, 13), 3, True, {"stride": 2}),
    "even": ((1, 33, 8, 12), 3, False, {"stride": 2, "padding": (0, 1)}),
    "five": ((2, 40, 10, 9), 5, True, {}),
    "five_half": ((1, 17, 12, 11), 5, False, {"stride": 2}),
    "seven": ((1, 18, 15, 17), 7, True, {"padding": (3, 2)}),
    "seven_half": ((1, 3, 16, 20), 7, False, {"stride": 2, "padding": 6}),
    "valid": ((2, 8, 12, 10), 3, False, {"padding": 0}),
    "full": ((1, 70, 4, 19), 3, False, {"padding": 2}),
    "wide": ((1, 2, 40, 133), 3, True, {}),
    "tall": ((1, 20, 70, 21), 3, False, {}),
    "vectors": ((2, 10, 18, 24), 3, True, {}),  # of columns, whole
}

# name: (shape of x, num_groups, side of the kernel, of weight, bias and shift those given, others)
NORMS = {
    "time": ((2, 24, 6, 8), 4, 3, "wbs", {}),
    "odd": ((3, 36, 7, 5), 9, 3, "wbs", {"eps": 1e-3}),
    "pixel": ((2, 96, 1, 1), 24, 3, "wbs", {}),
    "plain": ((2, 8, 9, 11), 2, 3, "", {}),
    "narrow": ((2, 72, 12, 2), 24, 5, "wb", {}),
    "half": ((2, 20, 11, 18), 5, 3, "b", {"stride": 2}),
    "seven": ((1, 18, 12, 20), 3, 7, "w", {"padding": (3, 1)}),
    "tall": ((1, 35, 66, 19), 7, 3, "wbs", {}),
    "vectors": ((2, 6, 19, 16), 3, 3, "wbs", {}),
}


def _cases():
    for name, (shape, kernel, bias, kwargs) in CONVOLUTIONS.items():
        weight = Shape((shape[1], 1, kernel, kernel), batched=False)
        small = [Shape(shape[1:2], batched=False)] if bias else []
        compiled = "inductor" if name == "odd" else ""
        # Gradients of weight and bias are sums over pixels, whose terms are of size one.
        inputs, name = (Shape(shape), weight, *small), f"depthwise_{name}"
        yield Case("depthwise_conv2d", name, inputs, kwargs, 64.0, compiled)
    for name, (shape, groups, kernel, given, kwargs) in NORMS.items():
        channels = Shape(shape[1:2], batched=False)
        small = [channels if v in given else None for v in "wb"]
        weight = Shape((shape[1], 1, kernel, kernel), batched=False)
        shift = Shape(shape[:2]) if "s" in given else None
        kwargs = {**kwargs, "num_groups": groups}
        compiled = "inductor" if name == "odd" else ""
        inputs, name = (Shape(shape), None, *small, weight, shift), f"norm_silu_depthwise_{name}"
        yield Case("norm_silu_depthwise_conv2d", name, inputs, kwargs, 64.0, compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _plain(**changes):
    values = {"x": _x(2, 6, 4, 5), "weight": _x(6, 1, 3, 3), **changes}
    return lambda f: f(**values)


def _norm(**changes):
    small = {"statistics": None, "norm_weight": _x(6), "norm_bias": _x(6), "num_groups": 3}
    return _plain(**small, **changes)


def _given(**changes):
    statistics = ChannelStatistics(**{"count": 20, "mean": _x(2, 6), "m2": _x(2, 6), **changes})
    return lambda f: _norm()(lambda **values: f(**{**values, "statistics": statistics}))


def _changed(**changes):
    return lambda f: _norm()(lambda **values: f(**{**values, **changes}))


def _bad(argument, error, *calls, op="depthwise_conv2d"):
    return [Bad(op, argument, error, call) for call in calls]


def _bad_norm(argument, error, *calls):
    return _bad(argument, error, *calls, op="norm_silu_depthwise_conv2d")


BAD = [
    *_bad("x", TypeError, _plain(x=[1.0]), _plain(x=_x(2, 6, 4, 5).int())),
    *_bad("x", ValueError, _plain(x=_x(6, 4, 5)), _plain(x=_x(2, 6, 0, 5))),
    *_bad("x", ValueError, _plain(x=_x(2, 0, 4, 5), weight=_x(0, 1, 3, 3))),
    *_bad("weight", TypeError, _plain(weight=None), _plain(weight=_x(6, 1, 3, 3).int())),
    *_bad("weight", ValueError, _plain(weight=_x(5, 1, 3, 3)), _plain(weight=_x(6, 1, 3, 5))),
    *_bad("weight", ValueError, _plain(weight=_x(6, 2, 3, 3)), _plain(weight=_x(6, 1, 9, 9))),
    *_bad("weight", ValueError, _plain(weight=_x(6, 1, 4, 4)), _plain(weight=_x(6, 3, 3))),
    *_bad("weight", ValueError, _plain(weight=_x(6, 1, 3, 3).to("meta"))),
    *_bad("bias", ValueError, _plain(bias=_x(5)), _plain(bias=_x(6).to("meta"))),
    *_bad("bias", TypeError, _plain(bias=1.0)),
    *_bad("stride", TypeError, _plain(stride=(1, 1)), _plain(stride=1.0)),
    *_bad("stride", ValueError, _plain(stride=0), _plain(stride=3)),
    *_bad("padding", TypeError, _plain(padding="same"), _plain(padding=1.0)),
    *_bad("padding", TypeError, _plain(padding=(1, 1.0))),
    *_bad("padding", ValueError, _plain(padding=-1), _plain(padding=3), _plain(padding=(1, 1, 1))),
    *_bad("padding", ValueError, _plain(x=_x(2, 6, 2, 5), padding=0)),
    *_bad_norm("x", TypeError, _changed(x=None)),
    *_bad_norm("x", ValueError, _changed(x=_x(6, 4, 5))),
    *_bad_norm("weight", ValueError, _changed(weight=_x(5, 1, 3, 3))),
    *_bad_norm("norm_weight", ValueError, _changed(norm_weight=_x(5))),
    *_bad_norm("norm_weight", TypeError, _changed(norm_weight=_x(6).int())),
    *_bad_norm("norm_bias", ValueError, _changed(norm_bias=_x(1, 6))),
    *_bad_norm("shift", ValueError, _norm(shift=_x(6)), _norm(shift=_x(1, 6))),
    *_bad_norm("num_groups", TypeError, _changed(num_groups=2.0)),
    *_bad_norm("num_groups", ValueError, _changed(num_groups=4), _changed(num_groups=0)),
    *_bad_norm("stride", ValueError, _norm(stride=4)),
    *_bad_norm("padding", ValueError, _norm(padding=3)),
    *_bad_norm("statistics", TypeError, _changed(statistics=(20, _x(2, 6), _x(2, 6)))),
    *_bad_norm("statistics.count", ValueError, _given(count=8)),
    *_bad_norm("statistics.mean", ValueError, _given(mean=_x(1, 6))),
    *_bad_norm("statistics.mean", TypeError, _given(mean=_x(2, 6).half())),
    *_bad_norm("statistics.m2", ValueError, _given(m2=_x(2, 3))),
]
