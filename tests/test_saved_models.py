"""Saved models: sampled with no run behind them, in parts and compiled; begun with."""

from dataclasses import replace

import pytest
import torch
from test_training import MODEL, tiny

from dfm_fast import cli
from dfm_fast._library import INTERPRET
from dfm_fast.models import DFMTransformer
from dfm_fast.training import loop, pictures, saved
from dfm_fast.training.config import FlowConfig, ModelConfig, OptimizerConfig

pytest.importorskip("tyro")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing of it is a kernel")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    config = tiny(tmp_path_factory.mktemp("trained"), steps=2)
    loop.train(config)
    return config.out


# --- Models that no run has exported ---


def small_model(**options):
    torch.manual_seed(0)
    arguments = {
        "in_channels": 1, "patch_sizes": (2, 4), "hidden_size": 32, "depth": 1, "num_heads": 2,
        "num_classes": 10, "input_size": (4, 4), "positions": "rope", "qk_norm": True, **options,
    }  # fmt: skip
    model = DFMTransformer(**arguments)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


@pytest.mark.parametrize(
    ("options", "shape", "kind"),
    [
        ({}, (1, 16, 16), "laplacian"),
        ({"patch_sizes": (1, 4), "in_channels": 3}, (3, 16, 16), "laplacian"),
        ({"patch_sizes": (1, 2, 4)}, (1, 16, 16), "laplacian"),
        ({"patch_sizes": (2,), "input_size": (2, 4)}, (1, 4, 8), "laplacian"),
        ({"patch_sizes": (1, 1), "in_channels": (1, 3)}, (1, 8, 8), "haar"),
    ],
)
def test_any_saved_model_can_be_sampled(tmp_path, options, shape, kind):
    model = small_model(**options)
    model.save_pretrained(tmp_path / "m")
    recipe, again = saved.open_model(tmp_path / "m")
    assert (recipe.shape, recipe.flow.decomposition) == (shape, kind)
    levels = recipe.build_flow().decomposition.shapes((1, *shape))
    tokens = {tuple(n // p for n in s[-2:]) for s, p in zip(levels, again.patch_sizes, strict=True)}
    assert tokens == {tuple(model.input_size)}
    out, steps = tmp_path / "grid.png", ["1"] * len(levels)
    command = ["sample", str(tmp_path / "m"), "--count", "2", "--classes", "1", "3"]
    assert cli.main([*command, "--steps", *steps, "--out", str(out)]) == 0
    assert out.exists()


def test_a_saved_model_of_no_known_decomposition(tmp_path):
    small_model(patch_sizes=(1, 3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"patch_sizes: expected patches that grow by 2 or by 4"):
        saved.open_model(tmp_path)


def test_sampling_in_parts(trained):
    """Each part is what it would be alone, with noise of its own; previews come whole."""
    recipe, model = saved.open_model(trained)
    flow, labels = recipe.build_flow(), torch.arange(5)
    previews, options = [], {"steps": (1, 1), "seed": 3}
    x = pictures.sample(
        model, flow, recipe, labels, 5, batch=2, preview=lambda i, p: previews.append((i, p)),
        **options,
    )  # fmt: skip
    assert x.shape == (5, 1, 16, 16)
    first = pictures.sample(model, flow, recipe, labels[:2], 2, **options)
    assert torch.equal(x[:2], first)
    again = pictures.sample(model, flow, recipe, labels[2:4], 2, **options)
    assert not torch.allclose(x[2:4], again)  # the second part's noise is not the first's
    assert [(i, len(p)) for i, p in previews] == [(0, 5), (1, 5)]
    assert torch.equal(previews[1][1], x)
    whole = pictures.sample(model, flow, recipe, labels, 5, batch=5, **options)
    assert torch.equal(whole, pictures.sample(model, flow, recipe, labels, 5, **options))


def test_training_and_sampling_through_the_compiler(tmp_path):
    """Inductor's code on a CPU: the losses of the plain run, and pictures."""
    losses = []
    for compile in (False, True):
        config = tiny(
            tmp_path / str(compile), steps=2, compile=compile,
            model=ModelConfig(width=16, depth=1, heads=1, patch_sizes=(4,)), flow=FlowConfig(),
        )  # fmt: skip
        losses.append([])
        loop.train(config, on_step=lambda r: losses[-1].append(r.loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for i, extra in enumerate(([], ["--compile"])):
        command = ["sample", str(tmp_path / "True"), "--steps", "1", "--count", "1", *extra]
        assert cli.main([*command, "--out", str(tmp_path / f"{i}.png")]) == 0
    plain, compiled = (Image.open(tmp_path / f"{i}.png").convert("L") for i in range(2))
    pairs = zip(plain.tobytes(), compiled.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1


# --- Weights to begin with ---


def begin(out, model, **changes):
    model.save_pretrained(out / "init")
    config = ModelConfig(width=32, depth=1, heads=2, patch_sizes=(2, 4), **changes)
    return tiny(out / "run", model=config, init=out / "init", steps=1)


def test_a_run_begins_with_given_weights(tmp_path):
    """One step of almost no length: the weights that were given, and one level more."""
    model = small_model(patch_sizes=(2,))
    config = begin(tmp_path, model, stage_embedding=True, block_conditioning=True)
    config = replace(config, optimizer=OptimizerConfig(lr=1e-12, weight_decay=0, warmup=0))
    loop.train(config)
    trained = saved.open_model(config.out)[1]
    x, y, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([[0.3, 1.0], [0.8, 1.0]])
    active = torch.tensor([[True, False]]).expand(2, 2)
    got, _ = trained([x, None], t, active, y=y)
    torch.testing.assert_close(got, model([x], t[:, :1], y=y)[0], atol=1e-6, rtol=1e-5)
    # What it has learnt since is gone on from, and not what it began with.
    assert loop.train(replace(config, steps=2), resume=True).step == 2


def test_a_run_begins_with_another_run(trained, tmp_path):
    config = tiny(tmp_path, steps=1, init=trained, model=MODEL)
    config = replace(config, optimizer=OptimizerConfig(lr=1e-12, weight_decay=0, warmup=0))
    loop.train(config)
    state = saved.open_model(trained)[1].state_dict()
    for name, value in saved.open_model(tmp_path)[1].state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-9, rtol=1e-6)


def test_preconditioned_weights_keep_their_deviations(tmp_path):
    model = small_model(patch_sizes=(2,), data_std=(0.625,))
    loop.train(config := begin(tmp_path, model, precondition=True))
    first, second = saved.open_model(config.out)[1].data_std
    assert first == 0.625
    assert 0 < second < 1
    assert loop.train(replace(config, steps=2), resume=True).step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64}, "hidden_size: expected 64, as the model was trained, got 32"),
        ({"num_classes": 3}, "num_classes: expected 3, as the model was trained, got 10"),
        ({"patch_sizes": (4,)}, r"patch_sizes: expected \[2, 4\] or the first of them, got \[4\]"),
        ({"in_channels": 3}, "in_channels: expected"),
        ({"qk_norm": False}, "qk_norm: expected False, as the model was trained, got True"),
        ({"data_std": (0.5, 0.5)}, "data_std: expected"),
    ],
)
def test_weights_that_do_not_fit_a_run_are_told(tmp_path, options, message):
    with pytest.raises(ValueError, match=rf"train: init .*init: {message}"):
        loop.train(begin(tmp_path, small_model(**options)))
    assert not (tmp_path / "run").exists()
