"""Tables for display: numbers or texts in, a pandas Styler out; ``.data`` of it holds what was shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

METRIC_LABELS = {
    "image_auroc": "image AUROC", "image_ap": "image AP", "image_f1max": "image F1-max",
    "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP", "pixel_f1max": "pixel F1-max", "aupro": "AUPRO",
}  # fmt: skip


def styled(
    table: pd.DataFrame, *, name: str, caption: str = "", emphasise: Sequence[str] = (),
    markup: Sequence[Any] = (), **numbers: Any,
) -> Styler:  # fmt: skip
    """Style a table as all of the book are: its index and names to the left, its cells to the right.

    Names and cells stand as they are: none is read as HTML or as a formula.

    Args:
        table: Its index is the first column.
        name: A short identifier, other for each table of a page; the same numbers then give the same page.
        caption: Above the table, HTML.
        emphasise: Labels of the rows in bold.
        markup: Columns whose cells are HTML.
        **numbers: How pandas' ``Styler.format`` writes them, such as precision.
    """
    flat = table.columns.nlevels == 1
    look = [
        ("", "border-collapse: collapse"),
        ("td, th.col_heading", "text-align: right; padding: 0.2em 0.7em"),
        ("th.row_heading, th.index_name", "text-align: left; padding-right: 0.7em"),
        ("thead th", "vertical-align: bottom") if flat else ("th.level0.col_heading", "text-align: center"),
        ("caption", "caption-side: top; text-align: left; padding-bottom: 0.3em"),
        *((f".row{i}", "font-weight: bold") for i, label in enumerate(table.index) if label in emphasise),
    ]
    # Style sheets take no identifier with other letters.
    uuid = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
    styler = table.style.set_uuid(uuid).set_table_attributes(
        'class="dataframe mathjax_ignore tex2jax_ignore"'
    )
    styler.format(escape="html", **numbers).format_index(escape="html").format_index(escape="html", axis=1)
    if markup:
        styler.format(None, subset=list(markup), escape=None)
    return _with(styler.set_caption(caption) if caption else styler, *look)


def _with(styler: Styler, *look: tuple[str, str]) -> Styler:
    styles = [{"selector": selector, "props": props} for selector, props in look]
    return styler.set_table_styles(styles, overwrite=False)  # type: ignore[arg-type]


def auroc_table(metrics: Mapping[str, Any], *, names: Sequence[str] | None = None) -> Styler:
    """Show the metrics of a run in percent: a row per class, the mean last, a dash for what has no meaning.

    Args:
        metrics: The content of metrics.json: "mean" and "per_class".
        names: Which metrics; all that the mean has, if not given.
    """
    names = [n for n in METRIC_LABELS if n in metrics["mean"]] if names is None else names
    rows = [*metrics["per_class"].items(), ("mean", metrics["mean"])]
    return _percent_table(rows, names, "class", "metrics")


def protocol_table(
    metrics: Mapping[str, Any], *, names: Sequence[str] = ("image_auroc", "pixel_auroc")
) -> Styler:
    """Show a run's mean metrics in percent under every scoring protocol, the headline's last.

    The metrics are the content of metrics.json: "protocol", "mean" and "other_protocols".
    """
    protocol = metrics["protocol"]
    first = f"{protocol['normalisation']}/{protocol['criterion']}"
    others = metrics["other_protocols"].items()
    rows = [*((name, found["mean"]) for name, found in others if name != first), (first, metrics["mean"])]
    return _percent_table(rows, names, "normalisation/criterion", "protocols")


def _percent_table(
    rows: Sequence[tuple[str, Any]], names: Sequence[str], index: str, identifier: str
) -> Styler:
    """Show rows of metrics, the last one emphasised."""
    values = [[np.nan if row.get(n) is None else 100 * row[n] for n in names] for _, row in rows]
    labels = pd.Index([label for label, _ in rows], name=index)
    table = pd.DataFrame(values, labels, [f"{METRIC_LABELS[n]} (%)" for n in names], float)
    styler = styled(table, name=identifier, precision=1, na_rep="–")
    # By its place: a class may bear the name of the last row.
    return _with(styler, (f".row{len(rows) - 1}", "font-weight: bold; border-top: 1px solid currentColor"))


def fact_table(facts: Mapping[str, object]) -> Styler:
    """Show named facts, one a row."""
    table = pd.DataFrame({"": [str(value) for value in facts.values()]}, pd.Index(facts))
    return _with(styled(table, name="facts").hide(axis="columns"), ("td", "text-align: left"))
