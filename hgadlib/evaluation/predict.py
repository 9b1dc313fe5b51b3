"""Scores and maps of images from their files, under the constants that training stored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hgadlib.config import Config
from hgadlib.datasets.images import load_images
from hgadlib.datasets.records import ImageRecord
from hgadlib.features.backbone import flatten_maps
from hgadlib.model import HGAD
from hgadlib.runs.inputs import Inputs
from hgadlib.scoring import anomaly_maps, image_scores


def predict_batches(
    config: Config, inputs: Inputs, model: HGAD, records: Sequence[ImageRecord]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Score images from their files, a batch at a time.

    Args:
        config: Image size, resizing, batch size, criterion and maps.
        inputs: Backbone, classes and device; the images need not be among its records.
        model: The trained model.
        records: N images of known class.

    Yields:
        Image scores (B,) and anomaly maps (B, S, S), float32; higher is more anomalous.

    Raises:
        InputError: An image is bad or its class unknown.
    """
    classes = torch.from_numpy(inputs.dataset.class_idx(records)).to(inputs.device)
    # Evaluation works on stored features; rounded alike, an image gets the same score here.
    dtype = getattr(torch, config.features.dtype)
    score = config.score
    for index, images in load_images(
        [record.path for record in records],
        size=config.data.image_size,
        resize=config.data.resize,
        mean=inputs.backbone.mean,
        std=inputs.backbone.std,
        batch_size=config.features.batch_size,
        num_workers=config.data.num_workers,
    ):
        with torch.inference_mode():
            features = flatten_maps(inputs.backbone(images.to(inputs.device)))
            own = classes[index.to(inputs.device)]
            values = model.level_values([level.to(dtype).float() for level in features], own)
            maps = anomaly_maps(
                values,
                model.normalisation(own),
                size=score.map_size,
                sigma=score.sigma,
                criterion=score.criterion,
            )
        yield image_scores(maps).cpu().numpy(), maps.cpu().numpy()


def predict(
    config: Config, inputs: Inputs, model: HGAD, records: Sequence[ImageRecord]
) -> tuple[np.ndarray, np.ndarray]:
    """Score some images from their files; see :func:`predict_batches`, which holds no more than a batch.

    Returns:
        Image scores (N,) and anomaly maps (N, S, S), float32; higher is more anomalous.
    """
    parts = list(predict_batches(config, inputs, model, records))
    if not parts:
        return np.zeros(0, np.float32), np.zeros(
            (0, config.score.map_size, config.score.map_size), np.float32
        )
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([maps for _, maps in parts])


def prediction_rate(config: Config, inputs: Inputs, model: HGAD, *, images: int = 64) -> float:
    """Measure images per second from file to map, on some test images after a warm-up batch."""
    # Spread over the test set: image files of different classes differ in size.
    records = inputs.dataset.test[:: max(1, len(inputs.dataset.test) // images)][:images]
    for _ in predict_batches(config, inputs, model, records[: config.features.batch_size]):
        pass
    started = time.perf_counter()
    for _ in predict_batches(config, inputs, model, records):
        pass
    return len(records) / (time.perf_counter() - started)
