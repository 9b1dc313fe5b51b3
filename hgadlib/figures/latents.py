"""Latent positions and class centres in two dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from hgadlib.errors import InputError
from hgadlib.figures.theme import PALETTE, class_colors

_MARKERS = "o^sDvP*X"


def latent_scatter(
    z2d: ArrayLike,
    class_idx: ArrayLike,
    centers2d: ArrayLike | None = None,
    *,
    classes: Sequence[str] | None = None,
    axis_labels: tuple[str, str] = ("latent direction 1 (no unit)", "latent direction 2 (no unit)"),
    ax: Axes | None = None,
) -> Axes:
    """Draw latent positions in two dimensions, coloured by class, with the class centres as crosses.

    Args:
        z2d: Positions, (N, 2).
        class_idx: Class of each, (N,) int.
        centers2d: Class centres, (K, 2).
        classes: Class names, (K,); "class 0" and so on if not given.
        axis_labels: What the two axes are.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: Shapes disagree, or a class has no name.
    """
    z2d, class_idx = np.asarray(z2d, dtype=float), np.asarray(class_idx)
    if z2d.ndim != 2 or z2d.shape[1] != 2 or class_idx.shape != z2d.shape[:1] or not len(z2d):
        raise InputError(
            f"expected positions (N, 2) and classes (N,), found {z2d.shape} and {class_idx.shape}"
        )
    classes = [f"class {k}" for k in range(int(class_idx.max()) + 1)] if classes is None else list(classes)
    if class_idx.min() < 0 or class_idx.max() >= len(classes):
        raise InputError(
            f"expected classes 0 to {len(classes) - 1}, found {class_idx.min()} to {class_idx.max()}"
        )
    # The legend stands beside the square; it grows by columns of 15 names.
    legend_columns = math.ceil(len(classes) / 15)
    width = 4.2 + legend_columns * (0.5 + 0.08 * max(map(len, classes)))
    ax = plt.subplots(figsize=(width, 4.0))[1] if ax is None else ax
    colors = class_colors(classes)
    halo = [effects.withStroke(linewidth=4, foreground="white")]
    for k, name in enumerate(classes):
        mine = z2d[class_idx == k]
        marker = _MARKERS[sorted(classes).index(name) // len(PALETTE) % len(_MARKERS)]
        ax.scatter(
            mine[:, 0],
            mine[:, 1],
            s=14,
            marker=marker,
            color=colors[name],
            alpha=0.55,
            linewidths=0,
            label=name,
        )
    if centers2d is not None:
        centers = np.asarray(centers2d, dtype=float)
        if centers.shape != (len(classes), 2):
            raise InputError(
                f"expected a centre (2,) for each of {len(classes)} classes, found {centers.shape}"
            )
        edge = [colors[name] for name in classes]
        ax.scatter(
            centers[:, 0],
            centers[:, 1],
            s=150 if len(classes) <= 12 else 60,
            marker="X",
            c=edge,
            edgecolors="black",
            linewidths=1.2,
            path_effects=halo,
        )
    ax.set_xlabel(axis_labels[0])
    ax.set_ylabel(axis_labels[1])
    ax.set_aspect("equal", adjustable="datalim")
    ax.locator_params(nbins=6)
    legend = ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=legend_columns, markerscale=1.8)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return ax
