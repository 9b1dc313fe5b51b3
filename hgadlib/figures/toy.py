"""Figures of the two-dimensional toy: fields over the plane, forces, paths of centres, a bent grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hgadlib.errors import InputError
from hgadlib.figures.theme import class_colors

_HALO = [effects.withStroke(linewidth=3, foreground="white")]


def _names(n: int) -> list[str]:
    return [f"class {'ABCDEFGHIJ'[k]}" for k in range(n)]


def class_points(
    points: ArrayLike,
    *,
    centers: ArrayLike | None = None,
    axis_labels: tuple[str, str] = ("$z_1$", "$z_2$"),
    title: str = "",
    legend: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the points of each class in its colour, and its centres as crosses.

    Args:
        points: A class a row, (K, N, 2).
        centers: Main centres (K, 2), or all (K, M, 2): the main one first, the others as smaller dots.
        axis_labels: Of the two axes; the toy has no units.
        title: Of the panel.
        legend: Name the classes.
        ax: Where to draw; a new figure if not given.

    Raises:
        InputError: The points are not two-dimensional, or not a class a row.
    """
    points = np.asarray(points, dtype=float)
    if points.ndim != 3 or points.shape[-1] != 2:
        raise InputError(f"expected points (K, N, 2), a class a row, found {points.shape}")
    ax = plt.subplots(figsize=(3.4, 3.0))[1] if ax is None else ax
    names = _names(len(points))
    colors = class_colors(names)
    for name, mine in zip(names, points, strict=True):
        ax.scatter(mine[:, 0], mine[:, 1], s=7, color=colors[name], alpha=0.5, linewidths=0, label=name)
    if centers is not None:
        groups = np.asarray(centers, dtype=float).reshape(len(points), -1, 2)
        for name, group in zip(names, groups, strict=True):
            ax.scatter(
                group[1:, 0],
                group[1:, 1],
                s=45,
                color=colors[name],
                edgecolors="black",
                linewidths=1,
                zorder=3,
            )
            ax.scatter(
                group[0, 0],
                group[0, 1],
                s=110,
                marker="X",
                color=colors[name],
                edgecolors="black",
                linewidths=1,
                zorder=4,
            )
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(title, loc="left")
    if legend:
        for handle in ax.legend(markerscale=2, handletextpad=0.2, loc="best").legend_handles:
            if handle is not None:
                handle.set_alpha(1)
    return ax


def plane_map(
    values: ArrayLike,
    extent: tuple[float, float, float, float],
    *,
    label: str,
    title: str = "",
    limits: tuple[float, float] | None = None,
    cmap: str = "viridis",
    axis_labels: tuple[str, str] = ("$x_1$", "$x_2$"),
    ax: Axes | None = None,
) -> Axes:
    """Draw a quantity over a part of the plane as colours, with its scale.

    Args:
        values: (n, n), the first row at the bottom.
        extent: Left, right, bottom, top.
        label: Of the colour scale, with its unit.
        title: Of the panel.
        limits: Values at the ends of the scale; their range if not given.
        cmap: Colour map.
        axis_labels: Of the two axes.
        ax: Where to draw; a new figure if not given.
    """
    ax = plt.subplots(figsize=(3.6, 3.0))[1] if ax is None else ax
    low, high = limits or (None, None)
    image = ax.imshow(
        np.asarray(values, dtype=float),
        extent=extent,
        origin="lower",
        aspect="auto",
        cmap=cmap,
        vmin=low,
        vmax=high,
        interpolation="nearest",  # a level of few positions is not to look smooth
    )
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(title, loc="left")
    return ax


def force_field(
    points: ArrayLike,
    forces: ArrayLike,
    centers: ArrayLike,
    *,
    title: str = "",
    own: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the direction in which a loss pulls latents, as arrows; the stronger the darker.

    Args:
        points: (N, 2).
        forces: (N, 2), nats per unit.
        centers: Class centres, (K, 2).
        title: Of the panel.
        own: The class whose latents these are; the other centres are then drawn hollow.
        ax: Where to draw; a new figure if not given.
    """
    points, forces, centers = (np.asarray(a, dtype=float) for a in (points, forces, centers))
    ax = plt.subplots(figsize=(3.4, 3.0))[1] if ax is None else ax
    strength = np.linalg.norm(forces, axis=1)
    # Arrows of one length show directions; weak forces fade instead of shrinking to dots.
    direction = forces / np.maximum(strength, 1e-12)[:, None]
    shade = np.sqrt(strength / max(strength.max(), 1e-12))
    ax.quiver(
        *points.T, *direction.T, shade, cmap="Greys", clim=(-0.12, 1), scale=24, width=0.006, headwidth=4
    )
    names = _names(len(centers))
    colors = class_colors(names)
    for k, (name, center) in enumerate(zip(names, centers, strict=True)):
        hollow = own is not None and k != own
        ax.scatter(
            center[0], center[1], s=130, marker="X", color="white" if hollow else colors[name], zorder=4,
            edgecolors=colors[name] if hollow else "black", linewidths=1.6 if hollow else 1,
        )  # fmt: skip
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
    ax.set_title(title, loc="left")
    return ax


def center_paths(points: ArrayLike, paths: ArrayLike, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw where centres went during a fit: a ring at the start, a line, a cross at the end.

    Args:
        points: Latents, a class a row, (K, N, 2).
        paths: Centres over time, (T, K, 2) or (T, K, M, 2).
        title: Of the panel.
        ax: Where to draw; a new figure if not given.
    """
    ax = class_points(points, title=title, ax=ax)
    steps = np.asarray(paths, dtype=float)
    steps = steps.reshape(len(steps), steps.shape[1], -1, 2)
    names = _names(steps.shape[1])
    colors = class_colors(names)
    for k, name in enumerate(names):
        for path in steps[:, k].transpose(1, 0, 2):
            ax.plot(*path.T, color=colors[name], linewidth=1.8, zorder=3, path_effects=_HALO)
            ax.scatter(
                path[0, 0], path[0, 1], s=35, color="white", edgecolors=colors[name], linewidths=1.5, zorder=4
            )
            ax.scatter(
                path[-1, 0], path[-1, 1], s=110, marker="X", color=colors[name], edgecolors="black", zorder=5
            )
    return ax


def bent_grid(
    lines: ArrayLike,
    values: ArrayLike,
    *,
    title: str = "",
    axis_labels: tuple[str, str] = ("$z_1$", "$z_2$"),
    limits: tuple[float, float] = (-1.5, 1.5),
    scale: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the lines of a grid after a map has bent them, coloured by its log-determinant.

    Args:
        lines: Points along lines, (L, T, 2).
        values: Log |det J| at the points, (L, T), nats.
        title: Of the panel.
        axis_labels: Of the two axes.
        limits: Values at the ends of the colour scale.
        scale: Show the colour scale beside the panel.
        ax: Where to draw; a new figure if not given.
    """
    lines, values = np.asarray(lines, dtype=float), np.asarray(values, dtype=float)
    ax = plt.subplots(figsize=(3.4, 3.0))[1] if ax is None else ax
    pieces = np.stack([lines[:, :-1], lines[:, 1:]], axis=2).reshape(-1, 2, 2)
    collection = LineCollection(list(pieces), cmap="coolwarm", linewidths=1.1)
    collection.set_array(((values[:, :-1] + values[:, 1:]) / 2).ravel())
    collection.set_clim(*limits)
    ax.add_collection(collection)
    if scale:
        ax.figure.colorbar(collection, ax=ax, label=r"$\log|\det J|$ (nats)", pad=0.02)
    ax.autoscale()
    ax.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    ax.set_title(title, loc="left")
    return ax


def squares(images: Mapping[str, ArrayLike]) -> Figure:
    """Draw small square maps of values from 0 to 1 side by side, on one scale.

    Args:
        images: Maps (H, W) by title.
    """
    figure, axes = plt.subplots(1, len(images), figsize=(2.6 * len(images) + 0.8, 2.6), squeeze=False)
    for ax, (title, image) in zip(axes[0], images.items(), strict=True):
        shown = ax.imshow(np.asarray(image, dtype=float), cmap="inferno", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, loc="left")
    figure.colorbar(shown, ax=axes[0].tolist(), pad=0.02, label="normality, or score")
    return figure


def share_axes(axes: Sequence[Axes]) -> None:
    """Give panels the same limits, so that they compare."""
    xs, ys = ([getattr(ax, f"get_{a}lim")() for ax in axes] for a in "xy")
    for ax in axes:
        ax.set_xlim(min(x[0] for x in xs), max(x[1] for x in xs))
        ax.set_ylim(min(y[0] for y in ys), max(y[1] for y in ys))
