"""Shares that were counted, with what the count leaves open; and which class was taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from hgadlib.errors import InputError
from hgadlib.figures.theme import PALETTE
from hgadlib.thresholds import Rate


def rate_intervals(
    rates: Mapping[str, Mapping[str, Rate]],
    *,
    target: float | None = None,
    label: str = "share (%)",
    colors: Sequence[str] = (PALETTE[2], PALETTE[1], PALETTE[4], PALETTE[7]),
    ax: Axes | None = None,
) -> Axes:
    """Draw counted shares with their intervals, a row a name and a colour a series.

    Args:
        rates: Series to name to rate.
        target: What was asked for, drawn as a dashed line.
        label: Of the axis.
        colors: Of the series; blue and vermilion are for normal and anomalous images.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: There is no rate, or the series differ in their names.
    """
    names = list(next(iter(rates.values()), ()))
    if not names or any(list(series) != names for series in rates.values()):
        raise InputError("expected the same names in at least one series of rates; found others")
    ax = plt.subplots(figsize=(5.6, 0.9 + 0.34 * len(names)))[1] if ax is None else ax
    spread = 0.5 / max(len(rates), 1)
    for i, ((series, found), color, marker) in enumerate(zip(rates.items(), colors, "osD^", strict=False)):
        at = np.arange(len(names)) + (i - (len(rates) - 1) / 2) * spread
        known = [(y, rate) for y, rate in zip(at, found.values(), strict=True) if rate.trials]
        value = np.array([100 * rate.value for _, rate in known])
        reach = [
            [100 * (rate.value - rate.low) for _, rate in known],
            [100 * (rate.high - rate.value) for _, rate in known],
        ]
        ax.errorbar(
            value, [y for y, _ in known], xerr=reach, fmt=marker, color=color, capsize=3, markersize=5,
            linewidth=1.2, label=series,
        )  # fmt: skip
    if target is not None:
        ax.axvline(
            100 * target, color="0.4", linestyle=(0, (4, 3)), linewidth=1.2, zorder=0, label="asked for"
        )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(-2, 102)
    ax.set_xlabel(label)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def confusion(
    true: ArrayLike,
    inferred: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw how many images of each class were taken for which, in percent of the row.

    Args:
        true: Row of each image, (N,) int.
        inferred: Column of each image, (N,) int.
        rows: Names of the true classes.
        columns: Names of the classes to choose from.
        title: Of the panel.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: Shapes differ, or there is no image.
    """
    true, inferred = np.asarray(true), np.asarray(inferred)
    if true.shape != inferred.shape or true.ndim != 1 or not len(true):
        raise InputError(f"expected two classes per image, (N,), found {true.shape} and {inferred.shape}")
    counts = np.zeros((len(rows), len(columns)))
    np.add.at(counts, (true, inferred), 1)
    total = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, total, out=np.zeros_like(counts), where=total > 0)
    size = (1.4 + 0.52 * len(columns), 0.9 + 0.36 * len(rows))
    ax = plt.subplots(figsize=size)[1] if ax is None else ax
    ax.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    if len(rows) * len(columns) <= 400:
        for (i, j), value in np.ndenumerate(share):
            if counts[i, j]:
                color = "white" if value > 55 else "black"
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_title(title, loc="left")
    ax.set(xlabel="taken for (% of the row)", ylabel="true class")
    return ax
