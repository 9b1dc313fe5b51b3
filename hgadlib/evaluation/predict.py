"""Scores and maps of images as they come, under the constants that training stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from hgadlib.config import ScoreConfig
from hgadlib.evaluation.evaluate import score_images
from hgadlib.features.backbone import Backbone, flatten_maps
from hgadlib.method import Method


def predict_batches(
    backbone: Backbone, model: Method, images: Iterable[tuple[Tensor, Tensor]], class_names: Iterable[str], *,
    score: ScoreConfig, dtype: str = "float32",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Score images a batch at a time.

    Args:
        backbone: Of the model's features.
        model: Trained and calibrated.
        images: As :func:`hgadlib.datasets.images.load_images` yields them: indices (B,) and images.
        class_names: Of all N images.
        score: Normalisation, map size and levels, blur, criterion and image score; for a transductive one,
            which an image alone has not, the inductive one.
        dtype: Of the features that the model was trained on; rounded alike, an image gets the same score
            here as from stored features.
    Yields:
        Image scores (B,) and anomaly maps (B, S, S), float32; higher is more anomalous.
    Raises:
        InputError: An image is bad, or of a class that the model does not know.
    """
    classes = model.class_idx(class_names)
    for index, batch in images:
        with torch.inference_mode():
            features = flatten_maps(backbone(batch.to(model.device)))
            own = classes[index.to(model.device)]
            levels = [level.to(getattr(torch, dtype)).float() for level in features]
            values = model.level_values(levels, own, entropy=score.criterion != "likelihood")
            constants = model.constants(own, score.normalisation)
            scores, maps = score_images(values, constants, score, score.criterion)
        yield scores.cpu().numpy(), maps.cpu().numpy()
