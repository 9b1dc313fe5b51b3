"""The two-dimensional toy: what the method chapter says that one can see, and the figures' bad input."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from hgadbook import method as draw
from hgadbook.method import (
    Trajectory,
    eq8_by_weight,
    fit_flow,
    fit_prior,
    level_values,
    offset_shares,
    plane,
    pull,
    scores_in_company,
    toy_features,
    toy_latents,
)
from hgadlib.errors import InputError
from hgadlib.losses import inter_class_nll, mutual_information_loss
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture

POOR_START = torch.tensor([[-4.0, 1.5], [5.0, 2.5], [5.0, -2.0]])


def fit_centers(lambda1: float, lambda2: float) -> Trajectory:
    prior = HierarchicalGaussianMixture(3, 1, 2, learn_weights=False)
    prior.set_centers(POOR_START)
    return fit_prior(prior, *toy_latents(), intra=False, lambda1=lambda1, lambda2=lambda2, lambda_e=0)


def test_eq_6_lets_two_centres_share_a_class_and_eq_8_parts_them() -> None:
    means = toy_latents()[0].mean(1)
    alone, both = fit_centers(1, 0), fit_centers(1, 1)
    assert alone.centers[0].equal(POOR_START)
    # nearest class of each centre at the end
    assert torch.cdist(alone.centers[-1], means).argmin(1).tolist()[1:] == [2, 2]
    assert torch.cdist(both.centers[-1], means).argmin(1).tolist() == [0, 1, 2]
    assert torch.cdist(both.centers[-1], means).amin(1).max() < 0.3
    assert both.losses[-1] < both.losses[0]
    # without attraction centres go on past their classes
    spread = torch.pdist(fit_centers(0, 1).centers[-1])
    assert spread.min() > torch.pdist(means).min()


def test_eq_10_splits_what_has_modes() -> None:
    z, class_idx = toy_latents()
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(3, 3, 2, delta_std=0.1)
    prior.set_centers(z.mean(1))
    path = fit_prior(prior, z, class_idx, intra=True, lambda2=0.0, lambda_e=0.0)
    radius = torch.pdist(path.intra_centers[-1, 2]).max()
    assert radius > 3  # class C has three modes
    for one_mode in (0, 1):
        assert torch.pdist(path.intra_centers[-1, one_mode]).max() < 1


def test_pull_is_minus_the_gradient() -> None:
    centers, log_weights = torch.zeros(1, 2), torch.zeros(1)
    z = plane((-1, 1, -1, 1), 3)[None]
    assert z[0, 0].tolist() == [-1, -1]
    assert z[0, 1].tolist() == [0, -1]
    force = pull(lambda v: inter_class_nll(v, torch.zeros(1, 9), centers, log_weights), z)
    torch.testing.assert_close(force, -z)


def test_dead_offsets() -> None:
    shares = offset_shares([2, 256], [1.0, 0.1]).to_numpy()
    assert shares[0].min() > 0.7
    assert shares[1, 0] < 1e-6
    assert shares[1, 1] > 0.7


def test_eq_8_by_weight() -> None:
    table = eq8_by_weight([2.0, 6.0])
    assert table.index[-1] == 0.5
    assert (table.iloc[-1] >= -math.log(2)).all()
    assert table["6"].iloc[0] == pytest.approx(-(6**2) / 4, abs=0.01)
    pair = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    direct = mutual_information_loss(pair[:, None], torch.arange(2), pair, torch.full((2,), 0.5).log()).mean()
    assert table["2"].iloc[-1] == pytest.approx(direct.item())


def test_only_the_transductive_score_knows_its_company() -> None:
    table = scores_in_company()
    assert table["inductive"].nunique() == 1
    assert table["transductive"].nunique() == 3


def test_flow_learns_in_two_stages() -> None:
    x, class_idx = toy_features(50)
    assert x.shape == (3, 50, 2)
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(3, 2, 2)
    flow, history = fit_flow(x, class_idx, prior, steps=20, first_stage=10, layers=2)
    assert ["intra" in terms for terms in history] == [False] * 10 + [True] * 10
    values = level_values(flow, prior, x, class_idx, (5, 10))
    assert values.log_prob[0].shape == values.neg_entropy[0].shape == (3, 5, 10)
    single = fit_flow(x, class_idx, GaussianPrior(), steps=20, layers=2)[1]
    assert single[-1]["nll"] < single[0]["nll"]


def test_figures() -> None:
    z, _ = toy_latents(12)
    centers = np.zeros((3, 2, 2))
    ax = draw.class_points(z, centers=centers, legend=True)
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["class A", "class B", "class C"]
    paths = draw.center_paths(z, np.zeros((5, 3, 2)))
    draw.share_axes([ax, paths])
    assert ax.get_xlim() == paths.get_xlim()
    field = draw.force_field(np.eye(2), np.eye(2), centers[:, 0], own=1)
    assert field.get_xlabel() == "$z_1$"
    image = draw.plane_map(np.eye(3), (0, 1, 0, 2), label="nats", title="title").images[0]
    assert tuple(image.get_extent()) == (0, 1, 0, 2)
    lines = draw.bent_grid(np.zeros((2, 5, 2)), np.ones((2, 5)), scale=True).collections[0]
    assert len(lines.get_array()) == 8  # type: ignore[arg-type]
    assert len(draw.squares({"a": np.eye(2), "b": np.eye(3)}).axes) == 3
    plt.close("all")
    with pytest.raises(InputError, match=r"expected points \(K, N, 2\)"):
        draw.class_points(np.zeros((5, 2)))
