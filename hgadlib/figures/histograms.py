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
from hgadlib.evaluation.likelihoods import histogram_overlap
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE, panel_grid

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
    _shared_legend(figure, panels)
    return figure


def histogram_pairs(
    runs: Mapping[str, tuple[Mapping[str, Histogram], Mapping[str, Histogram]]],
    *,
    unit: str = "nats",
    size: tuple[float, float] = (3.3, 1.75),
) -> Figure:
    """Draw the histograms of several runs side by side: a row per class, a column per run.

    Args:
        runs: By the name of the run: normal and anomalous log-likelihoods, (edges, counts) by class.
        unit: Of the log-likelihood.
        size: Width and height of a panel in inches.

    Raises:
        InputError: There is no run, or runs differ in their classes.

    Source: paper Fig. 5.
    """
    classes = [list(normal) for normal, _ in runs.values()]
    if not classes or not classes[0] or any(names != classes[0] for names in classes):
        raise InputError(f"expected runs on the same classes, found {classes}")
    shape = (len(classes[0]), len(runs))
    figure, axes = plt.subplots(
        *shape, figsize=(size[0] * shape[1], size[1] * shape[0] + 0.5), squeeze=False, sharex="col"
    )
    for column, (run, (normal, anomalous)) in enumerate(runs.items()):
        for row, name in enumerate(classes[0]):
            ax = axes[row, column]
            log_likelihood_histogram(normal[name], anomalous[name], unit=unit, ax=ax)
            ax.set_xlabel(f"log-likelihood ({unit})" if row + 1 == shape[0] else "")
            ax.set_ylabel(f"{name}\nshare per bin (%)" if column == 0 else "")
        axes[0, column].set_title(f"{run}\n{axes[0, column].get_title(loc='left')}", loc="left")
    _shared_legend(figure, axes.ravel().tolist())
    return figure


def _shared_legend(figure: Figure, panels: list[Axes]) -> None:
    # A class without anomalous positions has one label only.
    handles, labels = max((ax.get_legend_handles_labels() for ax in panels), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="outside upper right", ncols=2)


def overlap_change(overlaps: Mapping[str, Mapping[str, float | None]], *, ax: Axes | None = None) -> Axes:
    """Draw each class's overlap under several runs on one line, the shorter the better.

    Args:
        overlaps: By the name of the run: overlap by class, 0 to 1; None where it has no meaning.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: There are no two runs, or they differ in their classes.
    """
    names = [list(found) for found in overlaps.values()]
    if len(names) < 2 or any(set(found) != set(names[0]) for found in names):
        raise InputError(f"expected two runs or more on the same classes, found {names}")
    ax = plt.subplots(figsize=(6.4, 0.32 * len(names[0]) + 1.2))[1] if ax is None else ax
    first, *_, last = overlaps.values()
    rows = [name for name in names[0] if first[name] is not None and last[name] is not None]
    rows.sort(key=lambda name: float(last[name] or 0) - float(first[name] or 0), reverse=True)
    for y, name in enumerate(rows):
        found = [100 * float(run[name] or 0) for run in overlaps.values()]
        ax.plot([min(found), max(found)], [y, y], color="0.75", linewidth=2, zorder=1)
    for i, (run, own) in enumerate(overlaps.items()):
        marker = "os^Dv"[i % 5]
        values = [100 * float(own[name] or 0) for name in rows]
        ax.scatter(
            values,
            range(len(rows)),
            marker=marker,
            color=PALETTE[(7, 2, 1, 4, 5)[i % 5]],
            label=run,
            zorder=2,
        )
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlim(0, 100)
    ax.set_xlabel("overlap of normal and anomalous log-likelihoods (%)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(overlaps))
    return ax
