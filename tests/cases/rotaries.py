import torch
from helpers import Bad, Case, Shape

# name: (B, Tq, Tk, H, Hkv, d, norm of q, norm of k, tables, other arguments)
ROTARIES = {
    "multi-query": (2, 3, 3, 14, 1, 64, True, True, "shared", {}),
    "multi-head": (2, 5, 5, 3, 3, 72, True, True, "shared", {}),
    "halves": (3, 5, 5, 3, 2, 6, True, True, "shared", {"interleaved": False}),
    "halves-72": (2, 2, 2, 2, 2, 72, True, True, "batched", {"interleaved": False}),
    "batched-tables": (2, 3, 3, 5, 3, 20, True, True, "batched", {"eps": 1e-2}),
    "one-token": (2, 1, 1, 2, 1, 64, True, True, "shared", {}),
    "only-norm": (2, 5, 3, 3, 2, 20, True, True, None, {"eps": 0.0}),
    "only-rope": (2, 5, 5, 3, 2, 6, False, False, "shared", {}),
    "only-rope-halves": (2, 3, 3, 2, 2, 34, False, False, "batched", {"interleaved": False}),
    "norm-of-q": (2, 3, 3, 2, 2, 34, True, False, "shared", {}),
    "norm-of-k": (2, 4, 3, 2, 2, 8, False, True, None, {}),
    "two": (2, 9, 9, 17, 18, 2, True, True, "shared", {}),
}


def _cases():
    for name, (B, Tq, Tk, H, Hkv, d, norm_q, norm_k, tables, kwargs) in ROTARIES.items():
        weights = [Shape((d,), batched=False) if norm else None for norm in (norm_q, norm_k)]
        table = None
        if tables:
            batched = tables == "batched"
            table = Shape((B, Tq, d // 2) if batched else (Tq, d // 2), batched=batched)
        compiled = "inductor" if name == "multi-query" else ""
        inputs = (Shape((B, Tq, H, d)), Shape((B, Tk, Hkv, d)), *weights, table, table)
        # A row of two may be short before it is normalised: its gradient is that much longer.
        yield Case(
            "qk_norm_rope",
            f"qk_norm_rope-{name}",
            inputs,
            kwargs,
            16.0,
            compiled,
            keeps_layout=False,
        )


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _call(**changes):
    values = {"q": _x(2, 3, 4, 8), "k": _x(2, 3, 1, 8), "q_weight": _x(8), **changes}
    return lambda f: f(**values)


def _bad(argument, error, *calls):
    return [Bad("qk_norm_rope", argument, error, call) for call in calls]


BAD = [
    *_bad("q", TypeError, _call(q=None), _call(q=_x(2, 3, 4, 8).int())),
    *_bad("q", ValueError, _call(q=_x(2, 3, 8)), _call(q=_x(2, 3, 4, 7), k=_x(2, 3, 1, 7))),
    *_bad("k", TypeError, _call(k=None), _call(k=_x(2, 3, 1, 8, dtype=torch.half))),
    *_bad("k", ValueError, _call(k=_x(2, 3, 1, 6)), _call(k=_x(1, 3, 1, 8))),
    *_bad("k", ValueError, _call(k=_x(2, 3, 1, 8).to("meta"))),
    *_bad("k", ValueError, _call(k=_x(2, 5, 1, 8), cos=_x(3, 4), sin=_x(3, 4))),
    *_bad("q_weight", TypeError, _call(q_weight=1.0), _call(q_weight=_x(8).long())),
    *_bad("q_weight", ValueError, _call(q_weight=_x(4)), _call(q_weight=_x(1, 8))),
    *_bad("q_weight", ValueError, _call(q_weight=_x(8).to("meta")), _call(q_weight=None)),
    *_bad("k_weight", ValueError, _call(k_weight=_x(1))),
    *_bad("cos", TypeError, _call(sin=_x(3, 4))),
    *_bad("cos", ValueError, _call(cos=_x(3, 8), sin=_x(3, 8)), _call(cos=_x(4), sin=_x(4))),
    *_bad("cos", ValueError, _call(cos=_x(3, 3, 4), sin=_x(3, 3, 4))),
    *_bad("sin", TypeError, _call(cos=_x(3, 4)), _call(cos=_x(3, 4), sin=0)),
    *_bad("sin", ValueError, _call(cos=_x(3, 4), sin=_x(2, 3, 4))),
    *_bad("sin", ValueError, _call(cos=_x(3, 4), sin=_x(3, 4).double())),
    *_bad("sin", ValueError, _call(cos=_x(3, 4), sin=_x(3, 4).to("meta"))),
]
