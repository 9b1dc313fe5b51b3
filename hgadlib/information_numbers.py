"""App. F in tables: on the two-dimensional toy, where the truth can be computed, and on a run's latents."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hgadlib.errors import InputError
from hgadlib.features import Features
from hgadlib.information import (
    antithetic_noise,
    class_information_bound,
    estimate_information,
    nested_class_information,
    nested_information,
)
from hgadlib.mixture import HierarchicalGaussianMixture, mixture_log_prob
from hgadlib.model import HGAD
from hgadlib.toy import fit_flow, toy_features

SEED = 1


@dataclass(frozen=True)
class TrainedDensity:
    """A trained flow and its inter-class mixture in float64, with features to try them on.

    Attributes:
        flow: Features (n, d) to latents and log-determinants.
        centers: Main centres, (K, d).
        log_weights: Log class weights, (K,).
        x: Features, (n, d).
        class_idx: Class of each, (n,).
    """

    flow: Callable[[Tensor], tuple[Tensor, Tensor]]
    centers: Tensor
    log_weights: Tensor
    x: Tensor
    class_idx: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Give the log-density of latents under the inter-class mixture (Eq. 13)."""
        return mixture_log_prob(z, self.centers, self.log_weights)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def train_toy(*, steps: int = 200, points: int = 200, seed: int = 0, **weights: Any) -> TrainedDensity:
    """Train the toy's flow and its three centres by Eq. 6 and 8.

    Args:
        steps: Of Adam.
        points: Of each of the three classes, even.
        seed: Of the first weights.
        **weights: See :func:`hgadlib.losses.hgad_losses`; lambda2 is alpha.
    """
    features, class_idx = toy_features(points)
    torch.manual_seed(seed)
    prior = HierarchicalGaussianMixture(3, 1, 2, init="normal")
    net, _ = fit_flow(
        features, class_idx, prior, steps=steps, seed=seed, **{"lambda_e": 0.0, "lambda_in": 0.0, **weights}
    )
    net, prior = net.double().requires_grad_(False), prior.double().requires_grad_(False)

    def flow(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = net(x[None])
        return z[0], log_det[0]

    x = features.double().flatten(0, 1)
    return TrainedDensity(flow, prior.centers, prior.log_weights, x, class_idx.repeat_interleave(points))


def level_density(
    model: HGAD, features: Features, class_idx: np.ndarray, *, level: int = -1, images: int = 24
) -> TrainedDensity:
    """Take one level of a trained model, with the features of some images spread over the set.

    Args:
        model: With a mixture prior.
        features: Of N images.
        class_idx: (N,).
        level: The level.
        images: How many images, at most.

    Raises:
        InputError: The model has one Gaussian for all classes.
    """
    flow, prior = model.levels[level]
    if not isinstance(prior, HierarchicalGaussianMixture):
        raise InputError("expected a prior with a centre per class, found one Gaussian for all classes")
    chosen = torch.from_numpy(np.linspace(0, len(features) - 1, images).round().astype(np.int64)).unique()
    x = features.batch(chosen, "cpu")[level].double()
    net = copy.deepcopy(flow).cpu().double().requires_grad_(False)
    positions = x.shape[1]

    def map_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = net(rows.unflatten(0, (-1, positions)))
        return z.flatten(0, 1), log_det.flatten()

    labels = torch.from_numpy(class_idx)[chosen].repeat_interleave(positions)
    centers, log_weights = (t.detach().cpu().double() for t in (prior.centers, prior.log_weights))
    return TrainedDensity(map_rows, centers, log_weights, x.flatten(0, 1), labels)


def feature_scale(density: TrainedDensity) -> float:
    """Give the features' root mean variance: the unit in which noise on them is large or small."""
    return density.x.var(0).mean().sqrt().item()


def information_by_noise(
    density: TrainedDensity, sigmas: Sequence[float], *, linearised: bool = False, per_dimension: bool = False
) -> pd.DataFrame:
    """Estimate Eq. 24 for several strengths of noise, and what it should approach.

    Args:
        density: The trained flow and prior.
        sigmas: Standard deviations of the noise, in units of the features.
        linearised: Also take the paper's expansion for B (needs the Jacobians: small d only).
        per_dimension: Divide all nats by d.

    Returns:
        A row a strength: "sigma", "information" (A + B), "limit" (expected L_g and the constants), "gap"
        (their difference), "linearised gap" where asked for, and "last term": the mean of
        |eps|^2 / 2 sigma^2, the last term of Eq. 27 without its sign.
    """
    dim = density.x.shape[1]
    unit = dim if per_dimension else 1
    rows = []
    for sigma in sigmas:
        found = estimate_information(density.flow, density.log_prob, density.x, sigma, generator=_generator())
        noise = sigma * torch.randn(len(density.x), dim, generator=_generator(), dtype=torch.float64)
        row = {
            "sigma": sigma,
            "information": found.information / unit,
            "limit": (found.nll + found.constants) / unit,
            "gap": found.gap / unit,
            "last term": (noise.square().sum(1).mean().item() / (2 * sigma**2)) / unit,
        }
        if linearised:
            paper = estimate_information(
                density.flow, density.log_prob, density.x, sigma, linearised=True, generator=_generator()
            )
            row["linearised gap"] = paper.gap / unit
        rows.append(row)
    return pd.DataFrame(rows)


def rate(sigmas: Sequence[float], gaps: Sequence[float]) -> float:
    """Fit the power with which a gap vanishes: the slope of log |gap| against log sigma.

    >>> round(rate([0.1, 0.01], [0.02, 0.0002]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sigmas), np.log(np.abs(np.asarray(gaps))), 1)[0])


@torch.no_grad()
def point_in_plane(density: TrainedDensity, sigma: float) -> dict[str, float]:
    """Compute what the losses say of the two informations, and what is true.

    Args:
        density: Of few dimensions, where the truth can be estimated from samples.
        sigma: Standard deviation of the noise.

    Returns:
        In nats: "A + B" and "true I(X, Z)"; "-L_mi" of the noisy latents, "weights" (what the class weights
        add to it) and "true I(Z, Y)".
    """
    noise = sigma * antithetic_noise(len(density.x), density.x.shape[1], _generator())
    noisy = density.flow(density.x + noise)[0]
    gain, weights = class_information_bound(noisy, density.class_idx, density.centers, density.log_weights)
    estimate = estimate_information(density.flow, density.log_prob, density.x, sigma, generator=_generator())
    return {
        "A + B": estimate.information,
        "true I(X, Z)": nested_information(density.x, sigma, generator=_generator()),
        "-L_mi": gain,
        "weights": weights,
        "true I(Z, Y)": nested_class_information(density.x, density.class_idx, sigma, generator=_generator()),
    }


def over_training(steps: Sequence[int], sigma: float, **weights: Any) -> pd.DataFrame:
    """Give :func:`point_in_plane` of toys trained for longer and longer: a row a number of steps."""
    rows = [point_in_plane(train_toy(steps=n, **weights), sigma) for n in steps]
    return pd.DataFrame(rows, index=pd.Index(list(steps), name="steps of training"))


def over_alpha(alphas: Sequence[float], sigma: float, **weights: Any) -> pd.DataFrame:
    """Give :func:`point_in_plane` of toys trained with several trade-offs alpha = lambda2: a row each."""
    rows = [point_in_plane(train_toy(lambda2=alpha, **weights), sigma) for alpha in alphas]
    return pd.DataFrame(rows, index=pd.Index(list(alphas), name="alpha"))


@torch.no_grad()
def class_information(density: TrainedDensity) -> dict[str, float]:
    """Compute -L_mi of a level's latents, what its class weights add, and the most that is possible.

    Returns:
        In nats: "-L_mi", "weights", "entropy of the classes".
    """
    z = density.flow(density.x)[0]
    gain, weights = class_information_bound(z, density.class_idx, density.centers, density.log_weights)
    share = torch.bincount(density.class_idx).double() / len(density.class_idx)
    share = share[share > 0]
    entropy = -(share * share.log()).sum().item()
    return {"-L_mi": gain, "weights": weights, "entropy of the classes": max(entropy, 0.0)}


def largest_nested(n: int) -> float:
    """Give the most that the estimate from n samples can be, log n, in nats."""
    return math.log(n)
