import torch
from helpers import Bad, Case, Shape

# name: (shapes of the levels, guided, other arguments)
STEPS = {
    "two-levels": ([(2, 3, 4, 6), (2, 3, 8, 12)], True, {"cfg_scale": 1.5}),
    "no-guidance": ([(3, 2, 4, 4), (3, 2, 8, 8), (3, 2, 16, 16)], False, {}),
    "one-level": ([(2, 7, 5)], True, {"cfg_scale": 4.0}),
    "video": ([(1, 2, 2, 4, 4), (1, 2, 2, 8, 8)], True, {"cfg_scale": 0.0}),
    "long": ([(2, 3, 33, 35)], True, {"cfg_scale": -0.5}),
}


def _cases():
    for name, (shapes, guided, kwargs) in STEPS.items():
        levels = [Shape(s) for s in shapes]
        dt = Shape((len(shapes),), batched=False)
        uncond = list(levels) if guided else None
        compiled = "inductor" if name == "two-levels" else ""
        # Magnitudes: |x| + |dt| |v| (1 + |w|), of which each operation rounds once; dt's gradient
        # is a sum over a level, whose terms are that large.
        inputs = (levels, levels, uncond, dt)
        yield Case("cfg_euler_step", f"euler-{name}", inputs, kwargs, 16.0, compiled)
        inputs = (levels, levels, levels, uncond, dt)
        yield Case("heun_step", f"heun-{name}", inputs, kwargs, 16.0, compiled)


CASES = list(_cases())


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _pair(**kwargs):
    return [_x(2, 1, 2, 2, **kwargs), _x(2, 1, 4, 4, **kwargs)]


def _step(**changes):
    values = {"x": _pair(), "v_cond": _pair(), "v_uncond": None, "dt": _x(2), **changes}
    return lambda f: f(**values)


def _heun(**changes):
    return _step(**{"predicted": _pair(), **changes})


def _bad(name, argument, error, *calls):
    return [Bad(name, argument, error, call) for call in calls]


BAD = [
    *_bad("cfg_euler_step", "x", TypeError, _step(x=_x(2, 1)), _step(x=[])),
    *_bad("cfg_euler_step", "x[1]", TypeError, _step(x=[_pair()[0], _pair()[1].half()])),
    *_bad("cfg_euler_step", "x[0]", TypeError, _step(x=[None, _pair()[1]])),
    *_bad("cfg_euler_step", "v_cond", TypeError, _step(v_cond=None)),
    *_bad("cfg_euler_step", "v_cond", ValueError, _step(v_cond=_pair()[:1])),
    *_bad("cfg_euler_step", "v_cond[0]", ValueError, _step(v_cond=_pair()[::-1])),
    *_bad("cfg_euler_step", "v_cond[1]", TypeError, _step(v_cond=[_pair()[0], "v"])),
    *_bad(
        "cfg_euler_step",
        "v_cond[1]",
        TypeError,
        _step(v_cond=[_pair()[0], None], active=[True, True]),
    ),
    *_bad("cfg_euler_step", "v_uncond", ValueError, _step(cfg_scale=2.0)),
    *_bad("cfg_euler_step", "v_uncond", ValueError, _step(cfg_scale=_x(2))),
    *_bad("cfg_euler_step", "v_uncond[0]", TypeError, _step(v_uncond=[None, _pair()[1]])),
    *_bad("cfg_euler_step", "dt", TypeError, _step(dt=0.1), _step(dt=_x(2).int())),
    *_bad("cfg_euler_step", "dt", ValueError, _step(dt=_x(3)), _step(dt=_x(5, 2))),
    *_bad("cfg_euler_step", "dt", ValueError, _step(dt=_x(2).to("meta"))),
    *_bad("cfg_euler_step", "cfg_scale", TypeError, _step(cfg_scale="2", v_uncond=_pair())),
    *_bad("cfg_euler_step", "cfg_scale", ValueError, _step(cfg_scale=_x(1), v_uncond=_pair())),
    *_bad(
        "cfg_euler_step",
        "cfg_scale",
        ValueError,
        _step(cfg_scale=_x(3, 2), v_uncond=_pair(), dt=_x(2, 2), step=torch.tensor(0)),
    ),
    *_bad("cfg_euler_step", "active", ValueError, _step(active=[True])),
    *_bad("cfg_euler_step", "active", TypeError, _step(active=[1, 1])),
    *_bad("cfg_euler_step", "active", ValueError, _step(active=_x(2))),
    *_bad("cfg_euler_step", "step", TypeError, _step(step=1, dt=_x(5, 2))),
    *_bad("cfg_euler_step", "step", TypeError, _step(step=_x(1), dt=_x(5, 2))),
    *_bad("heun_step", "predicted", ValueError, _heun(predicted=_pair()[:1])),
    *_bad("heun_step", "predicted[0]", TypeError, _heun(predicted=[None, _pair()[1]])),
    *_bad("heun_step", "dt", ValueError, _heun(dt=_x(1))),
]
