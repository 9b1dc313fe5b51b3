"""Figures of the information bottleneck: limits, rates and the information plane."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from hgadlib.errors import InputError
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE


def information_limit(table: pd.DataFrame, *, unit: str = "nats", ax: Axes | None = None) -> Axes:
    """Draw A + B of Eq. 24 against the noise, and the loss with its constants, which it approaches.

    Args:
        table: Columns "sigma", "information", "limit".
        unit: Of the informations.
        ax: Where to draw; a new figure if not given.
    """
    ax = plt.subplots(figsize=(4.4, 3.0))[1] if ax is None else ax
    ax.plot(table["sigma"], table["limit"], color="0.35", label="loss and constants")
    ax.plot(
        table["sigma"], table["information"], color=PALETTE[0], marker="o", linestyle="none", label="$A + B$"
    )
    ax.set_xscale("log")
    ax.set(xlabel=r"noise $\sigma$ (units of the features)", ylabel=f"information ({unit})")
    ax.legend()
    return ax


def gap_rates(
    gaps: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    unit: str = "nats",
    noise_unit: str = "units of the features",
    ax: Axes | None = None,
) -> Axes:
    r"""Draw how fast gaps vanish with the noise, in double logarithms, and a line of slope 2.

    Args:
        gaps: Name to (sigmas, gaps).
        unit: Of the gaps.
        noise_unit: Of the noise.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: There is nothing to draw.
    """
    if not gaps:
        raise InputError("expected at least one series of gaps, found none")
    ax = plt.subplots(figsize=(4.4, 3.0))[1] if ax is None else ax
    for (name, (sigmas, values)), color, marker in zip(gaps.items(), PALETTE, "osD^v", strict=False):
        ax.plot(sigmas, np.abs(np.asarray(values)), marker=marker, color=color, label=name)
    sigmas, values = (np.asarray(a, dtype=float) for a in next(iter(gaps.values())))
    i = int(np.argsort(sigmas)[len(sigmas) // 2])
    ax.plot(
        sigmas, np.abs(values[i]) * (sigmas / sigmas[i]) ** 2, color="0.5", linestyle=(0, (4, 3)),
        linewidth=1.2, label="slope 2", zorder=1,
    )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel=rf"noise $\sigma$ ({noise_unit})", ylabel=f"|gap| ({unit})")
    ax.legend()
    return ax


def bounds_over_training(table: pd.DataFrame) -> plt.Figure:
    """Draw both informations as the losses have them and as they are, against the length of the training.

    Args:
        table: As :func:`hgadlib.information_numbers.over_training` gives it.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.0))
    pairs = (
        ("A + B", "true I(X, Z)", r"$I(X, Z_\mathcal{E})$ (nats)", "$A + B$"),
        ("-L_mi", "true I(Z, Y)", r"$I(Z_\mathcal{E}, Y)$ (nats)", r"$-\mathcal{L}_{mi}$"),
    )
    for ax, (bound, true, label, name) in zip(axes, pairs, strict=True):
        ax.plot(table.index, table[bound], color=PALETTE[0], marker="o", label=name)
        ax.plot(table.index, table[true], color=ANOMALOUS_COLOR, linestyle=(0, (4, 2)), label="true value")
        ax.set_xscale("log")
        ax.set(xlabel="steps of training", ylabel=label)
        ax.legend()
    return figure


def information_plane(series: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw what training with several alphas makes of the two bounds, and the truth that none of them moves.

    Args:
        series: Name to a table as :func:`hgadlib.information_numbers.over_alpha` gives it.
        ax: Where to draw; a new figure if not given.
    """
    ax = plt.subplots(figsize=(5.4, 3.8))[1] if ax is None else ax
    looks = ((NORMAL_COLOR, 9.0, "none"), (PALETTE[2], 4.0, PALETTE[2]))
    for i, ((name, table), (color, size, face)) in enumerate(zip(series.items(), looks, strict=False)):
        # Curves may lie on each other: a ring around a dot shows both.
        ax.plot(
            table["A + B"], table["-L_mi"], color=color, marker="o", markersize=size, markerfacecolor=face,
            linewidth=2.4 - 1.2 * i, label=name,
        )  # fmt: skip
    for alpha, x, y in zip(table.index, table["A + B"], table["-L_mi"], strict=True):
        ax.annotate(rf"$\alpha$={alpha:g}", (x, y), textcoords="offset points", xytext=(6, -13), fontsize=8)
    first = next(iter(series.values())).iloc[0]
    ax.scatter(
        first["true I(X, Z)"], first["true I(Z, Y)"], s=150, marker="*", color=ANOMALOUS_COLOR, zorder=4,
        edgecolors="black", label="true values, for every flow",
    )  # fmt: skip
    ax.margins(0.12)
    ax.set(xlabel="$A + B$: bound of $I(X, Z_\\mathcal{E})$ from above (nats)")
    ax.set(ylabel=r"$-\mathcal{L}_{mi}$: estimate of $I(Z_\mathcal{E}, Y)$ (nats)")
    ax.legend()
    return ax
