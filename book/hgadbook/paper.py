"""The paper's tables as data, results/paper/*.csv, and how its numbers and ours are written in a table.

The tables were read from a text of the paper in which some cells are damaged. The column ``status`` says what
became of each: "read"; "repaired" (its characters are all there, but in wrong places); "completed" (by a
sentence of the paper that leaves no choice); "uncertain" (a digit could be another); "row unreadable" (a
number without its row); "unreadable"; "not reported" or "not applicable" (the paper has a dash there).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from pandas.io.formats.style import Styler

from hgadlib.config import project_dir
from hgadlib.errors import InputError

TABLES = {
    "table1": "Tab. 1: one model for all classes of MVTec AD",
    "table2": "Tab. 2: one model for all classes of BTAD, MVTec 3D-AD (RGB), VisA, and the union of all four",
    "table3a": "Tab. 3a: hierarchical Gaussian mixture prior, MVTec AD",
    "table3b": "Tab. 3b: number of centres within each class, MVTec AD",
    "table3c": "Tab. 3c: anomaly criterion, MVTec AD",
    "table3d": "Tab. 3d: weights of the losses, MVTec AD",
    "table3e": "Tab. 3e: optimisation strategy, MVTec AD",
    "table4": "Tab. 4: training samples and supervision",
    "table5": "Tab. 5: complexity",
    "table6": "Tab. 6: one model for each class of MVTec AD",
}
METRICS = ("image_auroc", "pixel_auroc")
# Rows of Tab. 1 and 2 by the parameter files of their images.
_DATASETS = {"mvtec": "Mean", "btad": "BTAD", "mvtec3d": "MVTec3D-RGB", "visa": "VisA", "union": "Union"}
_NUMBERS = ("value", "plus_minus", "stated", "printed", "computed", "difference")


def read_table(name: str) -> pd.DataFrame:
    """Read one table of the paper, a row per number.

    Args:
        name: Out of :data:`TABLES`; or "claims", which of two rows the paper says is better; or
            "disagreements", where its text as read here contradicts itself.

    Returns:
        Columns naming the cell (category, dataset, row, experiment, method, metric), then value, plus_minus
        where the table has them, unit, status, source, remark. Values are NaN where there is none. Claims
        have better and worse (keys for :func:`value_of`), metric, stated (by how much, where a sentence says
        it), unit, source.

    Raises:
        InputError: No such table.
    """
    if name not in (*TABLES, "claims", "disagreements"):
        raise InputError(f"expected a table of the paper, one of {', '.join(TABLES)}; found {name!r}")
    table = pd.read_csv(project_dir() / "results" / "paper" / f"{name}.csv", keep_default_na=False)
    # The values of Tab. 4 are words.
    numbers = [column for column in _NUMBERS if column in table and name != "table4"]
    return table.assign(**{column: pd.to_numeric(table[column]) for column in numbers})


def value_of(key: str, metric: str) -> float:
    """Look one number up.

    Args:
        key: Table and what names the cell in it, such as "table1/Mean/HGAD" or "table3a/tab3a_icg".
        metric: Such as "image_auroc".

    Returns:
        The number; NaN where the table has none or has no such row.
    """
    name, *names = key.split("/")
    table = read_table(name)
    table = table[table["metric"] == metric]
    columns = [c for c in ("category", "dataset", "experiment", "method") if c in table]
    for column, wanted in zip(columns, names, strict=True):
        table = table[table[column] == wanted]
    return float(table["value"].iloc[0]) if len(table) else np.nan


def as_printed(name: str, rows: str) -> pd.DataFrame:
    """Set a table out as the paper does, HGAD first: a column per method, "image / pixel" in each cell.

    Args:
        name: Out of :data:`TABLES`.
        rows: The column whose values become rows.

    Returns:
        Text; a dash where there is no number, a question mark behind an uncertain one, and "unreadable", once
        where both halves of a cell are.
    """
    table = read_table(name)
    cells: dict[str, dict[str, list[str]]] = {method: {} for method in table["method"]}
    for line in table.to_dict("records"):
        cells[line["method"]].setdefault(line[rows], []).append(_as_printed(line))
    text = {
        method: {
            row: " / ".join(dict.fromkeys(both) if both[0].isalpha() else both) for row, both in of.items()
        }
        for method, of in cells.items()
    }
    wide = pd.DataFrame(text, index=pd.Index(table[rows].unique(), name=rows)).fillna("–")
    return wide[sorted(wide, key=lambda method: method != "HGAD")]


def main_numbers() -> pd.DataFrame:
    """Set HGAD beside the best of the other methods on each of the paper's datasets, by Tab. 1 and 2.

    Returns:
        A row per dataset, named as its parameter file; text, "image / pixel" AUROC in percent. The best other
        method is found for each metric by itself.
    """
    union = read_table("table2").rename(columns={"dataset": "category"})
    table = pd.concat([read_table("table1").query("category == 'Mean'"), union]).dropna(subset="value")
    rows = {}
    for name, category in _DATASETS.items():
        cells: dict[str, list[str]] = {"HGAD": [], "best other": []}
        for metric in METRICS:
            own = table[(table["category"] == category) & (table["metric"] == metric)].set_index("method")
            others = own["value"].drop("HGAD")
            cells["HGAD"].append(f"{float(own['value']['HGAD']):.1f}")
            best = str(others.index[int(others.argmax())])
            cells["best other"].append(f"{others.max():.1f} ({best})")
        rows[name] = {title: " / ".join(both) for title, both in cells.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def _as_printed(line: Mapping[Any, Any]) -> str:
    """Write one number as the paper prints it, with its spread where it has one."""
    value, status, spread = line["value"], line["status"], line.get("plus_minus", np.nan)
    if np.isnan(value):
        return "–" if status.startswith("not ") else status
    text = "100" if value == 100 else f"{value:.1f}"
    return f"{text}{'' if np.isnan(spread) else f'±{spread:.2f}'}{'?' if status == 'uncertain' else ''}"


def number_text(value: float, half_width: float = np.nan, *, sign: str = "") -> str:
    r"""Write a number with one decimal, and half its interval where there is one; a dash for NaN.

    >>> number_text(-5.3, 1.4, sign="+"), number_text(72.0)
    ('−5.3\xa0±\xa01.4', '72.0')
    """
    if np.isnan(value):
        return "–"
    text = f"{value:{sign}.1f}".replace("-", "−")
    # Spaces at which no line breaks.
    return text if np.isnan(half_width) else f"{text}\xa0±\xa0{half_width:.1f}"


def records_cell(records: Sequence[str]) -> str:
    """Write how many runs stand behind a cell; unfolded, the cell names their records."""
    if not records:
        return "0"
    names = "<br>".join(html.escape(name) for name in records)
    return f"<details><summary>{len(records)}</summary>{names}</details>"


def folded(table: Styler, what: str) -> HTML:
    """Fold a long table: a line says how many rows there are and of what, a click shows them."""
    rows = len(table.data)  # type: ignore[attr-defined]
    summary = f"{rows} row{'s' * (rows != 1)}: {html.escape(what)}"
    return HTML(f"<details><summary>{summary}</summary>{table.to_html()}</details>")
