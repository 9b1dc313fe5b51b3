"""Tables for display: numbers in, a pandas Styler out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

METRIC_LABELS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1-max",
    "aupro": "AUPRO",
}


def auroc_table(metrics: Mapping[str, Any], *, names: Sequence[str] | None = None) -> Styler:
    """Set out the metrics of a run, a row per class and the mean last, in percent.

    Args:
        metrics: The content of metrics.json: "mean" and "per_class".
        names: Which metrics; all that the mean has, if not given.

    Returns:
        A table for display, one decimal, a dash for what has no meaning; ``.data`` holds the numbers.
    """
    names = [n for n in METRIC_LABELS if n in metrics["mean"]] if names is None else list(names)
    return _percent_table({**metrics["per_class"], "mean": metrics["mean"]}, names, "class", "metrics")


def protocol_table(
    metrics: Mapping[str, Any], *, names: Sequence[str] = ("image_auroc", "pixel_auroc")
) -> Styler:
    """Set out a run's mean metrics under every scoring protocol, the headline's last, in percent.

    Args:
        metrics: The content of metrics.json: "protocol", "mean" and "other_protocols".
        names: Which metrics.

    Returns:
        A table for display; ``.data`` holds the numbers.
    """
    protocol = metrics["protocol"]
    first = f"{protocol['normalisation']}/{protocol['criterion']}"
    others = metrics["other_protocols"].items()
    rows = {name: found["mean"] for name, found in others if name != first} | {first: metrics["mean"]}
    return _percent_table(rows, list(names), "normalisation/criterion", "protocols")


def _percent_table(rows: Mapping[str, Any], names: list[str], index: str, uuid: str) -> Styler:
    """Format rows of metrics with the last one emphasised."""
    values = [[np.nan if row.get(n) is None else 100 * row[n] for n in names] for row in rows.values()]
    table = pd.DataFrame(
        values, pd.Index(rows, name=index), [f"{METRIC_LABELS[n]} (%)" for n in names], float
    )
    look: list[dict[str, str]] = [
        {"selector": "", "props": "border-collapse: collapse"},
        {"selector": "td, th.col_heading", "props": "text-align: right; padding: 0.2em 0.7em"},
        {"selector": "th.row_heading, th.index_name", "props": "text-align: left"},
        {
            "selector": f".row{len(rows) - 1}",
            "props": "font-weight: bold; border-top: 1px solid currentColor",
        },
    ]
    # A fixed id instead of a random one, so that the same numbers give the same page.
    styler = table.style.set_uuid(uuid).set_table_attributes('class="dataframe"')
    return styler.format(precision=1, na_rep="–").set_table_styles(look)  # type: ignore[arg-type]


def fact_table(facts: Mapping[str, object]) -> Styler:
    """Set out named facts, one a row."""
    table = pd.DataFrame({"": [str(value) for value in facts.values()]}, pd.Index(facts))
    look: list[dict[str, str]] = [
        {"selector": "th.row_heading, td", "props": "text-align: left; padding: 0.2em 0.7em"},
    ]
    styler = table.style.set_uuid("facts").set_table_attributes('class="dataframe"').hide(axis="columns")
    return styler.set_table_styles(look)  # type: ignore[arg-type]
