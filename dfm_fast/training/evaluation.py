"""How close samples are to data.

The Fréchet distance between two sets of features is that between normal distributions of their
means m and covariances S (Dowson & Landau 1982):

    |m_a - m_b|² + tr(S_a) + tr(S_b) - 2 tr((S_a^½ S_b S_a^½)^½)

Features: principal components of the training data, or a small classifier's last hidden layer; both
are fitted in seconds and need no weights. FID and FDD are the same distance in the features of
Inception and DINOv2, whose weights the user has: `FeatureNetwork`, `network_distance`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfm_fast import _checks
from dfm_fast.training.datasets import Dataset, require

Features = Callable[[Tensor], Tensor]  # [N, ...] -> float64 [N, D]

# --- The distance ---------------------------------------------------------------------------------


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features, in float64.

    The trace of the root is computed without ever forming a covariance, whose small eigenvalues
    lose half of their digits when roots are drawn. With S = R'R, R from the QR decomposition of the
    centred features over (N - 1)^½, it is the sum of the singular values of R_a R_b'. So
    covariances may be singular, and sets that are equal have distance 0 to rounding.

    Args:
        features_a, features_b: [N, D] and [M, D]; N and M at least 2.
    """
    op = "frechet_distance"
    for name, x in (("features_a", features_a), ("features_b", features_b)):
        if x.ndim != 2 or len(x) < 2:
            _checks.fail(op, name, "[N, D] with N at least 2", list(x.shape))
        if not x.isfinite().all():
            _checks.fail(op, name, "finite numbers", "inf or nan")
    if features_a.shape[1] != features_b.shape[1]:
        expected = f"[M, {features_a.shape[1]}] like features_a"
        _checks.fail(op, "features_b", expected, list(features_b.shape))
    (mean_a, root_a), (mean_b, root_b) = _normal(features_a), _normal(features_b)
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(0.0, ((mean_a - mean_b).square().sum() + spread).item())


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [D], R with R'R the covariance)"""
    x = x.detach().double().cpu()
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


# --- Features that need no weights ----------------------------------------------------------------


def pca_features(x: Tensor, components: int = 64) -> Features:
    """The first principal components of data x [N, ...], not whitened."""
    require("sklearn", "scikit-learn", "evaluation")
    from sklearn.decomposition import PCA

    flat = _flat(x)
    components = min(components, *flat.shape)
    pca = PCA(components, svd_solver="randomized", random_state=0).fit(flat)
    return lambda samples: torch.from_numpy(pca.transform(_flat(samples)))


def classifier_features(x: Tensor, labels: Tensor) -> Features:
    """Last hidden layer of a small network trained to tell the labels of data x [N, ...]."""
    require("sklearn", "scikit-learn", "evaluation")
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier((128, 32), random_state=0, max_iter=60, early_stopping=True)
    network.fit(_flat(x), labels.numpy())

    def features(samples: Tensor) -> Tensor:
        hidden = _flat(samples)
        for weight, bias in list(zip(network.coefs_, network.intercepts_, strict=True))[:-1]:
            hidden = np.maximum(hidden @ weight + bias, 0)
        return torch.from_numpy(hidden)

    return features


def feature_spaces(x: Tensor, labels: Tensor | None = None) -> dict[str, Features]:
    """Name -> features fitted on training data; the classifier's where there are labels."""
    spaces = {"pca": pca_features(x)}
    return spaces if labels is None else {**spaces, "classifier": classifier_features(x, labels)}


def fit_classifier(x: Tensor, labels: Tensor) -> Any:
    """A support vector machine, which shares nothing with `classifier_features`: of digits it names
    98 % right."""
    require("sklearn", "scikit-learn", "evaluation")
    from sklearn.svm import SVC

    return SVC().fit(_flat(x), labels.numpy())


def classifier_agreement(samples: Tensor, labels: Tensor, classifier: Any) -> float:
    """Share of the samples that a classifier (`fit_classifier`) gives the label they were made
    for."""
    if len(samples) != len(labels):
        _checks.fail("classifier_agreement", "labels", f"{len(samples)} labels", len(labels))
    return float((classifier.predict(_flat(samples)) == labels.cpu().numpy()).mean())


def gather(dataset: Dataset, count: int | None = None) -> tuple[Tensor, Tensor]:
    """(x [N, ...], labels [N]) of a dataset; of `count` samples, spread evenly over it."""
    total = len(dataset)
    count = total if count is None else min(count, total)
    items = [dataset[i * total // count] for i in range(count)]
    return torch.stack([x for x, _ in items]), torch.tensor([label for _, label in items])


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().cpu().flatten(1).double().numpy()


# --- Features of networks that the user has -------------------------------------------------------


# How each network wants its pictures: (side, 0 for as they are; mean; deviation) of [0, 1].
INPUTS = {
    "plain": (0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    # It takes 0 to 255 and resizes for itself.
    "inception": (0, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "dinov2": (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class FeatureNetwork(nn.Module):
    """A network from a file: uint8 [N, 3, H, W] -> features [N, D].

    Args:
        path: a program of torch.export (.pt2) or TorchScript (any other ending), such as the usual
            inception-2015-12-05.pt.
        inputs: one of `INPUTS`: "inception" (FID), "dinov2" (FDD), or "plain" ([0, 1] as it is).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: str | os.PathLike[str], inputs: str = "plain") -> None:
        super().__init__()
        path = Path(path)
        _checks.choice("FeatureNetwork", "inputs", inputs, list(INPUTS))
        if not path.is_file():
            raise FileNotFoundError(f"FeatureNetwork: path: expected a file, got {path}")
        if path.suffix == ".pt2":
            self.network = torch.export.load(path).module()
        else:
            self.network = torch.jit.load(path, map_location="cpu").eval()
        self.size, mean, std = INPUTS[inputs]
        # The file's classifier has a switch for what comes before it.
        self.options = {"return_features": True} if inputs == "inception" else {}
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float() / 255
        if self.size:
            side = (self.size, self.size)
            x = F.interpolate(x, side, mode="bicubic", antialias=True).clamp(0, 1)
        out = self.network((x - self.mean) / self.std, **self.options)
        if out.ndim != 2:
            _checks.fail("FeatureNetwork", "path", "a network that gives [N, D]", list(out.shape))
        return out


def network_distance(
    real: Iterable[Tensor],
    samples: Iterable[Tensor],
    network: nn.Module,
    *,
    device: torch.device | str = "cpu",
) -> float:
    """FID, FDD: the Fréchet distance in the features of a network, by torchmetrics.

    Args:
        real, samples: batches [N, 1 or 3, H, W] in [-1, 1]; they become 8-bit pictures.
        network: uint8 [N, 3, H, W] -> [N, D], such as a `FeatureNetwork`.
    """
    require("torchmetrics", "torchmetrics", "evaluation")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = None
    for batches, is_real in ((real, True), (samples, False)):
        for batch in batches:
            pictures = ((batch + 1) * 127.5).round().clamp(0, 255).byte()
            pictures = pictures.expand(-1, 3, -1, -1).to(device)
            if metric is None:
                network.num_features = network.to(device)(pictures[:1]).shape[1]
                metric = FrechetInceptionDistance(network).to(device).set_dtype(torch.float64)
            metric.update(pictures, real=is_real)
    if metric is None:
        _checks.fail("network_distance", "real", "batches", "none")
    return metric.compute().item()
