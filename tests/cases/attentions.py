import torch
from helpers import Bad, Case, Shape

# name: (B, T, S, H, Hkv, d, mask, other arguments)
ATTENTIONS = {
    "multi-query": (2, 33, 37, 14, 1, 64, False, {}),
    "text": (2, 20, 77, 4, 1, 64, True, {}),
    "grouped": (3, 9, 19, 6, 2, 20, False, {"scale": 0.7}),
    "grouped-mask": (2, 17, 40, 4, 2, 8, True, {}),
    "multi-head": (2, 13, 13, 3, 3, 72, False, {}),
    "odd": (2, 5, 3, 3, 1, 7, True, {"scale": 1.5}),
    "two-keys": (2, 3, 2, 2, 1, 8, False, {}),
    "several-blocks": (1, 21, 530, 5, 1, 34, True, {}),
    "wide-heads": (1, 6, 10, 2, 1, 160, False, {}),
}


def _cases():
    for name, (B, T, S, H, Hkv, d, mask, kwargs) in ATTENTIONS.items():
        kv = Shape((B, S, Hkv, d))
        inputs = (Shape((B, T, H, d)), kv, kv, Shape((B, S), mask=True) if mask else None)
        compiled = "inductor" if name in ("multi-query", "text") else ""
        # Gradients of k and v are sums over T H queries.
        op = "multi_query_attention"
        yield Case(op, f"{op}-{name}", inputs, kwargs, 16.0, compiled, keeps_layout=False)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _call(**changes):
    values = {"q": _x(2, 3, 4, 8), "k": _x(2, 5, 1, 8), "v": _x(2, 5, 1, 8), **changes}
    return lambda f: f(**values)


def _bad(argument, error, *calls):
    return [Bad("multi_query_attention", argument, error, call) for call in calls]


BAD = [
    *_bad("q", TypeError, _call(q=None), _call(q=_x(2, 3, 4, 8).int())),
    *_bad("q", ValueError, _call(q=_x(2, 3, 8)), _call(q=_x(2, 3, 0, 8))),
    *_bad("q", ValueError, _call(q=_x(2, 3, 1, 0), k=_x(2, 5, 1, 0), v=_x(2, 5, 1, 0))),
    *_bad("k", TypeError, _call(k=None), _call(k=_x(2, 5, 1, 8, dtype=torch.half))),
    *_bad("k", ValueError, _call(k=_x(2, 5, 1, 6)), _call(k=_x(1, 5, 1, 8))),
    *_bad("k", ValueError, _call(k=_x(2, 5, 3, 8)), _call(k=_x(2, 5, 0, 8))),
    *_bad("k", ValueError, _call(k=_x(2, 5, 1, 8).to("meta"))),
    *_bad("v", TypeError, _call(v=None), _call(v=_x(2, 5, 1, 8).double())),
    *_bad("v", ValueError, _call(v=_x(2, 4, 1, 8)), _call(v=_x(2, 5, 2, 8))),
    *_bad("mask", TypeError, _call(mask=1), _call(mask=_x(2, 5))),
    *_bad("mask", ValueError, _call(mask=_x(2, 3).bool()), _call(mask=_x(1, 5).bool())),
    *_bad("mask", ValueError, _call(mask=_x(2, 5).bool().to("meta"))),
]
