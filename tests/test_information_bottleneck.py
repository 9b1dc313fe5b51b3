"""App. F in numbers: the noisy information approaches L_g, the bounds bound, and the truth stays."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import small
import torch
from torch import Tensor

from hgadbook.information_bottleneck import (
    Density,
    antithetic_noise,
    bottleneck_sentences,
    bounds_over_training,
    class_information,
    class_information_bound,
    estimate_information,
    gap_rates,
    information_by_noise,
    information_limit,
    information_plane,
    level_density,
    nested_information,
    over_alpha,
    over_training,
    rate,
    train_toy,
)
from hgadbook.method import fit_flow, toy_features
from hgadlib.config import PriorConfig
from hgadlib.errors import InputError
from hgadlib.losses import hgad_losses
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.model import HGAD


def train(dim: int, steps: int = 150) -> Density:
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

    return Density(flow, centers, log_weights, features.flatten(0, 1), class_idx.repeat_interleave(200))


@pytest.fixture(scope="module", params=[2, 3, 4])
def model(request: pytest.FixtureRequest) -> Density:
    return train(request.param)


def test_noisy_information_approaches_the_loss(model: Density) -> None:
    gaps = {sigma: estimate_information(model, sigma).gap for sigma in (0.2, 0.05, 0.01, 1e-3)}
    assert gaps[0.2] > 0.3  # noise of this size is not small
    assert abs(gaps[1e-3]) < 1e-4
    # and it does so as sigma squared (at smaller sigma too few points meet a kink of a ReLU to count)
    assert gaps[0.01] == pytest.approx(gaps[0.05] / 25, rel=0.2)


def test_so_does_the_paper_s_linearisation(model: Density) -> None:
    gaps = [abs(estimate_information(model, sigma, linearised=True).gap) for sigma in (0.2, 1e-3)]
    assert gaps[1] < 2e-3
    assert estimate_information(model, 1e-3, linearised=True).conditional == pytest.approx(
        estimate_information(model, 1e-3).conditional, abs=2e-3
    )
    assert gaps[1] < gaps[0]


def test_it_exceeds_the_true_information_the_less_the_better_the_fit() -> None:
    # I(X, X + E) needs no flow; the excess is the divergence between the latents and the prior.
    excess = []
    for steps in (1, 20, 200):
        model = train(2, steps)
        true = nested_information(model.x, 0.1)
        excess.append(estimate_information(model, 0.1).information - true)
    assert excess[0] > excess[1] > excess[2] > 0


def identity(x: Tensor) -> Density:
    """The flow that changes nothing, and one standard Gaussian."""
    zero = torch.zeros(1, dtype=torch.float64)
    classes = torch.zeros(len(x), dtype=torch.int64)
    return Density(
        lambda v: (v, torch.zeros_like(v[:, 0])), torch.zeros(1, x.shape[1]).to(x), zero, x, classes
    )


def test_standard_normal_through_the_identity() -> None:
    # By hand: L_g(x + e) - L_g(x) averages to |e|^2 / 2, which is d sigma^2 / 2.
    x = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = estimate_information(identity(x), 0.5)
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
    with pytest.raises(ValueError, match="even number"):
        antithetic_noise(3, 2)
    with pytest.raises(ValueError, match="positive standard deviation"):
        estimate_information(identity(torch.zeros(2, 2)), 0.0)


def blobs(distance: float, n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Two unit Gaussians with their classes and centres."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [distance, 0.0]], dtype=torch.float64)
    class_idx = torch.arange(n) % 2
    x = centers[class_idx] + torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, class_idx, centers


def test_class_information_from_samples() -> None:
    x, class_idx, _ = blobs(50.0)
    assert nested_information(x, 0.5, class_idx) == pytest.approx(math.log(2), abs=1e-6)
    x, class_idx, _ = blobs(1.0)
    values = [nested_information(x, sigma, class_idx) for sigma in (0.3, 1.0, 30.0)]
    assert math.log(2) > values[0] > values[1] > values[2]
    assert abs(values[2]) < 0.01
    # A function of X cannot be known better than X.
    assert values[1] < nested_information(x, 1.0)


def test_eq_8_bounds_the_information_between_latent_and_class() -> None:
    x, class_idx, centers = blobs(2.0, 20_000)
    half = torch.full((2,), 0.5, dtype=torch.float64).log()
    flow = identity(x).flow

    def bound(own: Tensor, log_weights: Tensor) -> tuple[float, float]:
        return class_information_bound(Density(flow, own, log_weights, x, class_idx), x)

    right, zero = bound(centers, half)
    assert zero == pytest.approx(0, abs=1e-12)
    # The true value by quadrature along the line through the centres.
    t = torch.linspace(-12, 14, 20_001, dtype=torch.float64)
    p0, p1 = (torch.exp(-((t - c) ** 2) / 2) / math.sqrt(2 * math.pi) for c in (0.0, 2.0))
    mean = (p0 + p1) / 2
    density = 0.5 * (torch.special.xlogy(p0, p0 / mean) + torch.special.xlogy(p1, p1 / mean))
    true = torch.trapezoid(density, t).item()
    assert right == pytest.approx(true, abs=0.01)
    # A wrong posterior is a lower bound; wrong weights add their divergence.
    assert bound(3 * centers, half)[0] < true - 0.01
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    gain, divergence = bound(centers, weights)
    assert divergence == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert gain - divergence < true


def test_training_moves_the_bounds_and_not_the_truth() -> None:
    table = over_training([1, 60], 0.1, lambda2=1.0, detach_class_weights=True, points=60)
    assert table["true I(X, Z)"].nunique() == table["true I(Z, Y)"].nunique() == 1
    assert (table["A + B"] > table["true I(X, Z)"]).all()
    assert table["A + B"].iloc[0] > table["A + B"].iloc[1]
    assert table["-L_mi"].iloc[0] < table["-L_mi"].iloc[1] <= table["true I(Z, Y)"].iloc[1] + 1e-3
    assert table["weights"].abs().max() < 1


def test_alpha_weighs_class_against_fit() -> None:
    table = over_alpha([0.0, 10.0], 0.1, steps=60, points=60, detach_class_weights=True)
    assert table["-L_mi"].iloc[0] < table["-L_mi"].iloc[1]


def test_last_term_of_eq_27_is_half_the_dimension() -> None:
    toy = train_toy(steps=5, points=200)
    table = information_by_noise(toy, [0.1, 0.01], linearised=True)
    assert table["last term"].to_numpy() == pytest.approx(np.ones(2), abs=0.1)
    assert abs(table["gap"][1]) < abs(table["gap"][0])
    assert rate([0.1, 0.2], [1.0, 8.0]) == pytest.approx(3)


def test_sentences_follow_from_the_tables() -> None:
    sigma = [0.1, 0.01, 0.003]
    by_noise = pd.DataFrame({"sigma": sigma, "gap": [s**2 for s in sigma], "last term": [1.0, 0.98, 1.02]})
    trained = pd.DataFrame({"A + B": [9.0, 4.0], "true I(X, Z)": [3.5, 3.5]})
    learnt = pd.DataFrame({"-L_mi": [1.0, 3.0], "true I(Z, Y)": [1.1, 1.1]}, index=[1.0, 100.0])
    said = bottleneck_sentences(by_noise, trained, learnt, dim=2)
    assert "with the power 2.0 of the noise (the paper: 2), to 9e-06 nats" in said[0]
    assert "0.98 to 1.02 nats at every noise; $d/2$ is 1." in said[1]
    assert "from 9.0 to 4.0 nats, and the true value from 3.5 to 3.5." in said[2]
    assert said[3].endswith("exceeds the true $I(Z, Y)$ at $\\alpha$ = 100, by up to 1.9 nats.")
    assert "stays below" in bottleneck_sentences(by_noise, trained, learnt[:1], dim=2)[3]


def test_level_of_a_model() -> None:
    model = small.model(n_classes=2)
    features, class_idx = small.features(6)
    density = level_density(model, features, class_idx, level=0, images=4)
    # Images 0, 2, 3 and 5, each with its twelve positions.
    assert density.x.shape == (48, 6) and density.class_idx.tolist()[::12] == [0, 0, 1, 1]
    z, log_det = density.flow(density.x)
    with torch.no_grad():
        expected, expected_det = model.levels[0][0](features.levels[0][[0, 2, 3, 5]])
    torch.testing.assert_close(z, expected.flatten(0, 1).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det, expected_det.flatten().double(), rtol=1e-4, atol=1e-4)
    assert model.flows[0].positions.dtype == torch.float32  # the model itself is left as it was
    found = class_information(density)
    assert found["entropy of the classes"] == pytest.approx(math.log(2))
    assert found["-L_mi"] - found["weights"] < math.log(2)
    assert density.scale == pytest.approx(density.x.var(0).mean().item() ** 0.5)
    table = information_by_noise(density, [0.01], per_dimension=True)
    assert table["last term"][0] == pytest.approx(0.5, abs=0.2)
    with pytest.raises(InputError, match="one Gaussian for all classes"):
        level_density(small.model(kind="single"), features, class_idx)


def curves(ax: plt.Axes) -> dict[str, list[list[float]]]:
    """Read what is drawn: by label, the points."""
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in ax.lines}


def test_figures() -> None:
    sigmas = np.array([0.1, 0.01, 0.001])
    found = curves(gap_rates({"gap": (sigmas, -(sigmas**2))}))
    assert list(found) == ["gap", "slope 2"]
    for points in found.values():
        np.testing.assert_allclose(points, np.stack([sigmas, sigmas**2], 1))
    noise = pd.DataFrame({"sigma": [0.1, 0.01], "information": [1.0, 2.0], "limit": [0.9, 2.1]})
    found = curves(information_limit(noise))
    assert found == {"loss and constants": [[0.1, 0.9], [0.01, 2.1]], "$A + B$": [[0.1, 1], [0.01, 2]]}
    table = pd.DataFrame(
        {"A + B": [3.0, 2.0], "-L_mi": [0.1, 0.9], "true I(X, Z)": [1.0, 1.0], "true I(Z, Y)": [1.1, 1.1]},
        index=[1.0, 10.0],
    )
    left, right = bounds_over_training(table).axes
    assert curves(left) == {"$A + B$": [[1, 3], [10, 2]], "true value": [[1, 1], [10, 1]]}
    assert list(curves(right).values()) == [[[1, 0.1], [10, 0.9]], [[1, 1.1], [10, 1.1]]]
    ax = information_plane({"first": table})
    assert curves(ax) == {"first": [[3, 0.1], [2, 0.9]]}
    assert [text.get_text() for text in ax.texts] == [r"$\alpha$=1", r"$\alpha$=10"]
    assert np.asarray(ax.collections[-1].get_offsets()).tolist() == [[1.0, 1.1]]
    plt.close("all")


@pytest.mark.parametrize("covariance", ["class", "learnt"])
def test_a_level_brings_its_covariances(covariance: str) -> None:
    torch.manual_seed(0)
    data, class_idx = small.features(20)
    prior = PriorConfig(covariance=covariance, n_centers=3)  # type: ignore[arg-type]
    made = HGAD(["a", "b"], small.CHANNELS, small.GRIDS, flow=small.FLOW, prior=prior)
    labels = torch.from_numpy(class_idx)
    made.initialise(lambda: [(list(data.levels), labels)])
    density, own = level_density(made, data, class_idx, level=0), made.levels[0][1]
    assert isinstance(own, HierarchicalGaussianMixture)
    own.double()
    z = density.flow(density.x)[0]
    terms = hgad_losses(z[None], torch.zeros(1, len(z)), torch.zeros(1).long(), own, intra=False)
    torch.testing.assert_close(-density.log_prob(z).mean(), terms["nll"])
    mi = hgad_losses(z[:, None], torch.zeros(len(z), 1), density.class_idx, own, intra=False)["mi"]
    assert class_information_bound(density, z)[0] == pytest.approx(-mi.item())
