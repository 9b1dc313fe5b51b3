"""The one look of all figures, and the colours that mean the same in every chapter.

Every figure stands on an opaque white ground, so that it reads on a light and on a dark page. Colours come
from seaborn's colour-blind palette; normal is always blue, anomalous always vermilion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

PALETTE: tuple[str, ...] = tuple(sns.color_palette("colorblind").as_hex())
NORMAL_COLOR, ANOMALOUS_COLOR = PALETTE[0], PALETTE[3]
# Asked, where they are installed, for what the font of the figures lacks.
_FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Microsoft YaHei", "Malgun Gothic", "Hiragino Sans",
    "PingFang SC", "Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip


def theme() -> None:
    """Set the style of all figures that follow."""
    installed = {font.name for font in fontManager.ttflist}
    sns.set_theme(
        context="notebook", style="ticks", palette=PALETTE,
        rc={
            "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.dpi": 200,
            "savefig.bbox": "tight", "figure.dpi": 100, "figure.constrained_layout.use": True,
            "font.family": ["sans-serif", *(name for name in _FALLBACKS if name in installed)],
            "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "xtick.labelsize": 9,
            "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False, "axes.spines.top": False,
            "axes.spines.right": False, "axes.edgecolor": "0.35", "lines.linewidth": 1.6,
        },
    )  # fmt: skip


def literal(text: str, longest: int = 40) -> str:
    r"""Write names for a figure so that it shows them as they are, for matplotlib reads some as commands.

    A dollar sign starts no formula, a leading underscore hides nothing from a legend, a character that no
    font has is escaped, and a line of more than `longest` characters loses its middle.

    >>> literal("$5 bolt"), literal("tab\tnut")
    ('\\$5 bolt', 'tab\\tnut')
    """
    if not (text.isascii() and text.isprintable()):
        fonts = [get_font(findfont(FontProperties(family=[name]))) for name in plt.rcParams["font.family"]]
        known = {ord("\n")}.union(*(font.get_charmap() for font in fonts))
        text = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)
    half = longest // 2
    lines = [x if len(x) <= longest else f"{x[: longest - half]}…{x[1 - half :]}" for x in text.split("\n")]
    shown = "\n".join(lines).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def class_colors(classes: Sequence[str]) -> dict[str, str]:
    """Give each class a colour that depends on the set of classes alone, not on their order.

    Beyond ten classes the ten hues come back darker, lighter, and darker still; figures then tell them
    apart by marker as well.
    """
    names = sorted(set(classes))
    shades = (0.0, -0.45, 0.5, -0.7)
    colors = {}
    for i, name in enumerate(names):
        shade = shades[i // len(PALETTE) % len(shades)]
        target = np.full(3, float(shade > 0))
        rgb = (1 - abs(shade)) * np.array(to_rgb(PALETTE[i % len(PALETTE)])) + abs(shade) * target
        colors[name] = to_hex(rgb.tolist())
    return colors


def panel_grid(
    n: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make n panels of a size in inches; the places left over in the last row stay empty."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    size = (columns * width, rows * height)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    panels = axes.ravel().tolist()
    for empty in panels[n:]:
        empty.remove()
    return figure, panels[:n]
