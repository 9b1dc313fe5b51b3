"""The paper's tables as data, results/paper/*.csv: each number with unit, source, and how well it is read.

The tables were read from a text of the paper in which some cells are damaged. The column ``status`` says what
became of each: "read"; "repaired" (its characters are all there, but in wrong places); "completed" (by a
sentence of the paper that leaves no choice); "uncertain" (a digit could be another); "row unreadable" (a
number without its row); "unreadable"; "not reported" or "not applicable" (the paper has a dash there).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

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
STATUSES = (
    "read", "repaired", "completed", "uncertain", "row unreadable", "unreadable", "not reported",
    "not applicable",
)  # fmt: skip
# Columns that do not name a cell.
_VALUES = {"value", "plus_minus", "unit", "status", "source", "remark", "meaning"}


def read_table(name: str) -> pd.DataFrame:
    """Read one table of the paper, a row per number.

    Args:
        name: Out of :data:`TABLES`.

    Returns:
        Columns naming the cell (category, dataset, row, experiment, method, metric), then value, plus_minus
        where the table has them, unit, status, source, remark. Values are NaN where there is none.

    Raises:
        InputError: No such table.
    """
    if name not in TABLES:
        raise InputError(f"expected a table of the paper, one of {', '.join(TABLES)}; found {name!r}")
    return _read(name)


def read_claims() -> pd.DataFrame:
    """Read which of two rows the paper says is better, and by how much where a sentence states it.

    Returns:
        Columns better, worse (keys for :func:`value_of`), metric, stated, unit, source.
    """
    return _read("claims")


def read_disagreements() -> pd.DataFrame:
    """Read the committed list of places where the paper's text as read here disagrees with itself."""
    return _read("disagreements")


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


def wide(table: pd.DataFrame, index: str, columns: str = "method") -> pd.DataFrame:
    """Set a table out as the paper does: "image / pixel" in each cell, a dash where there is no number.

    Args:
        table: What :func:`read_table` gave.
        index: The column whose values become rows.
        columns: The column whose values become columns.

    Returns:
        Text; an uncertain number has a question mark, an unreadable one is called so.
    """
    cells: dict[tuple[str, str], list[str]] = {}
    for row in table.to_dict("records"):
        cells.setdefault((row[index], row[columns]), []).append(cell_text(row))
    # A cell whose halves are both lost says it once.
    text = {
        key: " / ".join(dict.fromkeys(both) if both[0].isalpha() else both) for key, both in cells.items()
    }
    rows, heads = (list(dict.fromkeys(table[c])) for c in (index, columns))
    return pd.DataFrame(
        [[text.get((r, h), "–") for h in heads] for r in rows], pd.Index(rows, name=index), heads
    )


def cell_text(row: Mapping[Any, Any]) -> str:
    """Write one number as the paper prints it, with its spread where it has one."""
    value, status = row["value"], str(row["status"])
    if pd.isna(value):
        return "–" if status.startswith("not ") else status
    number = float(value)
    text = "100" if number == 100 else f"{number:.1f}"
    spread = row.get("plus_minus")
    if spread is not None and not pd.isna(spread):
        text += f"±{float(spread):.2f}"
    return f"{text}?" if status == "uncertain" else text


def disagreements() -> pd.DataFrame:
    """Check the tables against themselves: printed means against their rows, sentences against the tables.

    A printed mean disagrees when the mean of the printed rows, rounded to one decimal, is another number;
    that is no error of the paper where ``rounding`` says so: rows and mean are each rounded, by up to 0.05.
    A mean with a row that is lost is not checked.

    Returns:
        Columns where, metric, printed, computed (NaN where it cannot be), difference, rounding.
    """
    found = []
    for name in ("table1", "table6"):
        table = read_table(name)
        for (method, metric), part in table.groupby(["method", "metric"], sort=False):
            values = part.set_index("category")["value"]
            others, printed = values.drop("Mean"), float(values["Mean"])
            if others.isna().any():
                continue
            found.append((f"{name}/Mean/{method}", metric, printed, float(others.mean())))
    for claim in read_claims().dropna(subset=["stated"]).to_dict("records"):
        gain = value_of(claim["better"], claim["metric"]) - value_of(claim["worse"], claim["metric"])
        where = f"{claim['source']}: {claim['better']} over {claim['worse']}"
        found.append((where, claim["metric"], claim["stated"], gain))
    rows = [
        {
            "where": where,
            "metric": metric,
            "printed": printed,
            "computed": round(computed, 3),
            "difference": round(printed - computed, 3),
            "rounding": abs(printed - computed) <= 0.1 + 1e-9,
        }
        for where, metric, printed, computed in found
        # Half up as people round, not half to even; 1e-9 against binary fractions.
        if not abs(np.floor(10 * computed + 0.5 + 1e-9) / 10 - printed) < 1e-6
    ]
    return pd.DataFrame(rows)


def checked_means() -> int:
    """Count the printed means that :func:`disagreements` could recompute."""
    count = 0
    for name in ("table1", "table6"):
        for _, part in read_table(name).groupby(["method", "metric"], sort=False):
            count += not part["value"].isna().any()
    return count


def _read(name: str) -> pd.DataFrame:
    table = pd.read_csv(project_dir() / "results" / "paper" / f"{name}.csv", keep_default_na=False)
    for column in ("value", "plus_minus", "stated", "printed", "computed", "difference"):
        if column in table and not (name == "table4" and column == "value"):
            table[column] = pd.to_numeric(table[column])
    return table
