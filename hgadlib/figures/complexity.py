"""What a model costs: multiply-adds by part, and a whole training."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from hgadlib.errors import InputError
from hgadlib.figures.theme import ANOMALOUS_COLOR, PALETTE


def cost_bars(
    costs: Mapping[str, Mapping[str, float]],
    *,
    label: str = "multiply-adds per image, from pixels to map",
    ax: Axes | None = None,
) -> Axes:
    """Draw what each part of each configuration costs, a group of bars a configuration, on a log scale.

    Args:
        costs: Name of the configuration to multiply-adds by part.
        label: Of the axis.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: There is no configuration, or they differ in their parts.
    """
    parts = list(next(iter(costs.values()), ()))
    if not parts or any(list(cost) != parts for cost in costs.values()):
        raise InputError("expected the same parts of at least one configuration; found others")
    ax = plt.subplots(figsize=(6.4, 0.5 + 0.32 * len(parts) * len(costs)))[1] if ax is None else ax
    height = 0.8 / len(parts)
    for i, part in enumerate(parts):
        values = [cost[part] for cost in costs.values()]
        at = np.arange(len(costs)) + (i - (len(parts) - 1) / 2) * height
        bars = ax.barh(at, values, 0.9 * height, color=PALETTE[i % len(PALETTE)], label=part)
        ax.bar_label(bars, [_engineering(value) for value in values], padding=3, fontsize=8)
    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.set_yticks(range(len(costs)), list(costs))
    ax.invert_yaxis()
    ax.set_xlabel(label)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _engineering(value)))
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def _engineering(value: float) -> str:
    """Write a count with a prefix.

    >>> [_engineering(v) for v in (950, 2.4e9, 6.5e16)]
    ['950', '2.4 G', '65 P']
    """
    for exponent, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**exponent:
            return (
                f"{value / 10**exponent:.2g} {prefix}"
                if value < 100 * 10**exponent
                else (f"{value / 10**exponent:.0f} {prefix}")
            )
    return f"{value:.0f}"


def stage_map(choices: pd.DataFrame, paper: Mapping[str, float], *, ax: Axes | None = None) -> Axes:
    """Draw what the choices of stages would cost against their parameters, and where the paper's row lies.

    Args:
        choices: As :func:`hgadlib.complexity.stage_choices` gives them.
        paper: "flops" in 1e9 and "learnable_parameters" in 1e6; empty draws no cross.
        ax: Where to draw; a new figure if not given.
    """
    ax = plt.subplots(figsize=(5.6, 3.8))[1] if ax is None else ax
    x, y = choices["learnable parameters (M)"], choices["GFLOP"]
    rotated = choices["with rotations (M)"]
    for name, a, b, c in zip(choices.index, x, rotated, y, strict=True):
        ax.plot([a, b], [c, c], color="0.75", linewidth=1, zorder=1)
        ax.annotate(f" {name}", (b, c), fontsize=7, color="0.35", va="center")
    ax.scatter(x, y, s=22, color=PALETTE[0], label="learnable parameters", zorder=2)
    ax.scatter(
        rotated, y, s=22, facecolor="white", edgecolor=PALETTE[0], label="with the fixed rotations", zorder=2
    )
    if paper:
        ax.scatter(
            paper["learnable_parameters"], paper["flops"], s=110, marker="X", color=ANOMALOUS_COLOR,
            edgecolors="black", label="paper, Tab. 5", zorder=3,
        )  # fmt: skip
    ax.margins(x=0.12)
    ax.set(xlabel="parameters (M)", ylabel="GFLOP per image, pixels to latent")
    ax.legend(loc="best")
    return ax
