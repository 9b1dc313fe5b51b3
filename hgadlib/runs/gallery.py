"""Typical test images with their maps, chosen by a rule and not by hand."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from hgadlib.config import Config
from hgadlib.datasets.images import read_image, resize_image
from hgadlib.evaluation.evaluate import score_images
from hgadlib.files import write_atomically
from hgadlib.runs.inputs import Inputs
from hgadlib.runs.record import Result


class Gallery(TypedDict):
    """Arguments of :func:`hgadlib.figures.maps.anomaly_map_grid`."""

    images: np.ndarray  # (N, S, S, 3) uint8
    maps: np.ndarray  # (N, S, S) float32
    masks: np.ndarray | None  # (N, S, S) bool; None where no image shown has one
    titles: list[str]  # class, defect and score of each
    calibrated: bool  # maps are in standard deviations


def typical_images(
    scores: np.ndarray, class_idx: np.ndarray, labels: np.ndarray, labelled: np.ndarray
) -> list[int]:
    """Choose the test image of median score of each class and label, by class, anomalous ones first.

    All are (N,). Labels are True where anomalous, labelled False where that is unknown: those are not chosen.
    """
    chosen: list[int] = []
    for k in np.unique(class_idx):
        for state in (True, False):
            members = np.flatnonzero((class_idx == k) & (labels == state) & labelled)
            ranked = members[np.argsort(scores[members], kind="stable")]
            chosen += ranked[len(ranked) // 2 :][:1].tolist()
    return chosen


def gallery(config: Config, inputs: Inputs, result: Result, chosen: Sequence[int] | None = None) -> Gallery:
    """Collect chosen test images, or :func:`typical_images`, with their maps under the headline protocol."""
    evaluation, size, classes = result.evaluation, config.score.map_size, inputs.test_classes
    if chosen is None:
        chosen = typical_images(evaluation.scores, classes, inputs.test_labels, inputs.test_labelled)
    records = [inputs.dataset.test[i] for i in chosen]
    shape = (len(chosen), size, size)
    shown: Gallery = {
        "images": np.zeros((*shape, 3), np.uint8),
        "maps": np.zeros(shape, np.float32),
        "masks": np.zeros(shape, bool) if any(record.mask_path for record in records) else None,
        "titles": [
            f"{record.class_name}, {record.defect_type}\n{evaluation.scores[i]:.3g}"
            for i, record in zip(chosen, records, strict=True)
        ],
        "calibrated": evaluation.protocol.normalisation == "calibrated",
    }
    for row, (index, record) in enumerate(zip(chosen, records, strict=True)):
        image = read_image(record.path, record.bit_depth)
        shown["images"][row] = resize_image(image, size, config.data.resize)
        values, constants = result.values[index : index + 1], evaluation.constants[record.class_name]
        _, maps = score_images(values, constants, config.score, evaluation.protocol.criterion)
        shown["maps"][row] = maps[0].numpy()
        if shown["masks"] is not None:
            k = classes[index]
            shown["masks"][row] = inputs.masks(k, config)[np.count_nonzero(classes[:index] == k)]
    return shown


def write_maps(folder: Path, shown: Gallery) -> None:
    """Write each image of a gallery with its map as a PNG; all share one colour scale."""
    import matplotlib.pyplot as plt  # here, so that training alone needs no figures

    from hgadlib.figures.maps import anomaly_map_grid
    from hgadlib.figures.theme import theme

    folder.mkdir(exist_ok=True)
    # Now: a notebook's backend that starts inside the context below shows no figure ever after.
    plt.switch_backend(plt.get_backend())
    limits = (float(shown["maps"].min()), float(shown["maps"].max())) if len(shown["maps"]) else None
    for i, title in enumerate(shown["titles"]):
        one, png = slice(i, i + 1), io.BytesIO()
        masks = None if shown["masks"] is None else shown["masks"][one]
        with plt.rc_context():
            theme()
            figure = anomaly_map_grid(
                shown["images"][one], shown["maps"][one], masks, [title],
                limits=limits, calibrated=shown["calibrated"],
            )  # fmt: skip
            figure.savefig(png, format="png")
        plt.close(figure)
        # File systems hold at most 255 bytes, and some no more than letters and digits; the number is unique.
        name = re.sub(r"[^\w.-]+", "_", title.partition("\n")[0]).encode()[:100].decode(errors="ignore")
        write_atomically(folder / f"{i:02d}_{name}.png", png.getvalue())
