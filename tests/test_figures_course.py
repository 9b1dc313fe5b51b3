"""Figures of courses, couplings and comparisons: what they draw, and what wrong input says."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hgadbook.qualitative import map_comparison
from hgadlib import figures
from hgadlib.errors import InputError
from hgadlib.figures.histograms import Histogram


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def history() -> pd.DataFrame:
    table = pd.DataFrame({"epoch": np.arange(1, 7), "nll": np.linspace(3, 1, 6)})
    table["test_image_auroc"] = [np.nan, 0.6, np.nan, 0.8, np.nan, 0.7]
    return table


def coupling() -> pd.DataFrame:
    rows = [
        {"epoch": epoch, "level": level, "layer": layer, "group": "train", "s_mean": -layer, "s_input": 0.5}
        for epoch in (2, 4)
        for level in (1, 2)
        for layer in (1, 2, 3)
    ]
    return pd.DataFrame(rows)


def test_a_course_has_a_column_a_run_and_only_evaluated_epochs() -> None:
    whole = history().assign(test_log_prob_normal=[np.nan, -3, np.nan, -2, np.nan, -1])
    figure = figures.training_course({"one": history(), "two": whole})
    axes = np.array(figure.axes).reshape(3, 2)
    assert [ax.get_title(loc="left") for ax in axes[0]] == ["one", "two"]
    (auroc,) = axes[1, 0].lines
    assert list(np.asarray(auroc.get_xdata())) == [2, 4, 6]
    np.testing.assert_allclose(auroc.get_ydata(), [60, 80, 70])
    assert len(np.asarray(axes[0, 0].lines[0].get_xdata())) == 6
    # What was not recorded is not drawn.
    assert not axes[2, 0].lines and len(axes[2, 1].lines) == 1


def test_a_course_without_evaluated_epochs_is_refused() -> None:
    with pytest.raises(InputError, match=r"one: expected a history with evaluated epochs.*evaluate_every"):
        figures.training_course({"one": history().drop(columns="test_image_auroc")})
    with pytest.raises(InputError, match="expected a history at least"):
        figures.training_course({})


def test_couplings_have_a_line_a_block_of_the_deepest_level() -> None:
    table = coupling()
    table.loc[table["level"] == 2, "s_mean"] *= 2
    figure = figures.coupling_course({"one": table}, quantities=("s_mean", "s_input"))
    mean, share = figure.axes
    assert [list(np.asarray(line.get_ydata())) for line in mean.lines[:3]] == [[-2, -2], [-4, -4], [-6, -6]]
    assert [list(np.asarray(line.get_ydata())) for line in share.lines] == [[50, 50]] * 3
    figure = figures.coupling_course({"one": table}, quantities=("s_mean",), level=1)
    assert list(np.asarray(figure.axes[0].lines[0].get_ydata())) == [-1, -1]


def test_couplings_refuse_what_is_not_there() -> None:
    with pytest.raises(InputError, match="expected quantities out of s_mean"):
        figures.coupling_course({"one": coupling()}, quantities=("mean",))
    with pytest.raises(InputError, match="one: expected rows of group 'normal', found \\['train'\\]"):
        figures.coupling_course({"one": coupling()}, quantities=("s_mean",), group="normal")


def groups(shift: int) -> tuple[dict[str, Histogram], dict[str, Histogram]]:
    edges = np.arange(5.0)
    normal, anomalous = np.array([0, 0, 4, 4]), np.roll(np.array([4, 4, 0, 0]), shift)
    return {name: (edges, normal) for name in "ab"}, {name: (edges, anomalous) for name in "ab"}


def test_histograms_of_two_runs_stand_side_by_side() -> None:
    figure = figures.histogram_pairs({"one": groups(0), "two": groups(1)})
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["one\noverlap 0.0 %", "two\noverlap 50.0 %", "overlap 0.0 %", "overlap 50.0 %"]
    with pytest.raises(InputError, match="expected runs on the same classes"):
        figures.histogram_pairs({"one": groups(0), "two": ({"a": groups(0)[0]["a"]},) * 2})


def test_changes_of_overlap_stand_in_the_order_of_the_gain() -> None:
    ax = figures.overlap_change(
        {"one": {"a": 0.5, "b": None, "c": 0.2}, "two": {"a": 0.3, "b": None, "c": 0.4}}
    )
    # The greatest gain stands at the top.
    assert [text.get_text() for text in ax.get_yticklabels()] == ["c", "a"]
    np.testing.assert_allclose(np.asarray(ax.collections[1].get_offsets())[:, 0], [40, 30])
    with pytest.raises(InputError, match="expected two runs or more"):
        figures.overlap_change({"one": {"a": 0.5}})


def test_a_comparison_has_a_column_a_model_and_one_scale_each() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2:4, 2:4] = True
    maps = {"one": np.zeros((2, 8, 8)), "two": np.ones((2, 8, 8))}
    maps["two"][1] = 5
    figure = map_comparison(images, masks, maps, ["a", "b"], normal=images)
    axes = np.array(figure.axes).reshape(2, 5)
    assert [ax.get_title() for ax in axes[0]] == ["normal", "image", "mask", "one", "two"]
    assert [ax.images[0].get_clim() for ax in axes[:, 4]] == [(1, 5), (1, 5)]
    assert len(axes[0, 3].collections) == 2 and not axes[1, 3].collections
    with pytest.raises(InputError, match="expected maps and masks of the images' size"):
        map_comparison(images, masks, {"one": np.zeros((2, 4, 4))}, ["a", "b"])
    with pytest.raises(InputError, match="expected finite scores"):
        map_comparison(images, masks, {"one": np.full((2, 8, 8), np.nan)}, ["a", "b"])
    with pytest.raises(InputError, match=r"expected images \(N, H, W, 3\)"):
        map_comparison(images, masks, maps, ["a"])
