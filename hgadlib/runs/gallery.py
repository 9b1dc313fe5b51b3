"""Maps worth a look, chosen by a rule and not by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from hgadlib.config import Config
from hgadlib.datasets.images import load_masks, read_image, resize_image
from hgadlib.runs.inputs import Inputs
from hgadlib.runs.record import Result
from hgadlib.scoring import anomaly_maps


class Gallery(TypedDict):
    """Arguments of :func:`hgadlib.figures.maps.anomaly_map_grid`.

    Attributes:
        images: (N, S, S, 3) uint8.
        maps: (N, S, S) float32.
        masks: (N, S, S) bool; None where no image shown has one.
        titles: Class, defect and score of each.
    """

    images: np.ndarray
    maps: np.ndarray
    masks: np.ndarray | None
    titles: list[str]


def typical_images(
    scores: np.ndarray, class_idx: np.ndarray, labels: np.ndarray, labelled: np.ndarray, *, per_class: int = 1
) -> list[int]:
    """Choose test images by their scores' rank within class and label: the median, or evenly spread ranks.

    Args:
        scores: (N,).
        class_idx: (N,).
        labels: True where anomalous, (N,).
        labelled: False where that is unknown, (N,); those are not chosen.
        per_class: Anomalous and normal images to choose of each class.

    Returns:
        Indices, by class, anomalous ones first.
    """
    chosen: list[int] = []
    for k in np.unique(class_idx):
        for state in (True, False):
            members = np.flatnonzero((class_idx == k) & (labels == state) & labelled)
            if not len(members):
                continue
            ranked = members[np.argsort(scores[members], kind="stable")]
            ranks = (np.arange(per_class) + 0.5) / per_class * len(ranked)
            chosen += ranked[np.unique(ranks.astype(int))].tolist()
    return chosen


def gallery(config: Config, inputs: Inputs, result: Result, *, per_class: int = 1) -> Gallery:
    """Draw together typical images of each class, anomalous and normal, with their maps.

    Args:
        config: Of the run.
        inputs: Of the run.
        result: Of the run; maps follow its headline protocol.
        per_class: Anomalous and normal images of each class; one is the one of median score.

    Returns:
        Images, maps, masks and titles of these images alone.
    """
    chosen = typical_images(
        result.evaluation.scores,
        inputs.test_classes,
        inputs.test_labels,
        inputs.test_labelled,
        per_class=per_class,
    )
    return gallery_of(config, inputs, result, chosen)


def gallery_of(config: Config, inputs: Inputs, result: Result, chosen: Sequence[int]) -> Gallery:
    """Draw together test images of one's choice with their maps.

    Args:
        config: Of the run.
        inputs: Of the run.
        result: Of the run; maps follow its headline protocol.
        chosen: Indices of test images.

    Returns:
        Images, maps, masks and titles of these images alone.
    """
    evaluation, score = result.evaluation, config.score
    records = [inputs.dataset.test[i] for i in chosen]
    maps = np.zeros((len(chosen), score.map_size, score.map_size), np.float32)
    for row, (index, record) in enumerate(zip(chosen, records, strict=True)):
        maps[row] = anomaly_maps(
            result.values[torch.tensor([index])],
            evaluation.constants[record.class_name],
            size=score.map_size,
            sigma=score.sigma,
            criterion=evaluation.protocol.criterion,
        )[0].numpy()
    images = [resize_image(read_image(r.path), score.map_size, config.data.resize) for r in records]
    masks = None
    if any(record.mask_path is not None for record in records):
        masks = load_masks(records, size=score.map_size, resize=config.data.resize)
    return {
        "images": np.stack(images) if images else np.zeros((0, score.map_size, score.map_size, 3), np.uint8),
        "maps": maps,
        "masks": masks,
        "titles": [
            f"{record.class_name}, {record.defect_type}\n{evaluation.scores[i]:.3g}"
            for i, record in zip(chosen, records, strict=True)
        ],
    }


def write_maps(folder: Path, shown: Gallery) -> None:
    """Write each image of a gallery with its map as a PNG; all share one colour scale.

    Args:
        folder: Made where it is missing; PNGs of an earlier attempt are replaced.
        shown: What :func:`gallery` gave.
    """
    import matplotlib.pyplot as plt  # here, so that training alone needs no figures

    from hgadlib.figures.maps import anomaly_map_grid

    folder.mkdir(exist_ok=True)
    limits = (float(shown["maps"].min()), float(shown["maps"].max())) if len(shown["maps"]) else None
    for i, title in enumerate(shown["titles"]):
        one = slice(i, i + 1)
        masks = None if shown["masks"] is None else shown["masks"][one]
        figure = anomaly_map_grid(shown["images"][one], shown["maps"][one], masks, [title], limits=limits)
        name = title.partition("\n")[0].replace(", ", "_").replace("/", "_").replace(" ", "_")
        figure.savefig(folder / f"{i:02d}_{name}.png", bbox_inches="tight")
        plt.close(figure)
