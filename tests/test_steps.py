"""Solver steps for all levels, beyond the shared suite."""

import pytest
import torch
from helpers import DEVICES

import dfm_fast


def levels(device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 3, 4, 6), (2, 3, 8, 12), (2, 3, 16, 24)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def assert_levels(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_the_tables_is_chosen_on_the_device(device):
    x, c, u = (levels(device, seed=s) for s in range(3))
    dt = -torch.rand(5, 3, device=device)
    w = 1 + torch.rand(5, 3, device=device)
    for row in (0, 3, 4):
        step = torch.tensor([row], device=device)
        got = dfm_fast.cfg_euler_step(x, c, u, dt, cfg_scale=w, step=step)
        want = [
            a + dt[row, s] * (q + w[row, s] * (p - q))
            for s, (a, p, q) in enumerate(zip(x, c, u, strict=True))
        ]
        assert_levels(got, want)
        scalar = dfm_fast.cfg_euler_step(x, c, u, dt, cfg_scale=w[row], step=step)
        assert_levels(scalar, want)


@pytest.mark.parametrize("device", DEVICES)
def test_inactive_levels_stay(device):
    x, c = levels(device), levels(device, seed=1)
    dt = torch.full((3,), -0.5, device=device)
    full = dfm_fast.cfg_euler_step(x, c, None, dt)
    for active, holes in (([True, False, False], True), ([False, True, True], False)):
        v = [p if a or not holes else None for p, a in zip(c, active, strict=True)]
        got = dfm_fast.cfg_euler_step(x, v, None, dt, active=active)
        for g, f, a, on in zip(got, full, x, active, strict=True):
            assert torch.equal(g, f) if on else g is a
    mask = torch.tensor([True, False, True], device=device)
    got = dfm_fast.cfg_euler_step(x, c, None, dt, active=mask)
    for g, f, a, on in zip(got, full, x, mask.tolist(), strict=True):
        assert torch.equal(g, f if on else a)
        assert g is not a


@pytest.mark.parametrize("device", DEVICES)
def test_no_velocity_at_all_is_no_step(device):
    x = levels(device)
    got = dfm_fast.cfg_euler_step(x, [None] * 3, None, torch.zeros(3, device=device))
    assert all(a is b for a, b in zip(got, x, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_states_take_velocities_of_a_low_precision_model(device):
    x, c, u = levels(device), levels(device, torch.float16, 1), levels(device, torch.float16, 2)
    dt = torch.tensor([-0.1, -0.2, -0.3], device=device)
    got = dfm_fast.cfg_euler_step(x, c, u, dt, cfg_scale=2.0)
    want = dfm_fast.cfg_euler_step(
        x, [v.float() for v in c], [v.float() for v in u], dt, cfg_scale=2.0
    )
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, w)


@pytest.mark.parametrize("device", DEVICES)
def test_heun_is_of_second_order(device):
    """dx/dt = -x from 1 to 0: halving the step divides the error by four, Euler's by two."""
    errors = {}
    for n in (16, 32):
        x = euler = [torch.ones(1, 4, device=device)]
        dt = torch.tensor([-1 / n], device=device)
        for _ in range(n):
            y = dfm_fast.cfg_euler_step(x, [-v for v in x], None, dt)
            x = dfm_fast.heun_step(x, y, [-v for v in y], None, dt)
            euler = dfm_fast.cfg_euler_step(euler, [-v for v in euler], None, dt)
        errors[n] = [abs(v[0][0, 0].item() - torch.e) for v in (x, euler)]
    (heun, euler), (finer_heun, finer_euler) = errors[16], errors[32]
    assert 3.6 < heun / finer_heun < 4.4
    assert 1.8 < euler / finer_euler < 2.2


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_guidance_and_masks(device):
    """Against autograd of the formula, with tables, a mask and Heun's step."""
    leaves = [v.requires_grad_() for k in range(4) for v in levels(device, seed=k)]
    x, p, c, u = (leaves[i : i + 3] for i in range(0, 12, 3))
    dt = (-torch.rand(4, 3, device=device)).requires_grad_()
    w = torch.rand(4, 3, device=device).requires_grad_()
    mask, step = torch.tensor([True, False, True], device=device), torch.tensor([2], device=device)
    got = dfm_fast.heun_step(x, p, c, u, dt, cfg_scale=w, active=mask, step=step)
    want = []
    for s in range(3):
        y = (x[s] + p[s] + dt[2, s] * (u[s] + w[2, s] * (c[s] - u[s]))) / 2
        want.append(torch.where(mask[s], y, x[s]))
    dy = [torch.randn_like(v) for v in got]
    a = torch.autograd.grad(got, [*leaves, dt, w], dy)
    b = torch.autograd.grad(want, [*leaves, dt, w], dy, allow_unused=True)
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if h is None else h, atol=1e-4, rtol=1e-5)
