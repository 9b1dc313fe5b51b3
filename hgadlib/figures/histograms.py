"""Log-likelihoods of normal and anomalous positions, and how much they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hgadlib.errors import InputError
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, panel_grid
from hgadlib.overlap import histogram_overlap

Histogram = tuple[ArrayLike, ArrayLike]  # edges (bins + 1,), counts (bins,)


def _shared_histograms(normal: Any, anomalous: Any, bins: int) -> tuple[NDArray, NDArray, NDArray]:
    """Bring two groups, values or (edges, counts), to edges (bins + 1,) and two counts (bins,)."""
    if isinstance(normal, tuple) != isinstance(anomalous, tuple):
        raise InputError("expected both groups as values or both as (edges, counts), found one of each")
    if isinstance(normal, tuple):
        edges, a, b = np.asarray(normal[0]), np.asarray(normal[1]), np.asarray(anomalous[1])
        if not np.array_equal(edges, np.asarray(anomalous[0])):
            raise InputError(
                "expected the same bin edges for both groups, found others; count over common edges"
            )
        return edges, a, b
    a, b = np.ravel(normal).astype(float), np.ravel(anomalous).astype(float)
    both = np.concatenate([a, b])
    if not both.size or not np.isfinite(both).all():
        raise InputError(
            "expected finite log-likelihoods, found none or a non-finite one; look for NaN weights"
        )
    # A few values far off would squeeze the rest into one bin; they are counted in the outermost bins.
    low, high = np.quantile(both, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    a, b = (np.histogram(np.clip(group, edges[0], edges[-1]), edges)[0] for group in (a, b))
    return edges, a, b


def log_likelihood_histogram(
    normal: ArrayLike | Histogram,
    anomalous: ArrayLike | Histogram,
    *,
    title: str = "",
    unit: str = "nats",
    bins: int = 60,
    ax: Axes | None = None,
) -> Axes:
    """Draw normal against anomalous log-likelihoods, each as shares per bin, and what they have in common.

    Args:
        normal: Values of any shape, or a tuple (edges (bins + 1,), counts (bins,)).
        anomalous: Likewise, over the same edges.
        title: Usually the class.
        unit: Of the log-likelihood.
        bins: Bins for values; the lowest and highest thousandth are counted in the outermost ones.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: Edges differ, the kinds differ, or a value is not finite.

    Source: paper Fig. 2b, 2d and Fig. 5.
    """
    edges, *counts = _shared_histograms(normal, anomalous, bins)
    alone = ax is None
    ax = plt.subplots(figsize=(4.2, 2.8))[1] if ax is None else ax
    groups = (("normal", NORMAL_COLOR), ("anomalous", ANOMALOUS_COLOR))
    for (label, color), count in zip(groups, counts, strict=True):
        if count.sum():
            share = 100 * count / count.sum()
            ax.stairs(share, edges, fill=True, color=color, alpha=0.3)
            ax.stairs(share, edges, color=color, linewidth=1.4, label=label)
    overlap = histogram_overlap(*counts)
    shown = "–" if overlap is None else f"{overlap:.1%}".replace("%", " %")
    ax.set_title(f"{title}   overlap {shown}".strip(), loc="left")
    ax.set_xlabel(f"log-likelihood ({unit})")
    ax.set_ylabel("share per bin (%)")
    ax.set_ylim(bottom=0)
    ax.margins(x=0)
    if alone:
        ax.legend()
    return ax


def log_likelihood_histograms(
    normal: Mapping[str, ArrayLike | Histogram],
    anomalous: Mapping[str, ArrayLike | Histogram],
    *,
    unit: str = "nats",
    bins: int = 60,
    columns: int = 3,
) -> Figure:
    """Draw `log_likelihood_histogram` for each class.

    Args:
        normal: Values or (edges, counts) by class.
        anomalous: Likewise, of the same classes.
        unit: Of the log-likelihood.
        bins: Bins for values.
        columns: Panels in a row.
    """
    if set(normal) != set(anomalous) or not normal:
        raise InputError(f"expected the same classes twice, found {sorted(normal)} and {sorted(anomalous)}")
    figure, panels = panel_grid(len(normal), columns, 3.4, 2.5)
    for i, (ax, name) in enumerate(zip(panels, normal, strict=True)):
        log_likelihood_histogram(normal[name], anomalous[name], title=name, unit=unit, bins=bins, ax=ax)
        if i % min(columns, len(normal)):
            ax.set_ylabel("")
        if i < len(normal) - columns:
            ax.set_xlabel("")
    handles, labels = max((ax.get_legend_handles_labels() for ax in panels), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure
