"""Log-likelihoods of normal and anomalous positions, and how much they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hgadlib.errors import InputError
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, literal, panel_grid

Histogram = tuple[ArrayLike, ArrayLike]
"""Edges (bins + 1,) and counts (bins,)."""


def log_likelihood_histogram(
    normal: Histogram, anomalous: Histogram, *, title: str = "", unit: str = "nats", ax: Axes | None = None
) -> Axes:
    """Draw normal against anomalous log-likelihoods, each as shares per bin, and what they have in common.

    Args:
        normal: Edges and counts.
        anomalous: Likewise, over the same edges.
        title: Usually the class.
        unit: Of the log-likelihood.
        ax: Where to draw; a new figure if not given.
    Raises:
        InputError: Edges differ.
    Source: paper Fig. 2b, 2d and Fig. 5.
    """
    edges = np.asarray(normal[0])
    if not np.array_equal(edges, np.asarray(anomalous[0])):
        raise InputError("expected the same bin edges for both groups, found others; count over common edges")
    alone = ax is None
    ax = plt.subplots(figsize=(4.2, 2.8))[1] if ax is None else ax
    shares = []
    for label, color, counts in (
        ("normal", NORMAL_COLOR, np.asarray(normal[1])),
        ("anomalous", ANOMALOUS_COLOR, np.asarray(anomalous[1])),
    ):
        if counts.sum():
            shares.append(100 * counts / counts.sum())
            ax.stairs(shares[-1], edges, fill=True, color=color, alpha=0.3)
            ax.stairs(shares[-1], edges, color=color, linewidth=1.4, label=label)
    overlap = f"{np.minimum(*shares).sum():.1f} %" if len(shares) == 2 else "–"
    ax.set_title(f"{literal(title)}   overlap {overlap}".strip(), loc="left")
    ax.set(xlabel=f"log-likelihood ({unit})", ylabel="share per bin (%)")
    ax.set_ylim(bottom=0)
    ax.margins(x=0)
    if alone:
        ax.legend()
    return ax


def log_likelihood_histograms(
    normal: Mapping[str, Histogram], anomalous: Mapping[str, Histogram], *,
    unit: str = "nats", columns: int = 3,
) -> Figure:  # fmt: skip
    """Draw `log_likelihood_histogram` for each class.

    Both hold edges and counts by class; the unit is of the log-likelihood, columns are panels in a row.

    Raises:
        InputError: The classes differ, or there is none.
    """
    if set(normal) != set(anomalous) or not normal:
        raise InputError(f"expected the same classes twice, found {sorted(normal)} and {sorted(anomalous)}")
    figure, panels = panel_grid(len(normal), columns, 3.4, 2.5)
    for i, (ax, name) in enumerate(zip(panels, normal, strict=True)):
        log_likelihood_histogram(normal[name], anomalous[name], title=name, unit=unit, ax=ax)
        if i % min(columns, len(normal)):
            ax.set_ylabel("")
        if i < len(normal) - columns:
            ax.set_xlabel("")
    shared_legend(figure, panels)
    return figure


def shared_legend(figure: Figure, panels: Iterable[Axes], *, columns: int = 2, below: bool = False) -> None:
    """Put one legend outside of the panels for all that is labelled in any of them."""
    found = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found[label] = handle
    figure.legend(
        list(found.values()), list(found), ncols=columns,
        loc="outside lower center" if below else "outside upper right",
    )  # fmt: skip
