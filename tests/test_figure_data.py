"""What a figure shows, as a table: every kind of drawing gives its points, decoration none."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("IPython", reason="needs the extra: book")

import hgadbook
from hgadbook.figure_data import COLUMNS, data_of


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_each_kind_of_drawing_gives_what_it_was_given() -> None:
    figure, axes = plt.subplots(2, 3)
    line, points, bars, steps, cells, words = axes.flat
    line.plot([1, 2], [3, 4], label="rise")
    line.axhline(0.5)  # decoration
    line.set(title="a line", xlabel="epoch", ylabel="nats")
    points.scatter([5, 6], [7, 8])
    bars.bar([0, 1], [10, 20])
    bars.set_xticks([0, 1], ["ring", "disc"])
    steps.stairs([3, 1], [0, 1, 2], label="normal")
    cells.imshow(np.array([[0.25, 0.5]]))
    words.plot([1.5, 2.5], [0, 1])
    words.set_yticks([0, 1], ["brick", "grass"])
    data = data_of(figure)
    assert list(data.columns) == COLUMNS
    kinds = {kind: part for kind, part in data.groupby("kind")}
    assert set(kinds) == {"line", "point", "bar", "step", "cell"}
    first = kinds["line"][kinds["line"]["panel"] == "a line"]
    assert first[["x axis", "y axis", "series", "x", "y"]].values.tolist() == [
        ["epoch", "nats", "rise", 1.0, 3.0], ["epoch", "nats", "rise", 2.0, 4.0],
    ]  # fmt: skip
    assert kinds["point"][["x", "y"]].values.tolist() == [[5.0, 7.0], [6.0, 8.0]]
    assert kinds["bar"][["x", "y"]].values.tolist() == [["ring", 10.0], ["disc", 20.0]]
    assert kinds["step"][["x", "y", "value"]].values.tolist() == [[1.0, 3.0, 0.0], [2.0, 1.0, 1.0]]
    assert kinds["cell"]["value"].tolist() == [0.25, 0.5]
    named = kinds["line"][kinds["line"]["panel"] == "6"]
    assert named["y"].tolist() == ["brick", "grass"]


def test_bands_and_intervals_are_listed_and_pictures_left_out() -> None:
    figure, (ax, picture) = plt.subplots(1, 2)
    ax.fill_between([0, 1], [1, 1], [2, 3])
    ax.errorbar([0], [1], yerr=[0.5], fmt="o")
    picture.imshow(np.zeros((80, 80)))
    data = data_of(figure)
    assert set(data["kind"]) == {"band", "interval", "line"}
    assert data[data["kind"] == "interval"]["y"].tolist() == [0.5, 1.5]
    alone, ax = plt.subplots()
    ax.imshow(np.zeros((4, 4, 3)))
    assert data_of(alone).empty and hgadbook._data_and_runs(alone) == ({}, {})


def test_a_displayed_figure_brings_its_data_and_its_runs() -> None:
    figure, ax = plt.subplots()
    ax.plot([0, 1], [1 / 3, 2])
    here = hgadbook.project_dir() / "runs" / "demo"
    assert hgadbook.behind(figure, ["b.json", {"record": "a.json"}, here]) is figure
    hgadbook.behind(figure, ["b.json"])
    bundle, metadata = hgadbook._data_and_runs(figure)
    assert metadata == {"hgad_runs": ["a.json", "b.json", "runs/demo"]}
    pd.testing.assert_frame_equal(
        pd.read_csv(io.StringIO(bundle["text/csv"]))[["x", "y"]],
        pd.DataFrame({"x": [0.0, 1.0], "y": [0.333333, 2.0]}), check_dtype=False,
    )  # fmt: skip


def test_a_verdict_is_a_list_and_never_empty() -> None:
    assert hgadbook.verdict("One.", "Two.").data == "- One.\n- Two."
    with pytest.raises(ValueError, match="at least one sentence"):
        hgadbook.verdict()
