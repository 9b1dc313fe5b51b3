"""What the figures of cost and rates show: series, labels with units, intervals."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hgadbook import beyond as rates
from hgadbook import complexity
from hgadlib.errors import InputError
from hgadlib.evaluation.thresholds import binomial_rate
from hgadlib.figures.theme import theme


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    theme()
    yield
    plt.close("all")


def legend(ax: plt.Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]  # type: ignore[union-attr]


def test_cost_bars() -> None:
    ax = complexity.cost_bars({"a": {"flow": 2e9, "prior": 3e6}, "b": {"flow": 1e12, "prior": 5e6}})
    assert legend(ax) == ["flow", "prior"]
    assert [text.get_text() for text in ax.texts] == ["2.0 G", "1.0 T", "3.0 M", "5.0 M"]
    assert ax.get_xscale() == "log" and "multiply-adds" in ax.get_xlabel()
    with pytest.raises(InputError, match="same parts"):
        complexity.cost_bars({"a": {"flow": 1.0}, "b": {"prior": 1.0}})


def test_stage_map_marks_the_paper_s_row() -> None:
    columns = {"GFLOP": [1.0], "learnable parameters (M)": [2.0], "with rotations (M)": [3.0]}
    choices = pd.DataFrame(columns, index=["2, 3"])
    ax = complexity.stage_map(choices, {"flops": 1.5, "learnable_parameters": 2.5})
    assert legend(ax)[-1] == "paper, Tab. 5"
    assert ax.collections[-1].get_offsets().tolist() == [[2.5, 1.5]]  # type: ignore[union-attr]


def test_rates_have_intervals_and_a_target() -> None:
    found = {"a": binomial_rate([True, False]), "b": binomial_rate([])}
    ax = rates.rate_intervals({"alarms": found}, target=0.1, label="x")
    assert legend(ax)[0] == "asked for"
    # A class without images has a row and no dot.
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.containers[0].lines[0].get_xdata().tolist() == [50.0]  # type: ignore[attr-defined]


def test_confusion_is_in_percent_of_the_row() -> None:
    true, inferred = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1])
    ax = rates.confusion(true, inferred, ["a", "b", "never"], title="")
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])  # type: ignore[arg-type]
    assert [text.get_text() for text in ax.texts][:2] == ["75%", "25%"]
