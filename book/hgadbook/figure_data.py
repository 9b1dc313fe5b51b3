"""What a figure shows, as a table: the build puts it beside the figure as CSV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text

COLUMNS = ["panel", "x axis", "y axis", "kind", "series", "x", "y", "value"]
_LARGEST_IMAGE = 64 * 64  # cells: a larger one is a photograph or a map, which no table serves


def data_of(figure: Figure) -> pd.DataFrame:
    """List what a figure draws, panel by panel, in the units in which it was given to matplotlib.

    Lines, points, bars, steps of histograms, intervals, outlines of bands, and images of few cells.
    Photographs, maps and what stands at a place of the panel instead of one of the data are left out.

    Returns:
        Columns panel (its title, or its number), x axis and y axis (their labels), kind, series (its label,
        or its number), x and y (a category's name where the axis has names), value (a cell's value, or
        where a bar or step starts; else NaN). Empty where a figure shows nothing but pictures.
    """
    rows = []
    for number, ax in enumerate(figure.axes, start=1):
        if not ax.get_visible() or ax.get_label() == "<colorbar>":
            continue
        title = " ".join(" ".join(ax.get_title(loc=loc) for loc in ("left", "center", "right")).split())
        place = (title or str(number), ax.get_xlabel(), ax.get_ylabel())
        names = [_names(axis.get_ticklocs(), axis.get_ticklabels()) for axis in (ax.xaxis, ax.yaxis)]
        for kind, series, points in _drawn(ax):
            for x, y, value in points:
                rows.append((*place, kind, series, names[0].get(x, x), names[1].get(y, y), value))
    return pd.DataFrame(rows, columns=COLUMNS)


def _names(places: np.ndarray, labels: list[Text]) -> dict[float, str]:
    """Name the places of an axis whose ticks are words."""
    texts = {float(place): label.get_text() for place, label in zip(places, labels, strict=False)}
    return {place: text for place, text in texts.items() if any(map(str.isalpha, text)) and "$" not in text}


def _drawn(ax: Axes) -> Iterator[tuple[str, str, np.ndarray]]:
    """Give what a panel draws: kind, series, and (N, 3) of x, y and value."""
    for number, line in enumerate(ax.lines, start=1):
        # What spans the panel, such as a dashed line at a threshold, has a transform of its own.
        if line.get_transform() == ax.transData or line.get_transform().contains_branch(ax.transData):
            yield "line", _label(line.get_label(), number), _columns(*line.get_data())
    for number, drawn in enumerate(ax.collections, start=1):
        series = _label(drawn.get_label(), number)
        if isinstance(drawn, PathCollection):
            yield "point", series, _columns(*np.asarray(drawn.get_offsets()).T)
        elif isinstance(drawn, LineCollection | PolyCollection):
            kind = "interval" if isinstance(drawn, LineCollection) else "band"
            for path in drawn.get_paths():
                yield kind, series, _columns(*np.asarray(path.vertices).T)
    for number, patch in enumerate(ax.patches, start=1):
        series = _label(patch.get_label(), number)
        if isinstance(patch, StepPatch):
            heights, edges, _ = patch.get_data()
            yield "step", series, _columns(edges[1:], heights, edges[:-1])
        elif isinstance(patch, Rectangle) and patch.get_transform().contains_branch(ax.transData):
            (x, y), wide, high = patch.get_xy(), patch.get_width(), patch.get_height()
            # A bar lies along the side that starts at zero.
            middle = (x + wide, y + high / 2, x) if x == 0 else (x + wide / 2, y + high, y)
            yield "bar", series, _columns(*middle)
    for number, image in enumerate(ax.images, start=1):
        values = np.asarray(image.get_array())
        if values.ndim == 2 and values.size <= _LARGEST_IMAGE:
            rows, columns = np.indices(values.shape)
            yield "cell", _label(image.get_label(), number), _columns(columns, rows, values)


def _label(text: object, number: int) -> str:
    return str(number) if str(text).startswith("_") else str(text)


def _columns(x: Any, y: Any, value: Any = np.nan) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*(np.asarray(each, float) for each in (x, y, value))), -1).reshape(
        -1, 3
    )
