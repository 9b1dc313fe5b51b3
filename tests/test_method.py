"""The method chapter: what it says that one can see in the toy, and the source under each equation."""

from __future__ import annotations

import ast
import inspect
import json
import math
import operator
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from hgadbook import method as toy
from hgadbook import show_source
from hgadbook.method import (
    eq8_by_weight,
    fit_flow,
    fit_prior,
    method_sentences,
    offset_shares,
    plane,
    pull,
    scores_in_company,
    toy_features,
    toy_latents,
    toy_values,
)
from hgadlib import flow, losses, mixture, scoring
from hgadlib.config import project_dir
from hgadlib.losses import inter_class_nll, mutual_information_loss
from hgadlib.mixture import GaussianPrior, HierarchicalGaussianMixture

POOR_START = torch.tensor([[-4.0, 1.5], [5.0, 2.5], [5.0, -2.0]])


def fit_centers(lambda1: float, lambda2: float) -> Tensor:
    prior = HierarchicalGaussianMixture(3, 1, 2, learn_weights=False)
    prior.set_centers(POOR_START)
    path = fit_prior(prior, *toy_latents(), intra=False, lambda1=lambda1, lambda2=lambda2, lambda_e=0)
    assert path[-1, :, 0].equal(prior.centers)
    return path[:, :, 0]


def test_eq_6_lets_two_centres_share_a_class_and_eq_8_parts_them() -> None:
    means = toy_latents()[0].mean(1)
    alone, both = fit_centers(1, 0), fit_centers(1, 1)
    assert alone[0].equal(POOR_START)
    # nearest class of each centre at the end
    assert torch.cdist(alone[-1], means).argmin(1).tolist()[1:] == [2, 2]
    assert torch.cdist(both[-1], means).argmin(1).tolist() == [0, 1, 2]
    assert torch.cdist(both[-1], means).amin(1).max() < 0.3
    # without attraction centres go on past their classes
    spread = torch.pdist(fit_centers(0, 1)[-1])
    assert spread.min() > torch.pdist(means).min()


def test_eq_10_splits_what_has_modes() -> None:
    z, class_idx = toy_latents()
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(3, 3, 2, delta_std=0.1)
    prior.set_centers(z.mean(1))
    path = fit_prior(prior, z, class_idx, intra=True, lambda2=0.0, lambda_e=0.0)
    radius = torch.pdist(path[-1, 2]).max()
    assert radius > 3  # class C has three modes
    for one_mode in (0, 1):
        assert torch.pdist(path[-1, one_mode]).max() < 1


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


def test_the_toys_verdict_follows_from_its_numbers() -> None:
    shares = pd.DataFrame({"a": [0.875, 0.0], "b": [0.9, 0.9]}, index=[2, 576])
    eq8 = pd.DataFrame({"2": [-9.25, -0.5]})
    said = method_sentences(torch.tensor([1e-6, -5e-6]), eq8, shares)
    assert "`torch.distributions` to 5e-06 nats" in said[0]
    assert "−9.2 nats" in said[1] and said[1].endswith(
        "bound of −0.69 does not hold for learnt class weights."
    )
    assert "have 88 % of a class's latents in 2 channels and 0 % in 576" in said[2]
    assert method_sentences(torch.zeros(1), eq8[1:], shares)[1].endswith("bound of −0.69 holds.")


def test_only_the_transductive_score_knows_its_company() -> None:
    table = scores_in_company()
    assert table["inductive"].nunique() == 1
    assert table["transductive"].nunique() == 3


def test_flow_learns_in_two_stages() -> None:
    x, class_idx = toy_features(50)
    assert x.shape == (3, 50, 2)
    torch.manual_seed(0)
    prior = HierarchicalGaussianMixture(3, 2, 2)
    net, history = fit_flow(x, class_idx, prior, steps=20, first_stage=10, layers=2)
    assert ["intra" in terms for terms in history] == [False] * 10 + [True] * 10
    values = toy_values(net, prior, x, class_idx, (5, 10))
    assert values.log_prob[0].shape == values.neg_entropy[0].shape == (3, 5, 10)
    single = fit_flow(x, class_idx, GaussianPrior(), steps=20, layers=2)[1]
    assert single[-1]["nll"] < single[0]["nll"]


def test_figures() -> None:
    z, _ = toy_latents(12)
    _, axes = plt.subplots(1, 5)
    toy.class_points(z, centers=np.arange(12.0).reshape(3, 2, 2), legend=True, ax=axes[0])
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["class A", "class B", "class C"]
    # Three clouds; then of each class a dot and the cross of its main centre.
    offsets = [c.get_offsets().tolist() for c in axes[0].collections[3:]]
    assert offsets == [[[2, 3]], [[0, 1]], [[6, 7]], [[4, 5]], [[10, 11]], [[8, 9]]]
    toy.center_paths(z, np.arange(30.0).reshape(5, 3, 1, 2), title="", ax=axes[1])
    assert [line.get_xdata().tolist() for line in axes[1].lines][1] == [2, 8, 14, 20, 26]
    toy.force_field(np.eye(2), 3 * np.eye(2), np.zeros((3, 2)), own=1, title="", ax=axes[2])
    arrows, *crosses = axes[2].collections
    assert (arrows.U.tolist(), arrows.V.tolist()) == ([1, 0], [0, 1])
    hollow = [tuple(cross.get_facecolor()[0]) == (1, 1, 1, 1) for cross in crosses]
    assert hollow == [True, False, True]
    toy.plane_map(np.eye(3), (0, 1, 0, 2), label="nats", limits=(0, 1), ax=axes[3])
    assert tuple(axes[3].images[0].get_extent()) == (0, 1, 0, 2) and axes[3].images[0].origin == "lower"
    toy.bent_grid(np.zeros((2, 5, 2)), np.tile(np.arange(5.0), (2, 1)), title="", ax=axes[4])
    assert axes[4].collections[0].get_array().tolist() == 2 * [0.5, 1.5, 2.5, 3.5]
    assert len(toy.squares({"a": np.eye(2), "b": np.eye(3)}).axes) == 3
    plt.close("all")


def shown(monkeypatch: pytest.MonkeyPatch, *functions: Callable[..., Any]) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda page: found.append(page.data))
    show_source(*functions)
    return found


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (losses.inter_class_nll, "hgadlib.losses.inter_class_nll"),
        (HierarchicalGaussianMixture.log_prob, "hgadlib.mixture.HierarchicalGaussianMixture.log_prob"),
        (scoring.level_maxima, "hgadlib.scoring.level_maxima"),
    ],
)
def test_what_is_shown_is_the_source_without_the_docstring(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], name: str
) -> None:
    (text,) = shown(monkeypatch, function)
    place, code = text.removesuffix("\n```").split("\n\n```python\n")
    assert place == f"`{name}`"
    (expected,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(expected, ast.FunctionDef) and ast.get_docstring(expected) is not None
    del expected.body[0]
    assert ast.unparse(ast.parse(code)) == ast.unparse(expected)


# A piece of each equation of the method, and the function that computes it.
EQUATIONS = {
    r"\log\mathcal N(z;\mu,\Sigma_y) = ": "mixture.class_log_probs",
    r"u_k = \frac{m_k - v_k}{s_k}": "scoring.normal_statistics",
    r"\mathcal L_m = \mathbb E": "losses.gaussian_nll",
    r"z_2 = x_2 \odot e^{s(x_1)} + t(x_1)": "flow.AffineCoupling.forward",
    r"\mathcal L_g = \mathbb E": "losses.inter_class_nll",
    r"\mathcal L_{mi} = -\mathbb E": "losses.mutual_information_loss",
    r"\mathcal L_e = \mathbb E": "losses.entropy_loss",
    r"\mathcal L_{in} = \mathbb E": "losses.intra_class_nll",
    "(Eq. 18)": "losses.full_mixture_nll",
    r"\mathcal L = \lambda_1\mathcal L_g": "losses.hgad_losses",
    r"P = e^{v - v_{max}}": "scoring.missing_normality",
    "`scoring.transductive`": "scoring.transductive",
    r"t = -\log\Big(-\log\frac{S_l}{L - o_l}": "scoring.anomaly_maps",
}


def test_the_published_score_ends_and_the_other_goes_on() -> None:
    left, right = toy.score_by_distance().axes
    ends = [[np.asarray(line.get_ydata()) for line in ax.lines] for ax in (left, right)]
    assert len(ends[0][1]) > 50 and set(ends[0][1]) == {1.0}
    # Only the last point has no next one to be compared with.
    assert len(ends[1][1]) == 1 and ends[1][1][0] == pytest.approx(100, abs=1e-3)


def named_by_show_source(code: str) -> set[str]:
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {ast.unparse(a) for call in calls if ast.unparse(call.func) == "show_source" for a in call.args}


def test_under_each_equation_stands_the_source_of_its_function() -> None:
    book = json.loads((project_dir() / "book" / "method.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"]]
    markdown = [i for i, cell in enumerate(book["cells"]) if cell["cell_type"] == "markdown"]
    for piece, function in EQUATIONS.items():
        (i,) = (i for i in markdown if piece in cells[i])
        assert function in named_by_show_source(cells[i + 1]), piece
    # No displayed equation was forgotten, nor a loss.
    for i in markdown:
        for block in cells[i].split("```{math}")[1:]:
            assert any(piece in block.split("```")[0] for piece in EQUATIONS), block
    own = {
        name for name, value in vars(losses).items() if getattr(value, "__module__", "") == losses.__name__
    }
    assert {f"losses.{name}" for name in own - {"log_sigmoid_nll"}} <= set(EQUATIONS.values())
    modules = {"flow": flow, "losses": losses, "mixture": mixture, "scoring": scoring}
    for name in set().union(
        *(named_by_show_source(cells[i]) for i in range(len(cells)) if i not in markdown)
    ):
        module, _, path = name.partition(".")
        assert isinstance(operator.attrgetter(path)(modules[module]), FunctionType), name
