"""What the figures of cost, information and rates show: series, labels with units, intervals."""

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
from hgadbook import information_bottleneck as information
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
    assert [text.get_text() for text in ax.texts] == ["2 G", "1 T", "3 M", "5 M"]
    assert ax.get_xscale() == "log" and "multiply-adds" in ax.get_xlabel()
    with pytest.raises(InputError, match="same parts"):
        complexity.cost_bars({"a": {"flow": 1.0}, "b": {"prior": 1.0}})


def test_stage_map_with_and_without_the_paper() -> None:
    columns = {"GFLOP": [1.0], "learnable parameters (M)": [2.0], "with rotations (M)": [3.0]}
    choices = pd.DataFrame(columns, index=["2, 3"])
    ax = complexity.stage_map(choices, {"flops": 1.5, "learnable_parameters": 2.5})
    assert legend(ax)[-1] == "paper, Tab. 5"
    assert ax.collections[-1].get_offsets().tolist() == [[2.5, 1.5]]  # type: ignore[union-attr]
    assert len(complexity.stage_map(choices, {}).collections) == 2


def test_gaps_have_a_line_of_slope_2() -> None:
    sigmas = np.array([0.1, 0.01, 0.001])
    ax = information.gap_rates({"gap": (sigmas, -(sigmas**2))})
    assert legend(ax) == ["gap", "slope 2"]
    for line in ax.lines:
        np.testing.assert_allclose(np.asarray(line.get_ydata(), float), sigmas**2)
    with pytest.raises(InputError, match="at least one series"):
        information.gap_rates({})


def test_information_figures() -> None:
    table = pd.DataFrame(
        {"A + B": [3.0, 2.0], "-L_mi": [0.1, 0.9], "true I(X, Z)": [1.0, 1.0], "true I(Z, Y)": [1.0, 1.0]},
        index=[1.0, 10.0],
    )
    ax = information.information_plane({"first": table})
    assert [text.get_text() for text in ax.texts] == [r"$\alpha$=1", r"$\alpha$=10"]
    assert ax.collections[-1].get_offsets().tolist() == [[1.0, 1.0]]  # type: ignore[union-attr]
    left, right = information.bounds_over_training(table).axes
    assert "nats" in left.get_ylabel() and "nats" in right.get_ylabel()
    noise = pd.DataFrame({"sigma": [0.1, 0.01], "information": [1.0, 2.0], "limit": [0.9, 2.0]})
    assert legend(information.information_limit(noise)) == ["loss and constants", "$A + B$"]


def test_rates_have_intervals_and_a_target() -> None:
    found = {"a": binomial_rate([True, False]), "b": binomial_rate([])}
    ax = rates.rate_intervals({"alarms": found}, target=0.1)
    assert legend(ax)[0] == "asked for"
    # A class without images has a row and no dot.
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.containers[0].lines[0].get_xdata().tolist() == [50.0]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="same names"):
        rates.rate_intervals({"x": found, "y": {"a": found["a"]}})


def test_confusion_is_in_percent_of_the_row() -> None:
    ax = rates.confusion([0, 0, 0, 0, 1], [0, 0, 0, 1, 1], ["a", "b"], ["a", "b"])
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), [[75, 25], [0, 100]])
    assert [text.get_text() for text in ax.texts] == ["75", "25", "100"]
    with pytest.raises(InputError, match="two classes per image"):
        rates.confusion([0], [0, 1], ["a"], ["a"])
