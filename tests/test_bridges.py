"""The demonstration of Sec. 3.2 on classes whose density is known, and bridges between real features."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small import features, model

from hgadbook import bridges
from hgadbook.bridges import (
    PRIORS,
    SWEEPS,
    USUAL,
    SeparatedClasses,
    auroc,
    bridge_maps,
    bridge_pairs,
    bridge_profiles,
    bridge_runs,
    bridge_sentences,
    bridge_slider,
    bridge_sweeps,
    bridge_verdict,
    feature_bridges,
    sweep_table,
    train_on,
)
from hgadbook.method import plane
from hgadlib.config import FlowConfig
from hgadlib.mixture import HierarchicalGaussianMixture
from hgadlib.runs.inputs import Inputs


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_the_known_density_is_that_of_the_points() -> None:
    classes = SeparatedClasses.random(3, 2, seed=0)
    side, n = 30.0, 600
    density = classes.log_prob(plane((-side, side, -side, side), n)).double().exp()
    assert density.sum().item() * (2 * side / (n - 1)) ** 2 == pytest.approx(1, abs=0.01)
    # Minus the mean is the entropy: that of three apart unit Gaussians, as bending keeps volumes.
    points = classes.draw(4000, torch.Generator().manual_seed(1))
    entropy = np.log(3) + 1 + np.log(2 * np.pi)
    assert -classes.log_prob(points).mean().item() == pytest.approx(entropy, abs=0.05)


@pytest.mark.parametrize(("n_classes", "dim"), [(2, 2), (8, 2), (5, 16)])
def test_classes_are_apart_and_bridges_lie_between_neighbours(n_classes: int, dim: int) -> None:
    classes, generator = SeparatedClasses.random(n_classes, dim, seed=0), torch.Generator().manual_seed(0)
    distances = torch.cdist(classes.centers, classes.centers).fill_diagonal_(torch.inf)
    assert distances.min().item() == pytest.approx(8 * dim**0.5, rel=1e-4)
    middle = (classes.centers + classes.centers[classes.near]) / 2
    found = classes.bridges(2000, generator)
    torch.testing.assert_close(found.mean(1), middle, atol=0.3, rtol=0)
    assert auroc(classes.log_prob(classes.draw(500, generator)), classes.log_prob(found)) > 0.98


def test_an_auroc_of_one_is_bridges_below_all_normal_points() -> None:
    high, low = torch.tensor([[1.0, 2.0]]), torch.tensor([0.0, -1.0, 0.5])
    assert (auroc(high, low), auroc(low, high), auroc(low, low)) == (1, 0, 0.5)


def test_a_mixture_tells_bridges_that_one_gaussian_does_not() -> None:
    classes = SeparatedClasses.random(2, 2, seed=0)
    (single, maps), (mixture, _) = (train_on(classes, kind, 2, seed=0, steps=40) for kind in PRIORS)
    assert [row["step"] for row in single] == [5, 6, 8, 11, 14, 18, 24, 31, 40] and len(maps) == 9
    assert single[-1]["AUROC"] < 0.5 < 0.8 < mixture[-1]["AUROC"]
    # A map is of values less the normal median.
    side = float(classes.centers.abs().max()) + 5
    column, row = ((classes.centers[0] + side) / (2 * side) * 71).round().long().tolist()
    assert abs(maps[-1][row, column].item()) < 3 and maps[-1].shape == (72, 72)


def table(gap: dict[Any, float]) -> pd.DataFrame:
    """Make what trainings give, three seeds a setting: the mixture has 0.5 and the gap of the blocks."""
    rows = []
    for name, values in SWEEPS.items():
        for setting in (USUAL | {name: value} for value in values):
            for seed in range(3):
                own = {"single Gaussian": 0.5, "mixture": 0.5 + gap.get(setting["blocks"], 0.1)}
                row: dict[str, Any] = setting | {"seed": seed}
                rows.append(row | {"prior": "true density", "step": 9, "AUROC": 1.0})
                for prior, value in own.items():
                    rows += [row | {"prior": prior, "step": s, "AUROC": value} for s in range(1, 10)]
    return pd.DataFrame(rows).drop_duplicates()


def test_sweeps_hold_what_they_vary_after_the_last_step() -> None:
    found = sweep_table(table({1: 0.3}))
    assert len(found) == 3 * 4 * 3 * 3
    own = found[(found["sweep"] == "blocks") & (found["prior"] == "mixture")].groupby("value")["AUROC"].mean()
    assert own.to_dict() == pytest.approx({1: 0.8, 2: 0.6, 4: 0.6, 8: 0.6})
    figure = bridge_sweeps(table({}))
    assert [ax.get_xlabel() for ax in figure.axes] == [*SWEEPS, "steps"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [*PRIORS, "true density"]


def test_sentences_say_where_the_mixture_tells_more() -> None:
    said = {text.split(":")[0]: text for text in bridge_sentences(table({1: -0.2, 2: 0.0}))}
    blocks = said["blocks"]
    assert "above the single Gaussian in every seed at 4, 8" in blocks
    assert "below it in every seed at 1" in blocks and "undecided at 2" in blocks
    assert "at 1 the single Gaussian has 0.50, the mixture has 0.30, the true density has 1.00" in blocks
    assert "every seed at 2, 4, 8, 16 (" in said["classes K"]


def test_a_verdict_is_of_the_usual_setting_and_of_all_seeds() -> None:
    said = bridge_verdict(table({1: -0.2}))
    assert "0.50 by the single Gaussian, 0.60 by the mixture, 1.00 by the true density" in said
    assert said.endswith("the mixture tells more in every seed.")
    assert bridge_verdict(table({4: -0.2})).endswith("tells less in every seed.")
    assert bridge_verdict(table({4: 0.0})).endswith("the mixture is undecided.")


def test_a_page_shows_one_picture_of_all_and_needs_no_server() -> None:
    maps = np.zeros((4, 2, 2, 72, 72), np.float16)
    page = bridge_slider(table({}), maps)
    assert re.findall(r'data-at="(\d-\d)"[^>]*(?<! hidden)>', page) == ["3-1"]
    assert len(re.findall(r'src="data:image/webp;base64,', page)) == 8 == page.count("<img")
    assert [int(n) for n in re.findall(r'max="(\d)"', page)] == [3, 1]
    assert "http" not in page
    titles = [ax.get_title(loc="left") for ax in bridge_maps(table({}), maps, layers=4).axes[:2]]
    assert titles == ["single Gaussian: AUROC 0.50", "mixture: AUROC 0.60"]


def test_a_second_call_reads_what_the_first_has_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridges, "SWEEPS", {"blocks": (1, 2), "classes K": (4, 2)})
    monkeypatch.setattr(bridges, "USUAL", USUAL | {"blocks": 1})
    # A process of its own would import everything again.
    monkeypatch.setattr(bridges, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    trained, maps = bridge_runs(tmp_path / "new", seeds=2, steps=3)
    assert len(trained) == 3 * 2 * (1 + 2 * 1) and maps.shape == (2, 2, 1, 72, 72)
    monkeypatch.setattr(bridges, "ProcessPoolExecutor", None)
    again, same = bridge_runs(tmp_path / "new", seeds=2, steps=3)
    pd.testing.assert_frame_equal(again, trained)
    np.testing.assert_array_equal(same, maps)


def test_bridges_between_features_are_seen_where_they_are() -> None:
    test, class_idx = features(12)
    flow = FlowConfig(layers=1, position_dim=4, normalise="none")
    models = {kind: model(kind=kind, flow=flow) for kind in ("single", "mixture")}
    for own in models.values():
        for level, prior in own.levels:
            torch.nn.init.zeros_(cast(Any, level.inn[0]).subnet[2].weight)
            torch.nn.init.zeros_(cast(Any, level.inn[0]).subnet[2].bias)
            if isinstance(prior, HierarchicalGaussianMixture):
                rotation = cast(Any, level.inn[0]).w_perm
                ends = torch.tensor([[0.0], [3.0]]).expand(2, len(rotation))
                prior.set_centers(ends @ rotation.T)
                torch.nn.init.zeros_(prior.deltas)
    labelled = np.ones(12, bool)
    labelled[0] = False
    inputs = SimpleNamespace(
        test=test, test_classes=class_idx, test_labels=np.zeros(12, bool), test_labelled=labelled,
        dataset=SimpleNamespace(classes=("a", "b")),
    )  # fmt: skip
    found = feature_bridges(models, cast(Inputs, inputs))
    assert len(found) == 2 * 3 * 7 and set(found["pair"]) == {"0-0", "0-1", "1-1"}
    counted = bridge_pairs(found)
    share = counted["as likely (% of pairs)"]
    assert share["single", "two classes"] == 100 and share["mixture", "two classes"] == 0
    assert share["mixture", "one class"] == 100 and counted["pairs"].tolist() == [2, 1, 2, 1]
    assert counted["AUROC, ends over middle"]["mixture", "two classes"] > 0.99
    figure = bridge_profiles(found)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["single", "mixture"]
