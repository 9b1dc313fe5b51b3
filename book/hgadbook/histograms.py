"""How far normal and anomalous log-likelihoods lie apart in each class, from run to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hgadbook.homogeneous_mapping import DROP, FLOWS, course_title
from hgadlib.evaluation.likelihoods import histogram_overlap

Overlaps = Mapping[str, Mapping[str, float | None]]
"""By the name of the run, the overlap by class, 0 to 1; None where a class lacks one kind of positions."""


def class_overlaps(scores: Mapping[str, np.ndarray], level: int = -1) -> dict[str, float | None]:
    """Compute the overlap of each class on one level.

    Args:
        scores: The arrays of a run's scores.npz.
        level: Which level; the deepest by default.
    """
    counts = scores["log_likelihood_counts"][:, level]
    return {str(name): histogram_overlap(*counts[k]) for k, name in enumerate(scores["classes"])}


def overlap_table(overlaps: Overlaps) -> pd.DataFrame:
    """Set out overlaps in percent: a row per class and their mean, a column per run, and last less first.

    Classes stand in the order of their difference, the greatest gain first.
    """
    table = 100 * pd.DataFrame(overlaps, dtype=float).rename_axis("class")
    table["difference"] = table.iloc[:, -1] - table.iloc[:, 0]
    table = table.sort_values("difference", kind="stable")
    table.loc["mean"] = table.mean()
    return table


def overlap_sentence(overlaps: Overlaps) -> str:
    """Say in which classes the last run overlaps less than the first one, and in which more."""
    first, *_, last = overlaps
    table = overlap_table(overlaps).drop(index="mean")["difference"].dropna()
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
        f"{counted}. The mean difference is {table.mean():+.1f} points."
    )


def separation_table(metrics: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Set out each class's pixel AUROC, image AUROC where it has no masks, in percent, and last less first.

    Args:
        metrics: By the name of the run, the content of its metrics.json.
    """
    table = pd.DataFrame(
        {
            run: {
                name: found["image_auroc"] if found["pixel_auroc"] is None else found["pixel_auroc"]
                for name, found in content["per_class"].items()
            }
            for run, content in metrics.items()
        },
        dtype=float,
    )
    table = 100 * table.rename_axis("class")
    table["difference"] = table.iloc[:, -1] - table.iloc[:, 0]
    table.loc["mean"] = table.mean()
    return table


def overlap_records(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Find committed runs of the single Gaussian and of HGAD on the same images for as long.

    Args:
        records: What :func:`hgadlib.runs.ledger.read_records` gave.

    Returns:
        By what they ran on, as `course_title` says it, then by flow and class: the
        overlap, mean over levels.
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
