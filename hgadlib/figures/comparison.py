"""The maps of several models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hgadlib.errors import InputError
from hgadlib.figures.maps import outline_mask


def map_comparison(
    images: NDArray[np.uint8],
    masks: ArrayLike | None,
    maps: Mapping[str, ArrayLike],
    titles: Sequence[str],
    *,
    normal: NDArray[np.uint8] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    size: float = 1.45,
) -> Figure:
    """Draw a row per image: a normal one beside it, the image, its mask, and every model's map.

    Args:
        images: RGB, (N, H, W, 3) uint8.
        masks: True where anomalous, (N, H, W) bool; None where there are none.
        maps: By the name of the model, anomaly maps (N, H, W); higher is more anomalous.
        titles: A name per row.
        normal: Normal images of the same classes, (N, H, W, 3) uint8; None leaves the column out.
        limits: By model, scores at the two ends of its colour scale; the range of its maps if not given. A
            model has one scale for all rows, and each its own, as scores of two models do not compare.
        captions: By model, a line under each map.
        size: Side of a panel in inches.

    Raises:
        InputError: Shapes disagree, there is no image, or a score is not finite.

    Source: paper Fig. 4 and 6.
    """
    images = np.asarray(images)
    found = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    shape = images.shape[:3]
    if images.ndim != 4 or not len(images) or not found or len(titles) != len(images):
        raise InputError(
            f"expected images (N, H, W, 3), N > 0, and N titles, found {images.shape} and {len(titles)}"
        )
    truth = np.zeros(shape, bool) if masks is None else np.asarray(masks, dtype=bool)
    shapes = {name: values.shape for name, values in found.items()} | {"masks": truth.shape}
    if any(other != shape for other in shapes.values()) or (
        normal is not None and normal.shape != images.shape
    ):
        raise InputError(f"expected maps and masks of the images' size {shape}, found {shapes}")
    if not all(np.isfinite(values).all() for values in found.values()):
        raise InputError("expected finite scores, found NaN or infinity; look for NaN weights")
    names = (["normal"] if normal is not None else []) + ["image", "mask", *found]
    figure, axes = plt.subplots(
        len(images),
        len(names),
        figsize=(size * len(names) + 0.5, (size + 0.12) * len(images) + 0.3),
        squeeze=False,
    )
    for row, axs in enumerate(axes):
        panels = dict(zip(names, axs, strict=True))
        for ax in axs:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axs[0].set_ylabel(titles[row], fontsize=8)
        if normal is not None:
            panels["normal"].imshow(normal[row])
        panels["image"].imshow(images[row])
        panels["mask"].imshow(truth[row], cmap="gray", vmin=0, vmax=1)
        for name, values in found.items():
            low, high = (limits or {}).get(name, (float(values.min()), float(values.max())))
            panels[name].imshow(values[row], cmap="inferno", norm=Normalize(low, high, clip=True))
            outline_mask(panels[name], truth[row])
            if captions is not None:
                panels[name].set_xlabel(captions[name][row], fontsize=8, labelpad=2)
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=9)
    return figure
