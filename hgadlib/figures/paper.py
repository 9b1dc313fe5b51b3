"""The paper's rows beside ours: tables that name their runs, and a figure of every run's point."""

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
        compared: What :func:`hgadlib.against_paper.compare` gave for one set of images.
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
        judged: What :func:`hgadlib.against_paper.judge` gave for one set of images.
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
        found: What :func:`hgadlib.results.findings` gave.
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
        tables: By set of images, what :func:`hgadlib.against_paper.compare` gave; without runs, left out.
        runs: What :func:`hgadlib.against_paper.measure` gave.
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
