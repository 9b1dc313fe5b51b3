"""The paper's tables as data, results/paper/*.csv: each number with unit, source, and how well it is read.

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas.io.formats.style import Styler

from hgadlib.config import project_dir
from hgadlib.errors import InputError
from hgadlib.figures.tables import METRIC_LABELS
from hgadlib.figures.theme import PALETTE, panel_grid

METRIC_COLORS = {"image_auroc": PALETTE[2], "pixel_auroc": PALETTE[4]}


def text_table(table: pd.DataFrame, *, name: str, caption: str = "", emphasise: Sequence[str] = ()) -> Styler:
    """Set out cells of text, numbers to the right, on a page that may be narrow.

    Args:
        table: Texts; its index is the first column.
        name: A short identifier, other for each table of a page.
        caption: Above the table.
        emphasise: Names of rows in bold.
    """
    look: list[dict[str, str]] = [
        {"selector": "", "props": "border-collapse: collapse"},
        {"selector": "td, th.col_heading", "props": "text-align: right; padding: 0.2em 0.7em"},
        {"selector": "th.row_heading, th.index_name", "props": "text-align: left; padding-right: 0.7em"},
        {"selector": "th.level0.col_heading", "props": "text-align: center"},
        {"selector": "caption", "props": "caption-side: top; text-align: left; padding-bottom: 0.3em"},
    ]
    if table.columns.nlevels == 1:
        look[3] = {"selector": "thead th", "props": "vertical-align: bottom"}
    # An identifier without letters beyond ASCII, for the style sheet's sake.
    uuid = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
    styler = table.style.set_uuid(uuid).set_table_attributes('class="dataframe"')
    if caption:
        styler = styler.set_caption(caption)
    for row, label in enumerate(table.index):
        if label in emphasise:
            look.append({"selector": f".row{row}", "props": "font-weight: bold"})
    return styler.set_table_styles(look)  # type: ignore[arg-type]


def records_cell(records: Sequence[str]) -> str:
    """Write how many runs stand behind a cell; unfolded, the cell names their records."""
    if not records:
        return "0"
    names = "<br>".join(html.escape(name) for name in records)
    return f"<details><summary>{len(records)}</summary>{names}</details>"


def comparison_table(
    compared: pd.DataFrame, title: str, *, note: str = "", reference: str = "", name: str = "compared"
) -> Styler:
    """Set out paper | ours | difference | runs, a row per row of the paper's table, in percent.

    Args:
        compared: What :func:`hgadbook.ablations.compare` gave for one set of images.
        title: The set of images.
        note: What else the caption says, such as the split.
        reference: The row in bold.
        name: A short identifier, other for each kind of table of a page.

    Returns:
        A table for display; ``.data`` holds its texts.
    """
    cells: dict[tuple[str, str], list[str]] = {}
    counts = compared.groupby("row", sort=False)["records"].first()
    for metric, part in compared.groupby("metric", sort=False):
        measured = part["seeds"].sum() > 0
        if measured and part["ours"].isna().all():
            continue  # a set without masks
        head = f"{METRIC_LABELS[str(metric)]} (%)"
        rows = part.set_index("row").loc[counts.index].to_dict("records")
        cells[head, "paper"] = [_paper_text(row) for row in rows]
        cells[head, "ours"] = [_ours_text(row) for row in rows]
        cells[head, "difference"] = [signed(row["difference"]) for row in rows]
    cells["", "runs"] = [records_cell(records) for records in counts]
    columns = pd.MultiIndex.from_tuples(list(cells))
    table = pd.DataFrame(dict(enumerate(cells.values())), index=pd.Index(counts.index, name=None))
    table.columns = columns
    caption = f"<b>{html.escape(title)}</b>" + (f". {html.escape(note)}" if note else "")
    return text_table(table, name=f"{name}-{title}", caption=caption, emphasise=[reference])


def claims_table(judged: pd.DataFrame, title: str, *, name: str = "claims") -> Styler:
    """Set out the paper's orderings and what the runs say of them.

    Args:
        judged: What :func:`hgadbook.ablations.judge` gave for one set of images.
        title: The set of images.
        name: A short identifier, other for each kind of table of a page.

    Returns:
        A table for display; ``.data`` holds its texts.
    """
    rows = judged.to_dict("records")
    table = pd.DataFrame(
        {
            "AUROC": [str(row["metric"]).split("_")[0] for row in rows],
            "paper": [signed(row["paper"]) for row in rows],
            "ours": [signed(row["ours"], row["half_width"]) for row in rows],
            "seeds": [f"{row['agree']} of {row['seeds']}" if row["seeds"] else "–" for row in rows],
            "verdict": [str(row["verdict"]) for row in rows],
        },
        index=pd.Index([str(row["claim"]) for row in rows], name=None),
    )
    caption = f"<b>{html.escape(title)}</b>, percentage points"
    return text_table(table, name=f"{name}-{title}", caption=caption)


def findings_table(
    found: pd.DataFrame, *, metric: str = "image_auroc", caption: str = "", name: str
) -> Styler:
    """Set out every ordering that the paper claims, with what each set of images says of it.

    Args:
        found: What :func:`hgadbook.results.findings` gave.
        metric: Of the lines shown.
        caption: Above the table.
        name: A short identifier, other for each table of a page.

    Returns:
        A table for display, percentage points; ``.data`` holds its texts.
    """
    part = found[found["metric"] == metric]
    rows: dict[str, dict[str, str]] = {}
    for line in part.to_dict("records"):
        row = rows.setdefault(f"{line['table']}: {line['claim']}", {"paper": signed(line["paper"])})
        # Of one run, the sign says all that there is to say.
        word = "one run" if line["seeds"] == 1 else str(line["verdict"])
        value = f"{signed(line['ours'], line['half_width'])}, {word}" if line["seeds"] else "not measured"
        row[str(line["images"])] = value
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("not measured")
    return text_table(table, name=name, caption=caption)


def comparison_points(tables: Mapping[str, pd.DataFrame], runs: pd.DataFrame, *, columns: int = 3) -> Figure:
    """Draw each run as a point, the mean over seeds with its interval, and the paper's number, row by row.

    Args:
        tables: By set of images, what :func:`hgadbook.ablations.compare` gave; without runs, left out.
        runs: What :func:`hgadbook.ablations.measure` gave.
        columns: Panels in a row.

    Raises:
        InputError: There is no table.
    """
    if not tables:
        raise InputError("expected the table of one set of images or more, found none")
    shown = {title: part for title, part in tables.items() if part["seeds"].sum()} or dict(
        [*tables.items()][:1]
    )
    first = next(iter(shown.values()))
    labels = [
        row for row in dict.fromkeys(first["row"]) if (first[first["row"] == row]["experiment"] != "").all()
    ]
    figure, panels = panel_grid(len(shown), columns, 3.3, 1.1 + 0.42 * len(labels), sharey=True)
    for ax, (title, part) in zip(panels, shown.items(), strict=True):
        for metric, shift in (("image_auroc", -0.16), ("pixel_auroc", 0.16)):
            _rows(
                ax, part, runs[(runs["images"] == title) & (runs["metric"] == metric)], metric, shift, labels
            )
        ax.set_title(title, loc="left")
        ax.set_xlabel("AUROC (%)")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.grid(axis="x", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    marks = [
        Line2D([], [], color=color, marker="o", linestyle="none", label=METRIC_LABELS[metric])
        for metric, color in METRIC_COLORS.items()
    ]
    marks += [
        Line2D([], [], color="0.3", marker="o", markersize=4, linestyle="none", alpha=0.6, label="one run"),
        Line2D([], [], color="0.3", marker="|", markersize=9, linestyle="-", label="mean, 95 % interval"),
        Line2D([], [], color="0.3", marker="D", fillstyle="none", linestyle="none", label="paper, MVTec AD"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(5, 2 * len(shown) + 1))
    return figure


def signed(value: float, half_width: float = float("nan")) -> str:
    """Write a difference with its sign, and its interval where there is one; a dash for none."""
    if np.isnan(value):
        return "–"
    text = f"{value:+.1f}".replace("-", "−")
    return text if np.isnan(half_width) else f"{text} ± {half_width:.1f}"


def _rows(
    ax: Axes, part: pd.DataFrame, runs: pd.DataFrame, metric: str, shift: float, labels: Sequence[str]
) -> None:
    """Draw one metric's rows of one panel."""
    color = METRIC_COLORS[metric]
    for row in part[part["metric"] == metric].to_dict("records"):
        if row["row"] not in labels:
            continue
        y = labels.index(row["row"]) + shift
        points = runs[runs["experiment"] == row["experiment"]]["value"]
        ax.plot(points, np.full(len(points), y), "o", color=color, markersize=4, alpha=0.6)
        width = 0.0 if np.isnan(row["half_width"]) else row["half_width"]
        if row["seeds"] > 1 and not np.isnan(row["ours"]):
            ax.plot([row["ours"] - width, row["ours"] + width], [y, y], "-", color=color, linewidth=1.2)
            ax.plot(row["ours"], y, "|", color=color, markersize=9)
        ax.plot(row["paper"], y, "D", color=color, markersize=5, fillstyle="none")


def _paper_text(row: Mapping[Any, Any]) -> str:
    value = float(row["paper"])
    return str(row["status"]) if np.isnan(value) else f"{value:.1f}"


def _ours_text(row: Mapping[Any, Any]) -> str:
    value, width = float(row["ours"]), float(row["half_width"])
    if np.isnan(value):
        return "not measured" if not row["seeds"] else "–"
    return f"{value:.1f}" if np.isnan(width) else f"{value:.1f} ± {width:.1f}"


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
