import torch
from helpers import Bad, Case, Shape

# name: (shape of x, output channels, whether there is a bias)
MAPS = {
    "square": ((2, 8, 6, 8), 16, True),
    "odd": ((3, 5, 7, 3), 9, True),
    "pair": ((2, 4, 1, 2), 3, True),  # of one pixel no layout can be told
    "column": ((1, 3, 9, 1), 4, False),
    "row": ((1, 17, 1, 12), 33, False),
    "bands": ((1, 16, 14, 33), 24, True),  # more pixels than a band
}


def _cases():
    for name, (shape, out, biased) in MAPS.items():
        weight = Shape((out, shape[1], 3, 3), batched=False)
        bias = (Shape((out,), batched=False),) if biased else ()
        compiled = "inductor" if name == "square" else ""
        # Gradients of the weight are sums over pixels, whose terms are of size one.
        yield Case("upsample_conv2d", name, (Shape(shape), weight, *bias), {}, 64.0, compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _bad(argument, error, *calls):
    return [Bad("upsample_conv2d", argument, error, call) for call in calls]


_X, _W = _x(2, 3, 4, 5), _x(6, 3, 3, 3)
BAD = [
    *_bad("x", TypeError, lambda f: f(None, _W), lambda f: f(_X.int(), _W)),
    *_bad("x", ValueError, lambda f: f(_x(3, 4, 5), _W), lambda f: f(_x(2, 3, 0, 5), _W)),
    *_bad("weight", TypeError, lambda f: f(_X, None), lambda f: f(_X, _W.half())),
    *_bad("weight", ValueError, lambda f: f(_X, _x(6, 3, 2, 3)), lambda f: f(_X, _x(6, 4, 3, 3))),
    *_bad("weight", ValueError, lambda f: f(_X, _x(6, 3, 3)), lambda f: f(_X, _x(0, 3, 3, 3))),
    *_bad("weight", ValueError, lambda f: f(_X, _W.to("meta"))),
    *_bad("bias", TypeError, lambda f: f(_X, _W, 0.5), lambda f: f(_X, _W, _x(6).half())),
    *_bad("bias", ValueError, lambda f: f(_X, _W, _x(5)), lambda f: f(_X, _W, _x(1, 6))),
    *_bad("bias", ValueError, lambda f: f(_X, _W, _x(6).to("meta"))),
]
