"""Synthetic features, a model of a few hundred weights, and a folder of small images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from hgadlib.config import Config, FlowConfig, PriorConfig, config_from_dict
from hgadlib.features.store import Features
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD

GRIDS = ((3, 4), (2, 2))
CHANNELS = (6, 4)


def reference_log_prob(z: Tensor, centers: Tensor, weights: Tensor) -> Tensor:
    """Mixture log-density by torch.distributions, in float64: z (N, D), centers (K, D), weights (K,)."""
    centers = centers.double()
    components = Independent(Normal(centers, torch.ones_like(centers)), 1)
    return MixtureSameFamily(Categorical(weights.double()), components).log_prob(z.double())


def covariances(n_classes: int, dim: int) -> Tensor:
    """Covariances with deviations from about 0.3 to 3, (K, D, D) float64."""
    roots = torch.randn(n_classes, dim, dim, dtype=torch.float64)
    return roots @ roots.mT / dim + 0.1 * torch.eye(dim)


def prior_with_covariances(
    n_classes: int, n_centers: int, dim: int, covariance: str
) -> tuple[HierarchicalGaussianMixture, Tensor]:
    """A float64 prior with nothing at its initial value, and its covariances, (K, D, D)."""
    prior = HierarchicalGaussianMixture(n_classes, n_centers, dim, covariance=covariance, rank=2).double()
    for k, own in enumerate(covariances(n_classes, dim)):
        prior.set_covariance(k, own, floor=0.01)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    whitening = prior.whitening()
    assert whitening is not None
    return prior, torch.linalg.inv(whitening.factor.detach().mT @ whitening.factor.detach())


def reference_with_covariances(z: Tensor, centers: Tensor, weights: Tensor, covariance: Tensor) -> Tensor:
    """Mixture log-density by torch.distributions: z (N, D), centers (K, D), covariances (..., D, D)."""
    components = MultivariateNormal(centers, covariance.expand(len(centers), -1, -1))
    return MixtureSameFamily(Categorical(weights), components).log_prob(z)


def features(n: int, *, n_classes: int = 2, seed: int = 0, shift: float = 0.0) -> tuple[Features, np.ndarray]:
    """Make features of n images: each class a blob of its own, `shift` away from where it belongs."""
    generator = torch.Generator().manual_seed(seed)
    class_idx = torch.arange(n) % n_classes
    levels = []
    for (height, width), channels in zip(GRIDS, CHANNELS, strict=True):
        noise = torch.randn(n, height * width, channels, generator=generator)
        levels.append(0.5 * noise + 3.0 * class_idx[:, None, None] + shift)
    return Features(tuple(levels), GRIDS, "key", "host", True, 0.0), class_idx.numpy()


# Whatever the defaults are: a flow that is no rotation before it is trained, the published prior.
FLOW = FlowConfig(layers=2, position_dim=4, hidden_ratio=1.0, subnet_init="default", shrinkage=1e-3)
PRIOR = PriorConfig(covariance="identity", n_centers=3, init="normal")


def model(
    *,
    n_classes: int = 2,
    seed: int = 0,
    kind: str = "mixture",
    flow: FlowConfig | None = None,
    prior: PriorConfig = PRIOR,
) -> HGAD:
    """Make a small model of its own seed."""
    torch.manual_seed(seed)
    prior = replace(prior, kind="single" if kind == "single" else "mixture")
    names = [f"class{k}" for k in range(n_classes)]
    return HGAD(names, CHANNELS, GRIDS, flow=flow or FLOW, prior=prior)


def image_folder(root: Path, *, classes: tuple[str, ...] = ("disc", "square"), masks: bool = True) -> Path:
    """Write images of two kinds, 32x32, in MVTec layout: 6 to train on, 3 normal and 3 anomalous ones."""
    for number, name in enumerate(classes):
        for split, kind, count in (("train", "good", 6), ("test", "good", 3), ("test", "spot", 3)):
            folder = root / name / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([number, i, len(split), len(kind)])
                pixels = rng.integers(90, 120, (32, 32, 3)).astype(np.uint8)
                pixels[8:24, 8:24, number] = 220
                mask = np.zeros((32, 32), np.uint8)
                if kind == "spot":
                    row, column = rng.integers(4, 20, 2)
                    mask[row : row + 8, column : column + 8] = 255
                    pixels[mask > 0] = 0
                    if masks:
                        target = root / name / "ground_truth" / kind / f"{i:03d}_mask.png"
                        target.parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(mask).save(target)
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def folder_config(root: Path, run_dir: Path | None, **more: Any) -> Config:
    """Configure a run of two epochs on such a folder; no parameter file is read."""
    values: dict[str, Any] = {
        "dataset": "folder",
        "device": "cpu",
        "run_dir": None if run_dir is None else str(run_dir),
        "data": {"root": str(root), "image_size": 64},
        "features": {"backbone": "tf_efficientnet_lite0", "out_indices": [2, 3], "pyramid": None},
        "flow": {"layers": 2, "position_dim": 8},
        "prior": {"n_centers": 2},
        "train": {"epochs": 2, "batch_size": 4},
        "score": {"map_size": 32},
    }
    for key, value in more.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return config_from_dict(values)
