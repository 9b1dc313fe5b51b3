"""How overlaps of classes are tabulated, told and drawn."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hgadbook.histograms import (
    histogram_pairs,
    ledger_sentence,
    overlap_change,
    overlap_sentence,
    overlap_table,
    separation_table,
)
from hgadlib.evaluation.likelihoods import Histograms, class_overlaps


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_overlaps_by_class() -> None:
    counts = np.zeros((2, 2, 2, 4), int)
    counts[0, 1, 0], counts[0, 1, 1] = [2, 2, 0, 0], [0, 2, 2, 0]
    found = class_overlaps({"log_likelihood_counts": counts, "classes": np.array(["a", "b"])})
    assert found == {"a": [None, 0.5], "b": [None, None]}
    runs = {
        "one": {"a": 0.5, "b": None, "c": 0.30, "d": 0.1},
        "two": {"a": 0.6, "b": None, "c": 0.25, "d": 0.1},
    }
    table = overlap_table(runs)
    assert table.index.tolist() == ["c", "d", "a", "b", "mean"]
    assert table["difference"].tolist()[:3] == pytest.approx([-5, 0, 10])
    said = overlap_sentence(runs)
    assert "Of 3 classes" in said and "less by 2 points or more in 1 (c)" in said
    assert "more by 2 points or more in 1 (a)" in said and "mean difference is +1.7" in said
    less = {"one": {"a": 0.5}, "two": {"a": 0.4}}
    assert ledger_sentence({"x-ray": runs, "y": less}) == (
        "In the ledger's runs the mean overlap differs by +1.7 points (x-ray), −10.0 points (y)."
    )
    assert ledger_sentence({}).endswith("no run of both in the ledger.")


def test_classes_without_masks_show_their_image_auroc() -> None:
    one = {
        "per_class": {
            "a": {"image_auroc": 0.7, "pixel_auroc": None},
            "b": {"image_auroc": 0.7, "pixel_auroc": 0.9},
        }
    }
    table = separation_table({"one": one, "two": one})
    assert table["one"].tolist() == pytest.approx([70, 90, 80]) and not table["difference"].any()


def groups(shift: int) -> tuple[Histograms, Histograms]:
    edges = np.arange(5.0)
    normal, anomalous = np.array([0, 0, 4, 4]), np.roll(np.array([4, 4, 0, 0]), shift)
    return {name: (edges, normal) for name in "ab"}, {name: (edges, anomalous) for name in "ab"}


def test_histograms_of_two_runs_stand_side_by_side() -> None:
    figure = histogram_pairs({"one": groups(0), "two": groups(1)})
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["one\noverlap 0.0 %", "two\noverlap 50.0 %", "overlap 0.0 %", "overlap 50.0 %"]
    assert [ax.get_xlabel() for ax in figure.axes] == 2 * [""] + 2 * ["log-likelihood (nats)"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["a\nshare per bin (%)", "", "b\nshare per bin (%)", ""]


def test_changes_of_overlap_stand_in_the_order_of_the_gain() -> None:
    ax = overlap_change({"one": {"a": 0.5, "b": None, "c": 0.2}, "two": {"a": 0.3, "b": None, "c": 0.4}})
    # The greatest gain stands at the top.
    assert [text.get_text() for text in ax.get_yticklabels()] == ["c", "a"]
    lines, one, two = ax.collections
    np.testing.assert_allclose(np.asarray(one.get_offsets()), [[20, 0], [50, 1]])
    np.testing.assert_allclose(np.asarray(two.get_offsets()), [[40, 0], [30, 1]])
    ends = [np.asarray(path.vertices)[:, 0].tolist() for path in lines.get_paths()]
    np.testing.assert_allclose(ends, [[20, 40], [30, 50]])
