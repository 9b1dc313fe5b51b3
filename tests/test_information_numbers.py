"""App. F in tables: the bounds bound, the truth stays, and a run's level is what its model says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import small
import torch

from hgadbook.information_bottleneck import (
    class_information,
    class_information_bound,
    feature_scale,
    information_by_noise,
    level_density,
    nested_class_information,
    nested_information,
    over_alpha,
    over_training,
    rate,
    train_toy,
)
from hgadlib.errors import InputError


def blobs(distance: float, n: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two unit Gaussians with their classes and centres."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [distance, 0.0]], dtype=torch.float64)
    class_idx = torch.arange(n) % 2
    x = centers[class_idx] + torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, class_idx, centers


def test_class_information_from_samples() -> None:
    x, class_idx, _ = blobs(50.0)
    assert nested_class_information(x, class_idx, 0.5) == pytest.approx(math.log(2), abs=1e-6)
    x, class_idx, _ = blobs(1.0)
    values = [nested_class_information(x, class_idx, sigma) for sigma in (0.3, 1.0, 30.0)]
    assert math.log(2) > values[0] > values[1] > values[2]
    assert abs(values[2]) < 0.01
    # A function of X cannot be known better than X.
    assert values[1] < nested_information(x, 1.0)


def test_eq_8_bounds_the_information_between_latent_and_class() -> None:
    x, class_idx, centers = blobs(2.0, 20_000)
    half = torch.full((2,), 0.5, dtype=torch.float64).log()
    right, zero = class_information_bound(x, class_idx, centers, half)
    assert zero == pytest.approx(0, abs=1e-12)
    # The true value by quadrature along the line through the centres.
    t = torch.linspace(-12, 14, 20_001, dtype=torch.float64)
    p0, p1 = (torch.exp(-((t - c) ** 2) / 2) / math.sqrt(2 * math.pi) for c in (0.0, 2.0))
    mean = (p0 + p1) / 2
    density = 0.5 * (torch.special.xlogy(p0, p0 / mean) + torch.special.xlogy(p1, p1 / mean))
    true = torch.trapezoid(density, t).item()
    assert right == pytest.approx(true, abs=0.01)
    # A wrong posterior is a lower bound; wrong weights add their divergence.
    assert class_information_bound(x, class_idx, 3 * centers, half)[0] < true - 0.01
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    gain, divergence = class_information_bound(x, class_idx, centers, weights)
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
    assert feature_scale(density) > 0
    table = information_by_noise(density, [0.01], per_dimension=True)
    assert table["last term"][0] == pytest.approx(0.5, abs=0.2)
    with pytest.raises(InputError, match="one Gaussian for all classes"):
        level_density(small.model(kind="single"), features, class_idx)
