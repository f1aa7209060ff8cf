"""A run that distills: stopping and going on, what it saves, and its errors."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distillation_models import randomise
from helpers import torchrun
from small_models import small as small_dfm

from dfm_fast._library import INTERPRET
from dfm_fast.models import ClassTokens, SnapGenUNet
from dfm_fast.training import distributed, orders
from dfm_fast.training.config import OptimizerConfig
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.distillation import DistillationLoss, make_noisy
from dfm_fast.training.monitors import NotFinite
from dfm_fast.training.step_distillation import (
    FeatureHeads,
    discriminator_loss,
    step_distillation_loss,
)
from dfm_fast.training.students import DistillationConfig, distill
from dfm_fast.training.teachers import backbone, frozen

pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")

SIZES = {"in_channels": 1, "channels": (8, 16), "depths": (0, 1), "heads": (1, 2), "groups": 4}
WIDTHS = {"cross_dim": 8, "time_channels": 8, "self_attention": (False, True), "layers": 1}


def networks():
    torch.manual_seed(0)
    student = randomise(SnapGenUNet(**SIZES, **WIDTHS), 1)
    return student, small_dfm(patch_sizes=(4,), in_channels=1), ClassTokens(10, 2, 8)


def config(out, **changes):
    values = {"steps": 4, "batch": 4, "workers": 0, "save_every": 2, "sample_every": 0}
    values["precision"] = "fp32"
    data, ema = DataConfig(name="digits"), changes.pop("ema", 0.9999)
    optimizer = OptimizerConfig(lr=1e-2, warmup=1, ema=ema)
    values |= {"data": data, "optimizer": optimizer, "device": "cpu"}
    return DistillationConfig(out, **{**values, **changes})


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def run(settings, each=lambda student, tokens: None, **options):
    """(reports, student, tokens, outcome); `each` is called after every step."""
    student, teacher, tokens = networks()
    reports = []

    def on_step(report):
        reports.append(report)
        each(student, tokens)

    outcome = distill(
        settings, student, teacher, conditions=tokens, teacher_conditions=lambda y: {"y": y},
        on_step=on_step, **options,
    )  # fmt: skip
    return reports, student, tokens, outcome


def test_a_resumed_run_repeats_the_losses(tmp_path):
    whole, student, tokens, outcome = run(config(tmp_path / "a"))
    assert [r.step for r in whole] == [1, 2, 3, 4]
    assert outcome.step == 4
    run(config(tmp_path / "b", steps=2))
    rest, again, same, _ = run(config(tmp_path / "b"), resume=True)
    assert rest == whole[2:]
    for p, q in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(tokens.weight, same.weight)
    averages = [SnapGenUNet.from_pretrained(tmp_path / f / "model") for f in "ab"]
    for p, q in zip(*(average.parameters() for average in averages), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(tokens.weight, networks()[2].weight)  # they are trained


def test_a_step_is_the_losses(tmp_path):
    """The first report, from the parts."""
    settings = config(tmp_path / "a", steps=1, features=False, shift=2.0, class_dropout=0.5)
    (report,), *_ = run(settings)
    ordered = orders.Ordered(open_dataset(settings.data, "train"), 0, False, 0.5, 10)
    samples = [ordered[i] for i in range(4)]
    x, y = torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])
    assert (y == 10).any()  # a label was dropped
    student, teacher, tokens = networks()
    text = tokens(y)
    cond = {"text": text.text, "mask": text.mask}
    loss = DistillationLoss(teacher, 0, shift=2.0)
    want = loss(student, x, seed=0, cond=cond, teacher_cond={"y": y})
    told = {"task": want.task.mean().item(), "kd": want.kd.mean().item()}
    assert report.terms == pytest.approx(told, rel=1e-5)
    assert report.loss == pytest.approx(want.total.mean().item(), rel=1e-5)


def test_alone_it_is_flow_matching(tmp_path):
    settings = config(tmp_path / "a", steps=1)
    student, _, tokens = networks()
    reports = []
    distill(settings, student, conditions=tokens, on_step=reports.append)
    (report,) = reports
    ordered = orders.Ordered(open_dataset(settings.data, "train"), 0, False, 0.1, 10)
    x, y = zip(*(ordered[i] for i in range(4)), strict=True)
    student, _, tokens = networks()
    noisy = make_noisy(torch.stack(x), 0)
    text = tokens(torch.tensor(y))
    v = student(noisy.x_t, noisy.t, text.text, mask=text.mask)
    assert report.loss == pytest.approx((v - noisy.v).square().mean().item(), rel=1e-5)
    assert report.terms == {"task": report.loss}
    with pytest.raises(ValueError, match="few_steps: expected 0 without a teacher, got 4"):
        distill(config(tmp_path / "b", few_steps=4), student, conditions=tokens)


def test_a_resumed_run_to_few_steps_repeats_the_losses(tmp_path):
    """Its discriminator and that one's optimizer are saved, too."""
    whole, student, *_ = run(config(tmp_path / "a", few_steps=2))
    run(config(tmp_path / "b", few_steps=2, steps=2))
    rest, again, *_ = run(config(tmp_path / "b", few_steps=2), resume=True)
    assert rest == whole[2:]
    assert len({report.terms["discriminator"] for report in whole}) == 4
    for p, q in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_to_few_steps_is_the_losses(tmp_path):
    changes = {"few_steps": 4, "adversarial": 0.3, "shift": 2.0, "class_dropout": 0.0}
    settings = config(tmp_path / "a", steps=2, **changes)
    first, second = run(settings)[0]
    ordered = orders.Ordered(open_dataset(settings.data, "train"), 0, False, 0.0, 10)
    x, y = zip(*(ordered[i] for i in range(4)), strict=True)
    x, y = torch.stack(x), torch.tensor(y)
    student, teacher, tokens = networks()
    torch.manual_seed(0)
    heads, text = FeatureHeads(backbone(teacher).channels), tokens(y)
    losses = step_distillation_loss(
        student, frozen(teacher), heads, x, seed=0, steps=4, weight=0.3, shift=2.0,
        cond={"text": text.text, "mask": text.mask}, teacher_cond={"y": y},
    )  # fmt: skip
    told = discriminator_loss(frozen(teacher), heads, x, losses.x0, losses.s, seed=0, cond={"y": y})
    names = "task", "kd", "adversarial"
    want = {name: getattr(losses, name).mean().item() for name in names}
    want["discriminator"] = told.mean().item()
    assert first.terms == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert first.loss == pytest.approx(losses.total.mean().item(), rel=1e-4)
    assert second.terms["discriminator"] != first.terms["discriminator"]


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_the_average_is_saved(ema, tmp_path):
    settings = config(tmp_path / "a", steps=2, save_every=1, ema=ema)
    seen = []
    _, student, tokens, _ = run(settings, each=lambda s, t: seen.append((weights(s), weights(t))))
    # Of the weights after the first step, which the second step began with, and after the second.
    last = weights(student), weights(tokens)
    loaded = SnapGenUNet.from_pretrained(settings.out / "model")
    saved = torch.load(settings.out / "conditions.pt")
    for got, one, two in zip((loaded.state_dict(), saved), seen[0], last, strict=True):
        for name in got:
            kept = min(ema, 2 / 11)  # a short average forgets its beginning
            want = kept * one[name].double() + (1 - kept) * two[name].double()
            torch.testing.assert_close(got[name].double(), want, rtol=1e-5, atol=1e-7)
    assert (settings.out / "config.json").exists()


def close(report, values, rel):
    """Of a report, and one as JSON."""
    got = {**vars(report), **report.terms}
    want = {**values, **values["terms"]}
    for name in got.keys() - {"terms", "time"}:
        assert got[name] == pytest.approx(want[name], rel=rel, abs=rel / 1e3), name


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize(("few_steps", "kind"), [(0, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_two_ranks_give_the_losses_of_one(few_steps, kind, tmp_path):
    """From the start, and from their own checkpoint; one process goes on from theirs."""
    whole, student, *_ = run(config(tmp_path / "a", few_steps=few_steps))
    torchrun(__file__, str(few_steps), kind, str(tmp_path / "b"))
    found = json.loads((tmp_path / "b" / "reports.json").read_text())
    assert [report["step"] for report in found] == [1, 2, 3]
    for values, want in zip(found, whole, strict=False):
        # Adam's first steps have the size of lr, whatever rounding left of a gradient near 0.
        close(want, values, 1e-3)
    exported = SnapGenUNet.from_pretrained(tmp_path / "b" / "model").state_dict()
    assert exported.keys() == student.state_dict().keys()
    assert torch.load(tmp_path / "b" / "conditions.pt")["weight"].shape == (10, 16)
    assert len(list((tmp_path / "b" / "samples").iterdir())) == 2
    rest, *_ = run(config(tmp_path / "b", few_steps=few_steps), resume=True)
    assert [report.step for report in rest] == [4]
    close(whole[3], json.loads(json.dumps(vars(rest[0]))), 1e-2)


def test_the_network_is_compiled(tmp_path, monkeypatch):
    """Not the losses, whose seeds are other numbers at every step."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    _, student, *_ = run(config(tmp_path / "a", steps=1, compile=True))
    assert compiled == [student]


@pytest.mark.parametrize("few_steps", [0, 2])
def test_autocast_gives_nearly_the_losses(few_steps, tmp_path):
    wide, narrow = (
        run(config(tmp_path / p, steps=1, few_steps=few_steps, precision=p))[0][0]
        for p in ("fp32", "bf16")
    )
    assert narrow != wide
    close(narrow, vars(wide), 2e-2)


def test_parts_of_a_batch_give_the_losses_of_the_batch(tmp_path):
    whole, *_ = run(config(tmp_path / "a", steps=2))
    parts, *_ = run(config(tmp_path / "b", steps=2, accumulate=2))
    for got, want in zip(parts, whole, strict=True):
        close(got, vars(want), 1e-3)


def test_errors(tmp_path):
    settings = config(tmp_path / "a", steps=1)
    run(settings)
    with pytest.raises(ValueError, match=r"distill: out: expected a new folder, or --resume"):
        run(settings)
    with pytest.raises(ValueError, match=r"distill: batch: expected at least 1, got 0"):
        run(config(tmp_path / "b", batch=0))
    with pytest.raises(ValueError, match=r"distill: class_dropout: expected from 0 to 1, got 2"):
        run(config(tmp_path / "b", class_dropout=2))
    run(config(tmp_path / "c", steps=1, features=False))
    with pytest.raises(ValueError, match=r"loss\.projector"):
        run(config(tmp_path / "c", steps=2), resume=True)
    student, teacher, _ = networks()
    with pytest.raises(TypeError, match=r"distill: student: expected a Pretrained, got Linear"):
        distill(config(tmp_path / "d"), torch.nn.Linear(2, 2), teacher)
    teacher.heads.weight.data.fill_(torch.nan)
    with pytest.raises(NotFinite, match=r"step 1: .* the last good checkpoint: none"):
        distill(config(tmp_path / "d"), student, teacher, conditions=ClassTokens(10, 2, 8))


if __name__ == "__main__":  # what each rank runs: two steps, then a resumed one
    few_steps, kind, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    reports = []
    for steps in (2, 3):
        options = {"distribution": kind, "sample_every": 2, "sample_count": 2}
        options["accumulate"] = 1 if few_steps else 2
        settings = config(folder, few_steps=few_steps, steps=steps, **options)
        reports += run(settings, resume=steps == 3)[0]
    if dist.get_rank() == 0:
        (folder / "reports.json").write_text(json.dumps([vars(report) for report in reports]))
    distributed.leave(0)
