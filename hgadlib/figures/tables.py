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
    rows = {**metrics["per_class"], "mean": metrics["mean"]}
    values = [[np.nan if row.get(n) is None else 100 * row[n] for n in names] for row in rows.values()]
    table = pd.DataFrame(
        values, pd.Index(rows, name="class"), [f"{METRIC_LABELS[n]} (%)" for n in names], float
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
    styler = table.style.set_uuid("metrics").set_table_attributes('class="dataframe"')
    return styler.format(precision=1, na_rep="–").set_table_styles(look)  # type: ignore[arg-type]
