"""Anomaly maps over their images, with the true masks outlined."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hgadlib.errors import InputError
from hgadlib.figures.theme import literal

LINEAR = 1.0
"""Standard deviations up to which the colour scale of calibrated maps is about linear. Beyond it is
logarithmic, as some defects score orders of magnitude more than others."""


def overlay(
    image: NDArray[np.uint8], anomaly_map: ArrayLike, *, low: float, high: float
) -> NDArray[np.uint8]:
    """Lay a map over its image, grey where the map is low and bright where it is high: (H, W, 3) uint8.

    Args:
        image: RGB, (H, W, 3) uint8.
        anomaly_map: (H, W), finite.
        low: Value at the dark end of the colours and below.
        high: Value at their bright end and above, for instance twice a threshold.
    """
    heat = Normalize(low, max(high, low + 1e-9), clip=True)(np.asarray(anomaly_map, dtype=float))
    alpha = (0.15 + 0.65 * np.asarray(heat))[..., None]
    colours = plt.get_cmap("inferno")(heat)[..., :3] * 255
    grey = image.mean(-1, keepdims=True)
    return np.rint(alpha * colours + (1 - alpha) * grey).astype(np.uint8)


def outline_mask(ax: Axes, mask: ArrayLike) -> list[QuadContourSet]:
    """Draw a mask's outline, white within black, which shows on any image.

    The axes hold an image of the size of the mask, (H, W) bool, True inside. Returns two contours, or none.
    """
    mask = np.asarray(mask, dtype=bool)
    if not mask.any():
        return []
    # A border of False closes the outline of a region that touches the edge of the image.
    padded = np.pad(mask, 1).astype(float)
    y, x = (np.arange(-1, n + 1) for n in mask.shape)
    ax.autoscale(False)  # the border lies outside the image and must not widen the view
    styles: tuple[tuple[str, float], ...] = (("black", 2.6), ("white", 1.1))
    return [
        ax.contour(x, y, padded, levels=[0.5], colors=c, linewidths=w, antialiased=True) for c, w in styles
    ]


def anomaly_map_grid(
    images: NDArray[np.uint8], maps: ArrayLike, masks: ArrayLike | None = None,
    titles: Sequence[str] | None = None, *, limits: tuple[float, float] | None = None,
    calibrated: bool = False, size: float = 1.9,
) -> Figure:  # fmt: skip
    """Draw a row per image: the image, the map over it with the true mask outlined, and the map alone.

    Args:
        images: RGB, (N, H, W, 3) uint8.
        maps: Anomaly maps, (N, H, W) float; higher is more anomalous.
        masks: True where anomalous, (N, H, W) bool; None where there are none.
        titles: A name per row, for instance class, defect type and score.
        limits: Scores at the two ends of the colour scale; the range of all maps if not given. One scale
            serves all rows, so that colours compare.
        calibrated: Whether scores are in standard deviations: then the scale is logarithmic beyond
            :data:`LINEAR`.
        size: Height and width of a panel in inches.
    Raises:
        InputError: Shapes disagree, or a score is not finite.
        ValueError: There is no image, or not a title for each.
    Source: paper Fig. 4 and 6.
    """
    n, maps = len(images), np.asarray(maps, dtype=float)
    masks = np.zeros(maps.shape, bool) if masks is None else np.asarray(masks, dtype=bool)
    titles = [""] * n if titles is None else titles
    # Matplotlib would draw maps of another size over the image, and leave out what is not a number.
    if images.shape != (*maps.shape, 3) or masks.shape != maps.shape or not np.isfinite(maps).all():
        raise InputError(
            "expected images (N, H, W, 3), finite maps and masks (N, H, W), found "
            f"{images.shape}, {maps.shape} and {masks.shape}; resize them to one size"
        )
    low, high = limits or (float(maps.min()), float(maps.max()))
    scale = AsinhNorm(LINEAR, low, high, clip=True) if calibrated else Normalize(low, high, clip=True)
    figure, axes = plt.subplots(n, 3, figsize=(3 * size + 1.3, n * size + 0.35), squeeze=False)
    for row, image, anomaly_map, mask, title in zip(axes, images, maps, masks, titles, strict=True):
        heat = scale(anomaly_map)
        row[0].imshow(image)
        row[1].imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
        # The lower a score, the more of the image shows through.
        row[1].imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.15 + 0.65 * np.asarray(heat))
        outline_mask(row[1], mask)
        row[2].imshow(anomaly_map, cmap="inferno", norm=scale)
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(literal(title), fontsize=9)
    for ax, name in zip(axes[0], ("image", "map and true mask", "anomaly map"), strict=True):
        ax.set_title(name if masks.any() else name.replace("and true mask", "over image"))
    bar = figure.colorbar(
        axes[0, 2].images[0], ax=axes, shrink=min(0.92, 3 / n), anchor=(0, 1), aspect=14 * min(n, 3), pad=0.01
    )
    bar.set_label(f"anomaly score ({'standard deviations' if calibrated else 'no unit'})")
    bar.ax.spines[:].set_visible(False)
    if calibrated:
        mark_decades(bar)
    return figure


def mark_decades(bar: Colorbar) -> None:
    """Mark 0 and the powers of ten on the bar of a calibrated scale: more marks would overlap near 0."""
    ticks = [0.0, *(sign * LINEAR * 10.0**power for power in range(9) for sign in (1, -1))]
    low, high = bar.ax.get_ylim()
    within = sorted(tick for tick in ticks if low <= tick <= high)
    if len(within) > 1:
        bar.set_ticks(within, labels=[f"{tick:g}".replace("-", "−") for tick in within])
