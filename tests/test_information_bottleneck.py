"""App. F in numbers: the noisy mutual information approaches the expected L_g up to its constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hgadbook.information_bottleneck import (
    InformationEstimate,
    antithetic_noise,
    estimate_information,
    information_constants,
    nested_information,
)
from hgadbook.method import fit_flow, toy_features
from hgadlib.mixture import HierarchicalGaussianMixture, mixture_log_prob


@dataclass(frozen=True)
class Trained:
    """A trained small flow in float64, its prior's density, its features, and how to estimate with them."""

    flow: Callable[[Tensor], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor], Tensor]
    x: Tensor

    def estimate(self, sigma: float, linearised: bool = False) -> InformationEstimate:
        generator = torch.Generator().manual_seed(1)
        return estimate_information(
            self.flow, self.log_prob, self.x, sigma, linearised=linearised, generator=generator
        )


def train(dim: int, steps: int = 150) -> Trained:
    features, class_idx = toy_features(200)
    features = features.double()
    torch.manual_seed(0)
    if dim > 2:  # further channels that follow the first two
        noise = 0.3 * torch.randn(3, 200, dim - 2, dtype=torch.float64)
        features = torch.cat([features, noise + features.sum(-1, keepdim=True).sin()], -1)
    prior = HierarchicalGaussianMixture(3, 1, dim, init="normal").double()
    net, _ = fit_flow(features, class_idx, prior, steps=steps, lambda2=1.0, lambda_in=0.0)
    centers, log_weights = prior.centers.detach(), prior.log_weights.detach()

    def flow(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = net(x[None])
        return z[0], log_det[0]

    return Trained(flow, lambda z: mixture_log_prob(z, centers, log_weights), features.flatten(0, 1))


@pytest.fixture(scope="module", params=[2, 3, 4])
def model(request: pytest.FixtureRequest) -> Trained:
    return train(request.param)


def test_noisy_information_approaches_the_loss(model: Trained) -> None:
    gaps = {sigma: model.estimate(sigma).gap for sigma in (0.2, 0.05, 0.01, 1e-3)}
    assert gaps[0.2] > 0.3  # noise of this size is not small
    assert abs(gaps[1e-3]) < 1e-4
    # and it does so as sigma squared (at smaller sigma too few points meet a kink of a ReLU to count)
    assert gaps[0.01] == pytest.approx(gaps[0.05] / 25, rel=0.2)


def test_so_does_the_paper_s_linearisation(model: Trained) -> None:
    gaps = [abs(model.estimate(sigma, linearised=True).gap) for sigma in (0.2, 1e-3)]
    assert gaps[1] < 2e-3
    assert model.estimate(1e-3, linearised=True).conditional == pytest.approx(
        model.estimate(1e-3).conditional, abs=2e-3
    )
    assert gaps[1] < gaps[0]


def test_it_exceeds_the_true_information_the_less_the_better_the_fit() -> None:
    # I(X, X + E) needs no flow; the excess is the divergence between the latents and the prior.
    excess = []
    for steps in (1, 20, 200):
        model = train(2, steps)
        true = nested_information(model.x, 0.1, generator=torch.Generator().manual_seed(0))
        excess.append(model.estimate(0.1).information - true)
    assert excess[0] > excess[1] > excess[2] > 0


def test_standard_normal_through_the_identity() -> None:
    # By hand: L_g(x + e) - L_g(x) averages to |e|^2 / 2, which is d sigma^2 / 2.
    x = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    identity = lambda v: (v, torch.zeros(len(v), dtype=v.dtype))  # noqa: E731
    prior = lambda z: mixture_log_prob(z, torch.zeros(1, 3).to(z), torch.zeros(1).to(z))  # noqa: E731
    estimate = estimate_information(identity, prior, x, 0.5)
    assert estimate.gap == pytest.approx(3 * 0.5**2 / 2, abs=1e-9)
    assert estimate.constants == pytest.approx(-3 * math.log(0.5) - 1.5 * math.log(2 * math.pi * math.e))
    # here the prior fits, so it is the mutual information of a Gaussian channel up to sampling
    channel = 1.5 * math.log(1 + 1 / 0.5**2)
    assert nested_information(x, 0.5) == pytest.approx(channel, abs=0.1)
    assert estimate.information >= channel - 0.1


def test_noise_is_balanced() -> None:
    noise = antithetic_noise(100, 3)
    assert noise.sum(0).abs().max() < 1e-12
    assert noise.square().mean().item() == pytest.approx(1)
    assert information_constants(2, 1.0) == pytest.approx(-math.log(2 * math.pi * math.e))
    with pytest.raises(ValueError, match="even number"):
        antithetic_noise(3, 2)
    with pytest.raises(ValueError, match="positive standard deviation"):
        estimate_information(lambda v: (v, v[:, 0]), lambda z: z[:, 0], torch.zeros(2, 2), 0.0)
