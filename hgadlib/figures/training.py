"""What happens to a flow over its training: losses, test metrics, and the coefficients of its couplings."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hgadlib.errors import InputError
from hgadlib.figures.theme import ANOMALOUS_COLOR, NORMAL_COLOR, PALETTE, panel_grid

LOSS_LABELS = {
    "total": "total",
    "nll": "nll: likelihood",
    "mi": "mi: mutual information (Eq. 8)",
    "entropy": "entropy (Eq. 9)",
    "intra": "intra: within the class (Eq. 10)",
    "log_sigmoid": "log_sigmoid (released code)",
}
# Columns of a history that are no losses; so are those named test_*.
_BOOKKEEPING = {"epoch", "stage", "lr", "seconds", "images_per_s"}


def loss_curves(history: pd.DataFrame, *, unit: str = "nats per position", columns: int = 3) -> Figure:
    """Draw the total and each loss term against the epoch, a panel per term.

    Args:
        history: A row per epoch: epoch, perhaps stage, total, and a column per term.
        unit: Of the losses.
        columns: Panels in a row.

    Raises:
        InputError: There is no row, no column epoch or no loss.
    """
    terms = [c for c in map(str, history) if c not in _BOOKKEEPING and not c.startswith("test_")]
    terms = [c for c in terms if history[c].notna().any()]
    if "epoch" not in history or not terms:
        raise InputError(
            f"expected a history with epochs and losses, found columns {list(history)}; train first"
        )
    epochs = history["epoch"].to_numpy()
    figure, panels = panel_grid(len(terms), columns, 3.1, 2.3, sharex=True)
    changes = [] if "stage" not in history else epochs[1:][np.diff(history["stage"].to_numpy()) != 0]
    for i, (ax, term) in enumerate(zip(panels, terms, strict=True)):
        values = history[term].to_numpy(dtype=float)
        color = "0.2" if term == "total" else PALETTE[0]
        # A lone epoch has no line; a term of the second stage starts where the stage does.
        ax.plot(epochs, values, color=color, marker="o" if np.isfinite(values).sum() < 2 else None)
        for change in changes:
            ax.axvline(change - 0.5, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
            if i == 0:
                ax.annotate(
                    " stage 2", (change - 0.5, 0.97), xycoords=("data", "axes fraction"), va="top", fontsize=8
                )
        ax.set_title(LOSS_LABELS.get(term, term), loc="left")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        ax.tick_params(labelbottom=True)
        if i % min(columns, len(terms)) == 0:
            ax.set_ylabel(unit)
        if i >= len(terms) - columns:
            ax.set_xlabel("epoch")
    return figure


# Rows of the course of a training: column of a history, label, colour.
_METRICS = (
    ("test_image_auroc", "image AUROC", "0.2"),
    ("test_pixel_auroc", "pixel AUROC", PALETTE[4]),
    ("test_overlap", "overlap", PALETTE[1]),
)
_LIKELIHOODS = (
    ("test_log_prob_normal", "normal", NORMAL_COLOR),
    ("test_log_prob_anomalous", "anomalous", ANOMALOUS_COLOR),
)
COUPLING_LABELS = {
    "s_mean": "mean of $s$ (nats)",
    "s_std": "standard deviation of $s$ (nats)",
    "s_input": "share of the input in var $s$ (%)",
    "s_class": "share of the class in var $s$ (%)",
    "s_limit": "$s$ at the clamp's limit (%)",
    "t_mean": "mean of $t$",
    "t_std": "standard deviation of $t$",
    "t_input": "share of the input in var $t$ (%)",
    "t_class": "share of the class in var $t$ (%)",
    "log_gain": "mean log of the global scaling (nats)",
    "out_rms": "root mean square of the output",
}


def _columns(n: int, rows: int, height: float) -> tuple[Figure, np.ndarray]:
    """Make a column of panels per run; each row has one scale, so that runs compare."""
    size = (2.1 * n + 0.8, rows * height + 0.6)
    return plt.subplots(rows, n, figsize=size, squeeze=False, sharex="col", sharey="row")


def _curve(ax: Axes, epochs: np.ndarray, values: np.ndarray, **style: object) -> None:
    """Draw what is there of a curve: some columns have a value in evaluated epochs only."""
    seen = np.isfinite(values)
    sparse = seen.sum() < max(40, 2 * len(seen) // 3)
    ax.plot(epochs[seen], values[seen], marker="." if sparse else None, **style)  # type: ignore[arg-type]


def training_course(histories: Mapping[str, pd.DataFrame], *, unit: str = "nats per dimension") -> Figure:
    """Draw loss, AUROC with overlap, and log-likelihoods of the test positions; a column per run.

    Args:
        histories: By the name of the run: a row per epoch, as history.csv or a record's curves hold them;
            the columns named test_* have a value in evaluated epochs.
        unit: Of losses and log-likelihoods.

    Raises:
        InputError: There is no history, or one without evaluated epochs.

    Source: paper Fig. 2a and 2c.
    """
    if not histories:
        raise InputError("expected a history at least, found none")
    for name, history in histories.items():
        if "test_image_auroc" not in history:
            raise InputError(
                f"{name}: expected a history with evaluated epochs, found columns {list(history)}; train "
                "with train.evaluate_every above 0"
            )
    figure, axes = _columns(len(histories), 3, 1.9)
    for column, (name, history) in enumerate(histories.items()):
        epochs = history["epoch"].to_numpy()
        top, middle, bottom = axes[:, column]
        _curve(top, epochs, history["nll"].to_numpy(dtype=float), color=PALETTE[0])
        for key, label, color in _METRICS:
            if key in history:
                _curve(middle, epochs, 100 * history[key].to_numpy(dtype=float), color=color, label=label)
        for key, label, color in _LIKELIHOODS:
            if key in history:
                _curve(bottom, epochs, history[key].to_numpy(dtype=float), color=color, label=label)
        top.set_title(name, loc="left")
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes[0, 0].set_ylabel(f"training loss\n({unit})")
    axes[1, 0].set_ylabel("test (%)")
    axes[2, 0].set_ylabel(f"log-likelihood\n({unit})")
    lines = {
        label: handle
        for row in axes[1:]
        for ax in row
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    figure.align_ylabels(axes[:, 0])
    return figure


def coupling_course(
    tables: Mapping[str, pd.DataFrame],
    *,
    quantities: tuple[str, ...] = ("s_mean", "t_std", "s_input", "t_input"),
    group: str = "train",
    level: int | None = None,
) -> Figure:
    """Draw what a flow's coupling blocks predict over its training: a column per run, a line per block.

    Args:
        tables: By the name of the run: a row per evaluated epoch, level, block and group, as coupling.csv or
            a record's coupling hold them.
        quantities: A row of panels each, out of :data:`COUPLING_LABELS`.
        group: "train", "normal" or "anomalous" positions.
        level: Which, counted from 1; None for the deepest.

    Raises:
        InputError: A quantity is unknown, or a table has no row of this group.

    Source: paper Eq. 4 and Sec. 3.2.
    """
    if unknown := [name for name in quantities if name not in COUPLING_LABELS]:
        raise InputError(f"expected quantities out of {', '.join(COUPLING_LABELS)}, found {unknown}")
    figure, axes = _columns(len(tables), len(quantities), 1.75)
    for column, (name, whole) in enumerate(tables.items()):
        table = whole[whole["group"] == group]
        if table.empty:
            raise InputError(f"{name}: expected rows of group {group!r}, found {sorted(set(whole['group']))}")
        table = table[table["level"] == (table["level"].max() if level is None else level)]
        layers = sorted(table["layer"].unique())
        colors = sns.color_palette("viridis", len(layers) + 1)
        for row, quantity in enumerate(quantities):
            ax = axes[row, column]
            share = "%" in COUPLING_LABELS[quantity]
            for layer, color in zip(layers, colors, strict=False):
                own = table[table["layer"] == layer]
                values = own[quantity].to_numpy(dtype=float) * (100 if share else 1)
                _curve(ax, own["epoch"].to_numpy(), values, color=color, label=f"block {layer}")
            if not share:
                ax.axhline(0, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)))
        axes[0, column].set_title(name, loc="left")
        axes[-1, column].set_xlabel("epoch")
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    for row, quantity in enumerate(quantities):
        label = COUPLING_LABELS[quantity]
        axes[row, 0].set_ylabel(label.replace(" in var", "\nin var").replace(" of $", "\nof $"))
        if "%" in label:
            axes[row, 0].set_ylim(0, 103)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(handles) <= 12:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    figure.align_ylabels(axes[:, 0])
    return figure
