import torch
from helpers import Bad, Case, Shape

# name: (shape of [..., 2D], compiled with)
GLU = {
    "tokens": ((2, 5, 144), "inductor"),
    "odd": ((2, 3, 2 * 577), ""),  # an odd half: no aligned vectors
    "one-row": ((1, 1152), ""),
    "maps": ((2, 3, 5, 34), ""),
    "narrow": ((3, 7, 2), ""),
}
# name: (shape of x, whether there is a bias, compiled with)
GELU = {
    "tokens": ((2, 5, 72), True, "inductor"),
    "no-bias": ((2, 5, 72), False, ""),
    "one-row": ((1, 384), True, ""),
    "odd": ((2, 9, 577), True, ""),
    "maps": ((2, 3, 5, 17), True, ""),
    "many-rows": ((3, 41, 5), True, ""),  # more than a block of the sum
}


def _cases():
    # Magnitudes: |a| |b|, of which b's error is the larger part; and its slope, below 1.2.
    for name, (shape, compiled) in GLU.items():
        for op, kwargs in (
            ("geglu", {}),
            ("geglu", {"approximate": "tanh"}),
            ("swiglu", {}),
        ):
            form = "-tanh" if kwargs else ""
            only = "" if kwargs else compiled
            yield Case(op, f"{op}{form}-{name}", (Shape(shape),), kwargs, compiled=only)
    for name, (shape, biased, compiled) in GELU.items():
        bias = (Shape(shape[-1:], batched=False),) if biased else ()
        yield Case("gelu_tanh", f"gelu-tanh-{name}", (Shape(shape), *bias), compiled=compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _bad(name, argument, error, *calls):
    return [Bad(name, argument, error, call) for call in calls]


BAD = [
    *_bad("geglu", "x", TypeError, lambda f: f([1.0, 2.0]), lambda f: f(_x(2, 4).int())),
    *_bad("geglu", "x", ValueError, lambda f: f(_x(4)), lambda f: f(_x(2, 3))),
    *_bad("geglu", "approximate", ValueError, lambda f: f(_x(2, 4), approximate="sigmoid")),
    *_bad("geglu", "approximate", ValueError, lambda f: f(_x(2, 4), approximate=True)),
    *_bad("swiglu", "x", TypeError, lambda f: f(None), lambda f: f(_x(2, 4).to_sparse())),
    *_bad("swiglu", "x", ValueError, lambda f: f(_x(4)), lambda f: f(_x(2, 2, 5))),
    *_bad("gelu_tanh", "x", TypeError, lambda f: f(1.0), lambda f: f(_x(2, 4).cfloat())),
    *_bad("gelu_tanh", "x", ValueError, lambda f: f(_x(4))),
    *_bad("gelu_tanh", "bias", TypeError, lambda f: f(_x(2, 4), 0.5)),
    *_bad("gelu_tanh", "bias", TypeError, lambda f: f(_x(2, 4), _x(4, dtype=torch.float64))),
    *_bad("gelu_tanh", "bias", ValueError, lambda f: f(_x(2, 4), _x(3))),
    *_bad("gelu_tanh", "bias", ValueError, lambda f: f(_x(2, 4), _x(1, 4))),
    *_bad("gelu_tanh", "bias", ValueError, lambda f: f(_x(2, 4), _x(4).to("meta"))),
]
