"""The losses of a training."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hgadlib.errors import InputError
from hgadlib.figures.theme import PALETTE, panel_grid

LOSS_LABELS = {
    "total": "total", "nll": "nll: likelihood", "mi": "mi: mutual information (Eq. 8)",
    "entropy": "entropy (Eq. 9)", "intra": "intra: within the class (Eq. 10)",
    "log_sigmoid": "log_sigmoid (released code)",
}  # fmt: skip
# Columns of a history that are no losses; so are those named test_*.
_BOOKKEEPING = {"epoch", "stage", "lr", "seconds", "images_per_s"}


def loss_curves(history: pd.DataFrame, *, unit: str = "nats per position", columns: int = 3) -> Figure:
    """Draw the total and each loss term against the epoch, a panel per term.

    The history has a row per epoch: epoch, perhaps stage, total, and a column per term, in the unit. That
    of epoch 0, the untrained model's, has no losses and is left out.

    Raises:
        InputError: There is no row, no column epoch or no loss.
    """
    if "epoch" in history:
        history = history[history["epoch"] > 0]
    terms = [c for c in map(str, history) if c not in _BOOKKEEPING and not c.startswith("test_")]
    terms = [c for c in terms if history[c].notna().any()]
    if "epoch" not in history or not terms:
        found = list(history)
        raise InputError(f"expected a history with epochs and losses, found columns {found}; train first")
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
