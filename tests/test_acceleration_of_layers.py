"""accelerate on layers of torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerated_models import fill, operators, randn, relative, run
from helpers import INTERPRET
from torch import nn

import dfm_fast

pytestmark = pytest.mark.skipif(INTERPRET, reason="operators have their own tests there")

# --- Layers of torch ------------------------------------------------------------------------------

# layers, shape of the input, operators that then run
LAYERS = {
    "rms_norm": (lambda: nn.RMSNorm(12), (2, 3, 12), ["rms_norm"]),
    "rms_norm of two dimensions": (lambda: nn.RMSNorm((3, 4)), (2, 3, 4), ["rms_norm"]),
    "rms_norm without weight": (
        lambda: nn.RMSNorm(12, elementwise_affine=False), (2, 12), ["rms_norm"]),
    "group_norm": (lambda: nn.GroupNorm(3, 12), (2, 12, 5), ["group_norm_silu"]),
    "group_norm, silu": (
        lambda: nn.Sequential(nn.GroupNorm(3, 12), nn.SiLU(), nn.SiLU()), (2, 12, 4, 5),
        ["group_norm_silu"]),
    "depthwise": (
        lambda: nn.Conv2d(6, 6, 5, 2, 1, groups=6), (2, 6, 9, 8), ["depthwise_conv2d"]),
    "depthwise, same": (
        lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6), (2, 6, 9, 8), ["depthwise_conv2d"]),
    "upsample": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1)),
        (2, 4, 5, 6), ["upsample_conv2d"]),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 6)), (2, 300, 8), []),
    "mlp, tanh": (
        lambda: nn.Sequential(
            nn.Linear(8, 20), nn.GELU("tanh"), nn.Dropout(0.1), nn.Linear(20, 6), nn.ReLU()),
        (2, 7, 8), ["gelu_tanh"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch(name, dtype, layout):
    build, shape, expected = LAYERS[name]
    layer = fill(build()).to(dtype).eval()
    x = randn(*shape, dtype=dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    given = {"x" if "rms_norm" in name else "input": x}
    exact = run(copy.deepcopy(layer).double(), given, {}, torch.float64)
    low = run(layer, given, {}, dtype)
    assert dfm_fast.accelerate(layer).swapped
    # In float64 there is nothing wider: two orders of summation, each of a few roundings.
    rounding = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    for g, lo, ex in zip(run(layer, given, {}, dtype), low, exact, strict=True):
        assert g.dtype == lo.dtype
        assert relative(g, ex) <= 2 * relative(lo, ex) + rounding
    with torch.no_grad():
        seen = operators(layer, x)
        assert all(op in seen for op in expected), seen
        y = layer(x)
        assert relative(y, exact[0]) <= 2 * relative(low[0], exact[0]) + rounding
        assert y.stride() == dfm_fast.restore(layer)(x).stride()


KEPT = {
    "groups of several": (lambda: nn.Conv2d(8, 8, 3, groups=4), "groups of several channels"),
    "dilated": (lambda: nn.Conv2d(8, 8, 3, groups=8, dilation=2), "dilation"),
    "even kernel": (lambda: nn.Conv2d(8, 8, 4, groups=8), "a kernel that is not"),
    "stride 3": (lambda: nn.Conv2d(8, 8, 3, 3, groups=8), "a stride that is not 1 or 2"),
    "reflect": (
        lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"), "of zeros"),
    "wide": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=3), "padding of a kernel or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_layers_that_are_kept(name):
    build, reason = KEPT[name]
    layer = build()
    report = dfm_fast.accelerate(nn.Sequential(layer))
    assert not report.swapped
    assert [k for k, _ in report.kept] == ["0"]
    assert reason in report.kept[0][1]
    assert reason in str(report)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("layers", [
    lambda: (nn.Upsample(scale_factor=3), nn.Conv2d(8, 8, 3, padding=1)),
    lambda: (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 8, 3, padding=1)),
    lambda: (nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 5, padding=2)),
    lambda: (nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3)),
    lambda: (nn.Upsample((8, 8)), nn.Conv2d(8, 8, 3, padding=1)),
    lambda: (nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
    lambda: (nn.SiLU(), nn.GroupNorm(2, 8)),
])  # fmt: skip
def test_sequences_that_are_none(layers):
    assert "Sequential" not in [
        kind for _, kind, _ in dfm_fast.accelerate(nn.Sequential(*layers())).swapped
    ]


def test_a_sequence_may_change():
    model = fill(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
    dfm_fast.accelerate(model)
    x = randn(2, 8, 3, 3)
    model[1] = nn.Tanh()
    torch.testing.assert_close(
        model(x), torch.tanh(F.group_norm(x, 2, model[0].weight, model[0].bias))
    )


def test_inputs_that_no_kernel_takes():
    norm, conv = fill(nn.RMSNorm(4)), nn.Conv2d(8, 8, 3, groups=8)
    mixed = randn(3, 4, dtype=torch.bfloat16)
    want = norm(mixed)
    for layer in (norm, conv):
        assert dfm_fast.accelerate(layer).swapped
    assert norm(torch.empty(0, 4)).shape == (0, 4)
    assert norm(mixed).dtype == want.dtype
    assert torch.equal(norm(mixed), want)
    with pytest.raises(RuntimeError, match="channels"):  # torch's own message
        conv(randn(1, 4, 5, 5))
    assert norm.to("meta")(torch.empty(3, 4, device="meta")).device.type == "meta"
