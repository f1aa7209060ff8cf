from __future__ import annotations

import torch
from helpers import Bad, Case, Shape

# x, and whether the modulation is one row per sample or one per token. Odd widths, one row, fewer
# elements than a vector, more rows than a block has.
SHAPES = {
    "small": ((2, 5, 72), False),
    "wide": ((2, 3, 1408), False),
    "odd": ((1, 2, 2305), False),
    "one-row": ((2, 1, 16), False),
    "narrow": ((2, 70, 5), False),
    "tokens": ((2, 4, 75), True),
}


def _cases():
    for name, (shape, per_token) in SHAPES.items():
        x, m = Shape(shape), Shape(shape if per_token else (shape[0], shape[-1]))
        compiled = "inductor" if name == "small" else ""
        # A row's largest elements are those whose roundings the cap counts; gradients of a
        # modulation are sums over the tokens.
        weight = None if per_token else Shape(shape[-1:], batched=False)
        yield Case("rms_norm", f"rms-{name}", (x, weight), {}, 8.0, compiled)
        yield Case("ada_layer_norm", f"ada-{name}", (x, m, m), {}, 8.0, compiled)
        yield Case("gated_residual", f"gated-{name}", (x, x, m), {}, 8.0, compiled)
        both = "gated_residual_ada_layer_norm"
        yield Case(both, f"both-{name}", (x, x, m, m, m), {"eps": 1e-3}, 8.0, compiled)


CASES = [*_cases(), Case("rms_norm", "rms-vector", (Shape((40, 24)),), {"eps": 0.5}, 8.0)]


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _rms(**changes):
    return lambda f: f(**{"x": _x(2, 3, 8), "weight": _x(8), **changes})


def _ada(**changes):
    return lambda f: f(**{"x": _x(2, 3, 8), "shift": _x(2, 8), "scale": _x(2, 8), **changes})


def _gated(**changes):
    return lambda f: f(**{"x": _x(2, 3, 8), "y": _x(2, 3, 8), "gate": _x(2, 8), **changes})


def _both(**changes):
    return _gated(**{"shift": _x(2, 8), "scale": _x(2, 8), **changes})


def _bad(name, argument, error, *calls):
    return [Bad(name, argument, error, call) for call in calls]


BAD = [
    *_bad("rms_norm", "x", TypeError, _rms(x=[1.0]), _rms(x=_x(2, 8).int())),
    *_bad("rms_norm", "x", ValueError, _rms(x=_x(2, 0), weight=None), _rms(x=_x())),
    *_bad("rms_norm", "weight", ValueError, _rms(weight=_x(7)), _rms(weight=_x(1, 8))),
    *_bad("rms_norm", "weight", ValueError, _rms(weight=_x(8).to("meta"))),
    *_bad("rms_norm", "weight", TypeError, _rms(weight=1.0), _rms(weight=_x(8).double())),
    *_bad("rms_norm", "eps", TypeError, _rms(eps="1e-6"), _rms(eps=True)),
    *_bad("rms_norm", "eps", ValueError, _rms(eps=-1e-6), _rms(eps=float("nan"))),
    *_bad("ada_layer_norm", "x", ValueError, _ada(x=_x(8))),
    *_bad("ada_layer_norm", "shift", ValueError, _ada(shift=_x(2, 1, 8)), _ada(shift=_x(8))),
    *_bad("ada_layer_norm", "shift", TypeError, _ada(shift=None), _ada(shift=_x(2, 8).double())),
    *_bad("ada_layer_norm", "scale", ValueError, _ada(scale=_x(3, 8)), _ada(scale=_x(2, 3, 8))),
    *_bad("ada_layer_norm", "scale", ValueError, _ada(scale=_x(2, 8).to("meta"))),
    *_bad("ada_layer_norm", "scale", TypeError, _ada(scale=_x(2, 8).half())),
    *_bad("ada_layer_norm", "eps", ValueError, _ada(eps=-1)),
    *_bad("gated_residual", "y", ValueError, _gated(y=_x(2, 8)), _gated(y=_x(2, 3, 8).to("meta"))),
    *_bad("gated_residual", "y", TypeError, _gated(y=None), _gated(y=_x(2, 3, 8).double())),
    *_bad("gated_residual", "gate", ValueError, _gated(gate=_x(2, 3, 1))),
    *_bad("gated_residual", "gate", TypeError, _gated(gate=0.5)),
    *_bad("gated_residual_ada_layer_norm", "y", ValueError, _both(y=_x(2, 4, 8))),
    *_bad("gated_residual_ada_layer_norm", "shift", ValueError, _both(shift=_x(2, 3, 8))),
    *_bad("gated_residual_ada_layer_norm", "scale", TypeError, _both(scale=_x(2, 8).half())),
]
