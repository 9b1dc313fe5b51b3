"""How far normal and anomalous log-likelihoods lie apart in each class, from run to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hgadbook.homogeneous_mapping import DROP, FLOWS, course_title
from hgadbook.paper import number_text
from hgadlib.evaluation.likelihoods import Histograms
from hgadlib.figures.histograms import log_likelihood_histogram, shared_legend
from hgadlib.figures.theme import PALETTE, literal

Overlaps = Mapping[str, Mapping[str, float | None]]
"""By the name of the run, the overlap by class, 0 to 1; None where a class lacks one kind of positions."""


def overlap_table(overlaps: Overlaps) -> pd.DataFrame:
    """Tabulate overlaps in percent: a row per class and their mean, a column per run, and last less first.

    Classes stand in the order of their difference, the greatest gain first.
    """
    table = 100 * pd.DataFrame(overlaps, dtype=float).rename_axis("class")
    table["difference"] = table.iloc[:, -1] - table.iloc[:, 0]
    return _with_mean(table.sort_values("difference", kind="stable"))


def separation_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Tabulate the classes' pixel AUROC (image AUROC without masks) in each run's metrics.json, percent."""
    values = {
        run: {
            name: found["image_auroc"] if found["pixel_auroc"] is None else found["pixel_auroc"]
            for name, found in content["per_class"].items()
        }
        for run, content in metrics.items()
    }
    table = 100 * pd.DataFrame(values, dtype=float).rename_axis("class")
    table["difference"] = table.iloc[:, -1] - table.iloc[:, 0]
    return _with_mean(table)


def _with_mean(table: pd.DataFrame) -> pd.DataFrame:
    """Add the mean of the rows as the last one; a class may bear its name."""
    return pd.concat([table, table.mean().to_frame("mean").T]).rename_axis("class")


def overlap_sentence(overlaps: Overlaps) -> str:
    """State in which classes the last run overlaps less than the first one, and in which more."""
    first, *_, last = overlaps
    table = overlap_table(overlaps)["difference"].iloc[:-1].dropna()
    parts = {
        f"less by {DROP:g} points or more": table[table <= -DROP],
        "as much within that": table[table.abs() < DROP],
        f"more by {DROP:g} points or more": table[table >= DROP],
    }
    counted = "; ".join(
        f"{how} in {len(found)} ({', '.join(map(str, found.index))})" if len(found) else f"{how} in none"
        for how, found in parts.items()
    )
    return (
        f"Of {len(table)} classes, normal and anomalous log-likelihoods of {last} overlap, against {first}: "
        f"{counted}. The mean difference is {number_text(table.mean(), sign='+')} points."
    )


def overlap_records(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Find the ledger's runs of the single Gaussian and of HGAD on the same images for as long.

    Returns:
        By title, flow and class: the overlap, mean over levels.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for experiment in ("sec32_single", "sec32_hgad"):
        for record in records:
            if record["experiment"] == experiment and record.get("overlap"):
                found.setdefault(course_title(record), {})[FLOWS[experiment]] = {
                    name: None if None in levels else float(np.mean(levels))
                    for name, levels in record["overlap"].items()
                }
    return {title: of for title, of in found.items() if len(of) == 2}


def histogram_pairs(runs: Mapping[str, tuple[Histograms, Histograms]], *, unit: str = "nats") -> Figure:
    """Draw the histograms of several runs side by side: a row per class, a column per run.

    Args:
        runs: By the name of the run: normal and anomalous log-likelihoods, of the same classes in all runs.
        unit: Of the log-likelihood.

    Source: paper Fig. 5.
    """
    classes = list(next(iter(runs.values()))[0])
    shape = (len(classes), len(runs))
    size = (3.3 * shape[1], 1.75 * shape[0] + 0.5)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, sharex="col")
    for column, (run, (normal, anomalous)) in enumerate(runs.items()):
        for ax, name in zip(axes[:, column], classes, strict=True):
            log_likelihood_histogram(normal[name], anomalous[name], unit=unit, ax=ax)
            ax.set_ylabel(f"{literal(name)}\nshare per bin (%)" if column == 0 else "")
        axes[0, column].set_title(f"{run}\n{axes[0, column].get_title(loc='left')}", loc="left")
    for ax in axes[:-1].ravel():
        ax.set_xlabel("")
    shared_legend(figure, axes.ravel())
    return figure


def overlap_change(overlaps: Overlaps) -> Axes:
    """Draw each class's overlap under several runs on one line, the greatest gain at the top."""
    table = 100 * pd.DataFrame(overlaps, dtype=float).dropna()
    table = table.loc[
        (table.iloc[:, -1] - table.iloc[:, 0]).sort_values(ascending=False, kind="stable").index
    ]
    ax = plt.subplots(figsize=(6.4, 0.32 * len(next(iter(overlaps.values()))) + 1.2))[1]
    ax.hlines(range(len(table)), table.min(axis=1), table.max(axis=1), color="0.75", linewidth=2, zorder=1)
    for run, marker, color in zip(table, "os^Dv", (7, 2, 1, 4, 5), strict=False):
        ax.scatter(table[run], range(len(table)), marker=marker, color=PALETTE[color], label=run, zorder=2)
    ax.set_yticks(range(len(table)), [*map(literal, table.index)])
    ax.set_xlim(0, 100)
    ax.set_xlabel("overlap of normal and anomalous log-likelihoods (%)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(overlaps))
    return ax


def ledger_sentence(recorded: Mapping[str, Overlaps]) -> str:
    """Say by how much the last run overlaps more than the first one in what :func:`overlap_records` found.

    >>> ledger_sentence({})
    'Measured over longer courses: no run of both in the ledger.'
    """
    if not recorded:
        return "Measured over longer courses: no run of both in the ledger."
    parts = [
        f"{number_text(overlap_table(overlaps)['difference'].iloc[-1], sign='+')} points ({title})"
        for title, overlaps in recorded.items()
    ]
    return f"In the ledger's runs the mean overlap differs by {', '.join(parts)}."
