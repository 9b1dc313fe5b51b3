"""Two models on the same images: which images tell most, by rule, and their maps side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.figures.maps import outline_mask
from hgadlib.runs.gallery import gallery
from hgadlib.runs.inputs import Inputs
from hgadlib.runs.record import Result


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


class Comparison(TypedDict):
    """Arguments of :func:`hgadbook.qualitative.map_comparison` for N images of side S."""

    images: np.ndarray
    masks: np.ndarray | None
    maps: dict[str, np.ndarray]
    titles: list[str]
    normal: np.ndarray | None
    limits: dict[str, tuple[float, float]]
    captions: dict[str, list[str]]


def normal_rank(
    scores: np.ndarray, class_idx: np.ndarray, labels: np.ndarray, labelled: np.ndarray
) -> np.ndarray:
    """Rank each test image among the normal ones of its class.

    Args:
        scores: (N,).
        class_idx: (N,).
        labels: True where anomalous, (N,).
        labelled: False where that is unknown, (N,).

    Returns:
        Share of the class's normal images that score less, (N,), 0 to 1, ties counting half; a normal image
        is not compared with itself. NaN where there is none to compare with.
    """
    ranks = np.full(len(scores), np.nan)
    normal = labelled & ~labels
    for i, score in enumerate(scores):
        others = scores[normal & (class_idx == class_idx[i]) & (np.arange(len(scores)) != i)]
        if len(others):
            ranks[i] = ((others < score).sum() + 0.5 * (others == score).sum()) / len(others)
    return ranks


def telling_images(
    scores: Mapping[str, np.ndarray], class_idx: np.ndarray, labels: np.ndarray, labelled: np.ndarray
) -> dict[str, dict[int, int]]:
    """Choose good cases and failures of the last of two models by rule, one of each class where there is one.

    Args:
        scores: By the name of the model, (N,): first the one compared with, last the one looked at.
        class_idx: (N,).
        labels: True where anomalous, (N,).
        labelled: False where that is unknown, (N,).

    Returns:
        By rule, class index to image index. Ranks are those of :func:`normal_rank`; of equal ranks the score
        decides:

        - ``found``: the anomalous image of highest rank;
        - ``missed``: the anomalous image of lowest rank;
        - ``false alarm``: the normal image of highest score;
        - ``gained``, ``lost``: the anomalous image whose rank rose, or fell, most from the first model to the
          last one; left out where none rose, or fell.
    """
    first, *_, last = scores.values()
    before, after = (normal_rank(found, class_idx, labels, labelled) for found in (first, last))
    chosen: dict[str, dict[int, int]] = {
        rule: {} for rule in ("found", "missed", "false alarm", "gained", "lost")
    }
    for k in np.unique(class_idx).tolist():
        anomalous, normal = (
            np.flatnonzero((class_idx == k) & (labels == s) & labelled) for s in (True, False)
        )
        if len(normal):
            chosen["false alarm"][k] = int(normal[np.argmax(last[normal])])
        if not len(normal) or not len(anomalous):
            continue
        order = anomalous[np.lexsort((last[anomalous], after[anomalous]))]
        chosen["missed"][k], chosen["found"][k] = int(order[0]), int(order[-1])
        change = (after - before)[anomalous]
        if change.max() > 0:
            chosen["gained"][k] = int(anomalous[np.argmax(change)])
        if change.min() < 0:
            chosen["lost"][k] = int(anomalous[np.argmin(change)])
    return chosen


def rank_table(inputs: Inputs, ranks: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Sum up the ranks of the anomalous images: a row per class and for all, columns by model, in percent.

    Args:
        inputs: Of the runs.
        ranks: By model, what :func:`normal_rank` gave.

    Returns:
        Their median, the share of ranks of 1 and that of ranks below a half.
    """
    anomalous = inputs.test_labels & inputs.test_labelled
    rows = {}
    for k, name in [*enumerate(inputs.dataset.classes), (None, "all")]:
        members = anomalous & (True if k is None else inputs.test_classes == k)
        rows[name] = {
            (model, what): 100 * float(value)
            for model, found in ranks.items()
            for what, value in (
                ("median", np.median(found[members])),
                ("above all", (found[members] == 1).mean()),
                ("below half", (found[members] < 0.5).mean()),
            )
            if members.any()
        }
    return pd.DataFrame(rows).T.rename_axis("class")


def compare_maps(
    inputs: Inputs,
    models: Mapping[str, tuple[Config, Result]],
    chosen: Sequence[int],
    ranks: Mapping[str, np.ndarray],
    *,
    normal: Sequence[int] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> Comparison:
    """Draw several models' maps of the same test images together.

    Args:
        inputs: Of the runs.
        models: By name, a run's configuration and outcome.
        chosen: Indices of the test images.
        ranks: By name, what :func:`normal_rank` gave; each becomes a caption.
        normal: The normal image to set beside each; none if not given.
        limits: Ends of each model's colour scale; those of the maps drawn if not given.

    Returns:
        What the figure needs, of these images alone.
    """
    drawn = {name: gallery(config, inputs, result, chosen) for name, (config, result) in models.items()}
    config, result = next(iter(models.values()))
    own = next(iter(drawn.values()))
    maps = {name: found["maps"] for name, found in drawn.items()}
    return {
        "images": own["images"],
        "masks": own["masks"],
        "maps": maps,
        # The score in a title is one model's.
        "titles": [title.partition("\n")[0].replace(", ", "\n") for title in own["titles"]],
        "normal": None if normal is None else gallery(config, inputs, result, normal)["images"],
        "limits": {
            name: (limits or {}).get(name, (float(found.min()), float(found.max())))
            for name, found in maps.items()
        },
        "captions": {name: [f"rank {100 * ranks[name][i]:.0f} %" for i in chosen] for name in models},
    }
