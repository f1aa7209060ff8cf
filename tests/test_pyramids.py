"""Pyramids against other libraries, and what the shared suite cannot say of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICES, LAYOUTS, dtypes, relayout

import dfm_fast
from dfm_fast import nn
from dfm_fast._library import INTERPRET, load_extension
from dfm_fast.ops import pyramids as ops
from dfm_fast.ops._filters import FILTERS, axis_taps
from dfm_fast.ops.pyramids import level_sizes

SIDES = [(16, 24), (17, 23), (2, 5), (3, 2), (64, 31)]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got, want, tolerance=1e-6):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- Other libraries as oracles -------------------------------------------------------------------


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_binomial_is_opencv(sides):
    cv2 = pytest.importorskip("cv2")
    x = randn(1, 3, *sides)
    gaussian = [x[0].permute(1, 2, 0).contiguous().numpy()]
    levels = max(2, min(sides).bit_length() - 2)
    for _ in range(levels - 1):
        gaussian.append(cv2.pyrDown(gaussian[-1]))
    want = [gaussian[-1]]
    for fine, coarse in zip(gaussian[-2::-1], gaussian[:0:-1], strict=True):
        want.append(fine - cv2.pyrUp(coarse, dstsize=fine.shape[1::-1]))
    for got, level in zip(
        dfm_fast.laplacian_build(x, levels, filter="binomial"), want, strict=True
    ):
        assert_close(got[0].permute(1, 2, 0), torch.from_numpy(level))


def test_binomial_and_kornia():
    """kornia blurs with the same 5 taps, but halves by a bilinear resize: the mean of 2x2 blurred
    pixels, half a pixel off OpenCV's (and our) every second pixel. Away from the border both follow
    from one blurred picture."""
    kornia = pytest.importorskip("kornia")
    x = randn(1, 2, 32, 32)
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.outer(taps, taps).expand(2, 1, 5, 5)
    blurred = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=2)
    ours = dfm_fast.laplacian_build(x, 2, filter="binomial")[0]
    theirs = kornia.geometry.transform.pyrdown(x)
    assert_close(ours, blurred[..., ::2, ::2])
    assert_close(theirs, F.avg_pool2d(blurred, 2))
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("filter", "mode"), [("nearest", "nearest"), ("bilinear", "bilinear")])
@pytest.mark.parametrize("factor", [2, 4])
def test_box_filters_are_avg_pool_and_interpolate(filter, mode, factor, device):
    x = randn(2, 3, 32, 48).to(device)
    align = {} if mode == "nearest" else {"align_corners": False}
    coarse = F.avg_pool2d(x, factor)
    up = coarse
    for _ in range(factor // 2):
        up = F.interpolate(up, scale_factor=2, mode=mode, **align)
    got = dfm_fast.laplacian_build(x, 2, filter=filter, factor=factor)
    assert_close(got[0], coarse)
    assert_close(got[1], x - up)


def test_down_is_the_mean_not_the_strided_nearest():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    coarse, _ = dfm_fast.laplacian_build(x, 2, filter="nearest")
    assert coarse.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("filter", ["nearest", "bilinear"])
def test_video_is_avg_pool_and_interpolate_3d(filter):
    x = randn(1, 2, 4, 8, 12)
    mode = {"nearest": "nearest", "bilinear": "trilinear"}[filter]
    align = {} if mode == "nearest" else {"align_corners": False}
    coarse = F.avg_pool3d(x, 2)
    got = dfm_fast.laplacian_build(x, 2, filter=filter)
    assert_close(got[0], coarse)
    assert_close(got[1], x - F.interpolate(coarse, scale_factor=2, mode=mode, **align))


def test_frames_of_a_video_are_images():
    x = randn(2, 3, 5, 8, 12)
    got = dfm_fast.laplacian_build(x, 3, factor=(1, 2, 2))
    frames = x.transpose(1, 2).flatten(0, 1)
    for video, image in zip(got, dfm_fast.laplacian_build(frames, 3), strict=True):
        assert torch.equal(video.transpose(1, 2).flatten(0, 1), image)


def test_haar_is_pywavelets():
    pywt = pytest.importorskip("pywt")
    x = randn(2, 3, 32, 48)
    coarse, *details = pywt.wavedec2(x.numpy(), "haar", level=3)
    want = [coarse, *(torch.cat([torch.from_numpy(band) for band in d], 1) for d in details)]
    for got, level in zip(dfm_fast.haar_build(x, 4), want, strict=True):
        assert_close(got, torch.as_tensor(level))


def test_haar_is_orthonormal():
    x = randn(2, 3, 32, 48, dtype=torch.float32)
    energy = sum(level.double().square().sum() for level in dfm_fast.haar_build(x, 4))
    assert_close(energy, x.double().square().sum(), 1e-6)


def test_dct_keeps_the_low_half_of_scipys_coefficients():
    fft = pytest.importorskip("scipy.fft")
    x = randn(1, 1, 16, 24, dtype=torch.float64)
    blocks = x.view(2, 8, 3, 8).transpose(1, 2).numpy()  # [2, 3, 8, 8]
    low = fft.dctn(blocks, axes=(2, 3), norm="ortho")[..., :4, :4]
    coarse = torch.from_numpy(fft.idctn(low / 2, axes=(2, 3), norm="ortho"))
    padded = torch.nn.functional.pad(torch.from_numpy(low), (0, 4, 0, 4)).numpy()
    up = torch.from_numpy(fft.idctn(padded, axes=(2, 3), norm="ortho"))
    got = dfm_fast.laplacian_build(x, 2, filter="dct")
    assert_close(got[0], coarse.transpose(1, 2).reshape(1, 1, 8, 12), 1e-14)
    assert_close(got[1], x - up.transpose(1, 2).reshape(1, 1, 16, 24), 1e-14)


# --- What a pyramid promises ----------------------------------------------------------------------


def _up_gain(filter, sides):
    """Largest factor by which `up` enlarges an error: product over axes of the largest row sum."""
    return math.prod(axis_taps(filter, "up", n).weight.abs().sum(1).max().item() for n in sides)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filter", FILTERS)
def test_collapse_inverts_build_up_to_one_rounding_per_level(filter, layout, device):
    """Each level's own rounding is at most eps |level|; coarser errors come up with `up`'s gain."""
    for dtype in dtypes(device):
        x = relayout(randn(2, 2, 64, 96, dtype=dtype).to(device), layout)
        levels = dfm_fast.laplacian_build(x, 4, filter=filter)
        back = dfm_fast.laplacian_collapse(levels, filter=filter)
        bound, eps = 0.0, torch.finfo(dtype).eps
        for level in levels[1:]:
            bound = bound * _up_gain(filter, level.shape[2:])
            bound += eps * level.abs().max().item()
        error = (back.double() - x.double()).abs().max().item()
        assert error <= bound, f"{filter} {dtype}: {error} > {bound}"


@pytest.mark.parametrize("device", DEVICES)
def test_haar_collapse_inverts_build(device):
    for dtype in dtypes(device):
        x = randn(2, 3, 64, 96, dtype=dtype).to(device)
        levels = dfm_fast.haar_build(x, 4)
        eps, largest = torch.finfo(dtype).eps, max(v.abs().max().item() for v in levels)
        # Four bands of one rounding each (eps/2), half of their sum a level, and the output's own.
        bound = sum((2 * eps / 2 + eps / 2) * largest for _ in levels[1:])
        assert (dfm_fast.haar_collapse(levels) - x).abs().max().item() <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filter", FILTERS)
def test_levels_compose(filter, device):
    """A pyramid of L levels is the one of two, built again on its own coarse level: bit for bit."""
    for dtype in dtypes(device):
        x = randn(2, 2, 64, 96, dtype=dtype).to(device)
        levels = dfm_fast.laplacian_build(x, 4, filter=filter)
        for detail in reversed(levels[1:]):
            x, expected = dfm_fast.laplacian_build(x, 2, filter=filter)
            assert torch.equal(detail, expected)
        assert torch.equal(levels[0], x)
        whole = dfm_fast.laplacian_collapse(levels, filter=filter)
        for detail in levels[1:]:
            x = dfm_fast.laplacian_collapse([x, detail], filter=filter)
        assert torch.equal(whole, x)


def test_a_constant_has_no_details():
    for filter in FILTERS:
        coarse, *details = dfm_fast.laplacian_build(
            torch.full((1, 1, 32, 32), 3.0), 3, filter=filter
        )
        assert_close(coarse, torch.full((1, 1, 8, 8), 3.0))
        assert max(d.abs().max() for d in details) < 1e-5


def test_calls_of_many_kinds_in_turn():
    """An implementation may keep what it prepares for a shape, filter, factor and direction."""
    kinds = [("bilinear", 2), ("binomial", 2), ("binomial", (1, 2)), ("nearest", 4), ("dct", 2)]
    xs = [randn(1, 1, *sides) for sides in [(16, 32), (32, 16), (16, 16), (8, 64)]]
    for x in [*xs, *xs]:
        for filter, factor in kinds:
            per_axis = (factor, factor) if isinstance(factor, int) else factor
            kwargs = {"filter": filter, "factor": factor}
            got = dfm_fast.laplacian_build(x, 2, **kwargs)
            want = ops.laplacian_build_ref(x, 2, filter, per_axis)
            for g, w in zip(got, want, strict=True):
                assert_close(g, w)
            assert_close(dfm_fast.laplacian_collapse(got, **kwargs), x)
            dx = torch.ops.dfm_fast.laplacian_build_backward(want, filter, per_axis)
            assert_close(dx, ops.laplacian_build_backward_ref(want, filter, per_axis), 1e-5)


def test_one_level_is_a_copy():
    x = randn(1, 1, 3, 5)
    for levels in (dfm_fast.laplacian_build(x, 1), dfm_fast.haar_build(x, 1)):
        assert len(levels) == 1
        assert torch.equal(levels[0], x)
        assert levels[0].data_ptr() != x.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(dtype, device):
    """Collapse of (coarse, detail) rounds detail + coarse: all 65536 details, and sums that end
    between two representable values, with ties, subnormals, infinities and NaN among them."""
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bfloat16")
    detail = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, 256, 256)
    for offset in (0.0, 1.0, 3e-4, -2.5e-6):
        coarse = torch.full((1, 1, 128, 128), offset, dtype=dtype)
        want = (detail.float() + coarse.float().mean()).to(dtype)
        got = dfm_fast.laplacian_collapse(
            [coarse.to(device), detail.to(device)], filter="nearest"
        ).cpu()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[~got.isnan()], want[~want.isnan()])


@pytest.mark.skipif(INTERPRET, reason="2^31 elements take hours in the interpreter")
@pytest.mark.parametrize("device", DEVICES)
def test_more_than_2_31_elements(device):
    """Levels of the last image of a batch of 2^31 + elements are those of that image alone."""
    if device == "cpu" and load_extension().module is None:
        pytest.skip("the reference keeps several float32 copies: more memory than a runner has")
    if device == "cpu" and _free_gib() < 14:
        pytest.skip("needs 14 GiB of free memory")
    image = randn(1, 1, 2048, 1024, dtype=torch.bfloat16).to(device)
    x = image.expand(1026, 1, -1, -1).contiguous()
    assert x.numel() > 2**31
    levels = dfm_fast.laplacian_build(x)
    for level, want in zip(levels, dfm_fast.laplacian_build(image), strict=True):
        assert torch.equal(level[-1:], want)
        assert torch.equal(level[:1], want)
    del x
    back = dfm_fast.laplacian_collapse(levels)
    want = dfm_fast.laplacian_collapse([level[:1].clone() for level in levels])
    assert torch.equal(back[-1:], want)


def _free_gib():
    with open("/proc/meminfo") as lines:
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return kib / 2**20


# --- The module -----------------------------------------------------------------------------------


def test_module_builds_collapses_and_previews():
    pyramid = nn.LaplacianPyramid(3, "binomial")
    x = randn(2, 3, 17, 24)
    levels = pyramid(x)
    want = dfm_fast.laplacian_build(x, 3, filter="binomial")
    assert all(torch.equal(a, b) for a, b in zip(levels, want, strict=True))
    assert_close(pyramid.collapse(levels), x)
    assert torch.equal(pyramid.partial(levels, 3), pyramid.collapse(levels))
    assert torch.equal(pyramid.partial(levels, 1), levels[0])
    assert pyramid.partial(levels, 2).shape == levels[1].shape
    blurred = pyramid.partial(levels, 2, full_size=True)
    assert_close(x - blurred, levels[-1], 1e-5)
    assert not pyramid.state_dict()
    assert repr(pyramid) == "LaplacianPyramid(num_levels=3, filter='binomial', factor=2)"


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (
            lambda: nn.LaplacianPyramid(0),
            "LaplacianPyramid: num_levels: expected at least 1, got 0",
        ),
        (
            lambda: nn.LaplacianPyramid(2, "box"),
            "LaplacianPyramid: filter: expected one of nearest",
        ),
        (lambda: nn.LaplacianPyramid(factor=3), "LaplacianPyramid: factor: expected 1, 2 or 4"),
        (lambda: nn.LaplacianPyramid(2).collapse([randn(1, 1, 2, 2)]), "expected 2 tensors, got 1"),
        (lambda: nn.LaplacianPyramid(2).partial([randn(1, 1, 2, 2)], 0), "k: expected at least 1"),
        (
            lambda: nn.LaplacianPyramid(2).partial([randn(1, 1, 2, 2)], 2),
            "expected 2 tensors, got 1",
        ),
        (
            lambda: nn.LaplacianPyramid(2)(randn(1, 1, 3, 4)),
            "laplacian_build: x: expected multiples",
        ),
    ],
)
def test_module_errors_are_clear(call, names):
    with pytest.raises(ValueError, match="expected") as error:
        call()
    assert names in str(error.value)


def test_level_sizes_match_what_build_returns():
    for filter, sides in (("binomial", (37, 50)), ("dct", (64, 32))):
        x = randn(1, 1, *sides)
        sizes = [tuple(v.shape[2:]) for v in dfm_fast.laplacian_build(x, 3, filter=filter)]
        assert sizes == level_sizes(sides, 3, (2, 2))
