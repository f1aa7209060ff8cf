"""Fréchet distances against closed forms; features and classifiers that need no weights."""

import json
import math
import sys

import pytest
import torch
from helpers import ROOT, run_python

from dfm_fast._library import INTERPRET
from dfm_fast.cli import report
from dfm_fast.training import evaluation
from dfm_fast.training.datasets import DataConfig, open_dataset
from dfm_fast.training.evaluation import FeatureNetwork, frechet_distance, network_distance

sys.path.append(str(ROOT))  # `benchmarks` is not installed

from benchmarks import dfm_against_flow_matching

pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")


def features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, root, n=200):
    """[n, d] whose mean is exactly `mean` and whose covariance exactly root' root."""
    x = features(n, len(root))
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return mean + white @ root


# --- The distance ---------------------------------------------------------------------------------


def test_diagonal_covariances_have_a_closed_form():
    a, b = torch.tensor([1.0, 2, 3]).double(), torch.tensor([4.0, 0.5, 3]).double()
    mean = torch.tensor([1.0, -2, 0.5]).double()
    x, y = with_moments(torch.zeros(3).double(), a.diag()), with_moments(mean, b.diag())
    expected = (mean.square().sum() + (a - b).square().sum()).item()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_any_covariances_against_matrix_roots():
    """scipy's root of the product, which is accurate where it is well conditioned."""
    scipy = pytest.importorskip("scipy.linalg")
    x, y = features(300, 6) @ features(6, 6, 1), features(200, 6, 2) @ features(6, 6, 3) + 1
    s, t = x.T.cov().numpy(), y.T.cov().numpy()
    root = scipy.sqrtm(s @ t).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + (s + t - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_rotated_and_scaled_normals():
    """Covariances S and c² S, of any S: (1 - c)² tr(S)."""
    root = features(5, 5)
    x = with_moments(torch.zeros(5).double(), root)
    expected = 0.25 * root.square().sum().item()
    assert frechet_distance(x, 1.5 * x) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances():
    """Rank 2 in 8 dimensions, in planes that share one direction: by hand, as if in 3."""
    basis = torch.linalg.qr(features(8, 8)).Q
    x = with_moments(torch.zeros(2).double(), torch.tensor([2.0, 3.0]).double().diag())
    a, b = x @ basis[:2], x @ basis[1:3]
    # Roots along e1, e2, e3: (2, 3, 0) and (0, 2, 3).
    assert frechet_distance(a, b) == pytest.approx(4 + 1 + 9, rel=1e-12)


def test_fewer_samples_than_dimensions():
    x = features(5, 40)
    assert frechet_distance(x, x + 1) == pytest.approx(40, rel=1e-12)


@pytest.mark.parametrize("shape", [(500, 10), (20, 64), (2, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_equal_sets_have_distance_zero(shape, scale):
    x = scale * features(*shape)
    x[:, -1] = 7.0  # one feature is constant
    spread = x.var(0).sum().item()
    assert frechet_distance(x, x) <= 1e-13 * spread  # roundings of a sum, not roots of roundings
    assert frechet_distance(x, x.flip(0)) <= 1e-13 * spread


def test_order_does_not_matter_and_sides_are_alike():
    x, y = features(100, 12), 2 * features(80, 12, 1) + 0.3
    d = frechet_distance(x, y)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(x[order], y) == pytest.approx(d, rel=1e-12)
    assert frechet_distance(y, x) == pytest.approx(d, rel=1e-12)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(d, rel=1e-5)


def test_a_large_mean_does_not_cancel():
    x, y = features(100, 4), 2 * features(80, 4, 1)
    expected = frechet_distance(x, y)
    assert frechet_distance(x + 1e6, y + 1e6) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"features_a: expected \[N, D\] with N at least 2"),
        (torch.zeros(5), torch.zeros(5, 3), r"features_a: expected \[N, D\]"),
        (torch.zeros(5, 3), torch.zeros(5, 4), r"features_b: expected \[M, 3\] like features_a"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "features_b: expected finite"),
    ],
)
def test_bad_features(a, b, message):
    with pytest.raises(ValueError, match=f"frechet_distance: {message}"):
        frechet_distance(a, b)


# --- Embedded features ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return [evaluation.gather(open_dataset(DataConfig("digits"), s)) for s in ("train", "test")]


def test_principal_components_keep_distances(digits):
    """All of them are a rotation: the distance is that of the pixels."""
    (x, _), (y, _) = digits
    pca = evaluation.pca_features(x[:, :, ::4, ::4], components=16)
    small = [v[:, :, ::4, ::4] for v in (x, y)]
    expected = frechet_distance(*(v.flatten(1) for v in small))
    assert frechet_distance(*map(pca, small)) == pytest.approx(expected, rel=1e-6)


def test_spaces_tell_data_from_worse_data(digits):
    (x, labels), (y, _) = digits
    generator = torch.Generator().manual_seed(0)
    noisy = x + 0.3 * torch.randn(x.shape, generator=generator)
    for name, space in evaluation.feature_spaces(x, labels).items():
        real = space(y)
        near, noise, mirrored = (frechet_distance(space(v), real) for v in (x, noisy, x.flip(-1)))
        assert near < noise, name
        assert 5 * near < mirrored, name
    assert set(evaluation.feature_spaces(x)) == {"pca"}


def test_classifier_agreement(digits):
    (x, labels), (y, test_labels) = digits
    classifier = evaluation.fit_classifier(x, labels)
    assert evaluation.classifier_agreement(y, test_labels, classifier) >= 0.98
    wrong = (test_labels + 1) % 10
    assert evaluation.classifier_agreement(y, wrong, classifier) < 0.02
    with pytest.raises(ValueError, match="labels: expected 360 labels, got 5"):
        evaluation.classifier_agreement(y, labels[:5], classifier)


def test_gather_spreads_evenly():
    data = open_dataset(DataConfig("photos", crop_stride=16))
    x, _ = evaluation.gather(data, 30)
    assert x.shape == (30, 3, 64, 64)
    assert torch.equal(x[10], data[10 * len(data) // 30][0])
    assert len(evaluation.gather(data)[1]) == len(data)


# --- Networks -------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 5, 3, 2)

    def forward(self, x):
        return self.layer(x).tanh().flatten(2).mean(2)


class Switched(Small):
    """Takes 0 to 255 and a switch, as the file of Inception does."""

    def forward(self, x, return_features: bool = False):
        out = self.layer(x / 255).tanh().flatten(2).mean(2)
        return out if return_features else out.sum(1)


@pytest.fixture(scope="module")
def network_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small, switched = Small().eval(), Switched().eval()
    switched.load_state_dict(small.state_dict())
    batch, height, width = (torch.export.Dim(name, min=5 * (name != "n")) for name in "nhw")
    sizes = {"x": {0: batch, 2: height, 3: width}}
    program = torch.export.export(small, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=sizes)
    torch.export.save(program, folder / "small.pt2")
    torch.jit.script(switched).save(folder / "switched.pt")
    return folder, small


def test_networks_from_files(network_files):
    folder, small = network_files
    pictures = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    expected = small(pictures / 255)
    plain = FeatureNetwork(folder / "small.pt2")
    assert torch.allclose(plain(pictures), expected, atol=1e-6)
    inception = FeatureNetwork(folder / "switched.pt", "inception")
    assert torch.allclose(inception(pictures), expected, atol=1e-6)
    large = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in evaluation.INPUTS["dinov2"][1:])
    dino = FeatureNetwork(folder / "small.pt2", "dinov2")
    assert torch.allclose(dino(large), small((large / 255 - mean) / std), atol=1e-4)
    assert dino(pictures).shape == (4, 5)
    with pytest.raises(FileNotFoundError, match="FeatureNetwork: path: expected a file"):
        FeatureNetwork(folder / "none.pt")
    with pytest.raises(ValueError, match=r"a network that gives \[N, D\], got \[4\]"):
        FeatureNetwork(folder / "switched.pt")(pictures)


def test_distance_of_a_network_is_ours_in_its_features(network_files, digits):
    folder, _ = network_files
    network = FeatureNetwork(folder / "small.pt2")
    (x, _), (y, _) = digits
    x, y = x[:300], y.clamp(-1, 0.3)
    got = network_distance(x.split(128), y.split(100), network)

    def of(v):
        return network(((v + 1) * 127.5).round().byte().expand(-1, 3, -1, -1))

    assert got == pytest.approx(frechet_distance(of(x), of(y)), rel=1e-4)


def test_torchmetrics_is_named_where_it_is_missing():
    code = """
import sys; sys.modules["torchmetrics"] = None
from dfm_fast.training.evaluation import network_distance
network_distance([], [], None)
"""
    assert "expected torchmetrics, got none" in run_python("-c", code).stderr


def test_the_comparison_is_made_once_and_is_no_row_of_the_report(tmp_path, capsys, monkeypatch):
    out = tmp_path / dfm_against_flow_matching.OUT.relative_to(ROOT / report.DEFAULT)
    short = ["--steps", "2", "--batch", "8", "--samples", "32", "--seeds", "1", "--points", "1"]
    argv = ["digits", "--out", str(out), *short]
    assert dfm_against_flow_matching.main(argv) == 0
    found = json.loads((out / "digits.json").read_text())["entries"]
    assert [(e["method"], e.get("cfg")) for e in found] == [
        ("training split", None),
        *((m, cfg) for m in dfm_against_flow_matching.METHODS for cfg in (1.0, 1.5)),
    ]
    floor, *others = found
    for e in others:
        assert 0 < floor["pca"] < e["pca"] < math.inf  # two steps train nothing
    times = [p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()]
    table = capsys.readouterr().out.partition("against the test split")[2]
    assert dfm_against_flow_matching.main(argv) == 0  # nothing is left to do
    assert capsys.readouterr().out.partition("against the test split")[2] == table
    assert [p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()] == times
    # Weights that are not averaged are results of their own; an untrained model's are the same.
    assert dfm_against_flow_matching.main([*argv, "--last"]) == 0
    entries = json.loads((out / "digits.json").read_text())["entries"]
    assert entries[: len(found)] == found
    last = entries[len(found) :]
    assert [(e["method"], e["cfg"]) for e in last] == [(e["method"], e["cfg"]) for e in others]
    for e, averaged in zip(last, others, strict=True):
        assert e["weights"] == "last"
        assert (e["pca"] == averaged["pca"]) == ("untrained" in e["method"])
    # Nothing is left to do where a result is older than a field of the configuration.
    for e in found[1:]:
        del e["config"]["init"], e["config"]["model"]["flip_time"]
    (out / "digits.json").write_text(json.dumps({"entries": found}))
    monkeypatch.setattr(dfm_against_flow_matching, "train", None)
    assert dfm_against_flow_matching.main(argv) == 0
    with pytest.raises(report.ReportError, match="found none"):
        report.load(tmp_path)
