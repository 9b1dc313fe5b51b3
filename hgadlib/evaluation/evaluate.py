"""A model and a test set: level values, maps, scores and metrics, by class and on average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hgadlib.config import ScoreConfig
from hgadlib.evaluation.metrics import IMAGE_METRICS, PixelMetrics, image_metrics, mean_metrics
from hgadlib.fast.memory import in_parts
from hgadlib.features.store import Features
from hgadlib.method import Method
from hgadlib.scoring import (
    Calibration,
    Constants,
    Criterion,
    LevelValues,
    anomaly_maps,
    finest_levels,
    image_scores,
    transductive,
)

_BATCH = 32


@dataclass(frozen=True)
class Protocol:
    """One way to turn level values into scores."""

    normalisation: Literal["calibrated", "inductive", "transductive", "raw"]
    criterion: Criterion

    @property
    def name(self) -> str:
        """Its name in records: "inductive/likelihood", say."""
        return f"{self.normalisation}/{self.criterion}"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a test set under one protocol.

    Attributes:
        per_class: Metrics by class name; None where one has no meaning.
        mean: Their means over the classes that have them.
        scores: Image scores, (N,) float32; higher is more anomalous.
        constants: Of each class, to draw its maps again.
    """

    per_class: dict[str, dict[str, float | None]]
    mean: dict[str, float | None]
    scores: np.ndarray
    protocol: Protocol
    constants: dict[str, Constants]

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as metrics.json holds them."""
        return {"mean": self.mean, "per_class": self.per_class}


def level_values(
    model: Method, features: Features, class_idx: np.ndarray, images: Tensor | None = None
) -> LevelValues:
    """Compute images' level values, of all N or of some: two numbers a position, kept on the host."""
    labels = torch.as_tensor(class_idx, dtype=torch.int64, device=model.device)
    parts = []
    images = torch.arange(len(labels)) if images is None else images
    for index, batch in features.batches(images.split(_BATCH), model.device):
        own = labels[index.to(model.device)]

        def some(part: slice, batch: list[Tensor] = batch, own: Tensor = own) -> LevelValues:
            return model.level_values([level[part] for level in batch], own[part]).to("cpu")

        parts += in_parts(some, len(own))
    return LevelValues.cat(parts)


def class_normalisation(
    model: Method, values: LevelValues, k: int, normalisation: str, map_size: int
) -> Constants:
    """Look up the stored constants of one class, or take those of its test images."""
    if normalisation == "transductive":
        return transductive(values, map_size)
    return model.constants(torch.tensor(k, device=model.device), normalisation).to("cpu")


def score_images(
    values: LevelValues, constants: Constants, score: ScoreConfig, criterion: Criterion
) -> tuple[Tensor, Tensor]:
    """Score images and draw their maps as configured.

    Args:
        values: Level values of B images.
        constants: Of the images' class, or per image.
        score: Map size, levels of the map, blur and image score.
        criterion: As of :func:`hgadlib.scoring.anomaly_maps`.
    Returns:
        Image scores (B,) and anomaly maps (B, S, S); higher is more anomalous.
    """

    def drawn(values: LevelValues, constants: Constants) -> Tensor:
        return anomaly_maps(values, constants, size=score.map_size, sigma=score.sigma, criterion=criterion)

    maps = drawn(values, constants)
    scores = image_scores(maps, score.image, score.image_share)
    if score.map_levels == "finest" and isinstance(constants, Calibration):
        finest, own = finest_levels(values, constants)
        if len(finest.log_prob) < len(values.log_prob):  # else it is the same map
            maps = drawn(finest, own)
    return scores, maps


def score_batches(
    values: LevelValues, constants: Constants, score: ScoreConfig, criterion: Criterion
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Score the images of one class and draw their maps, a batch at a time; see :func:`score_images`."""
    for start in range(0, len(values), _BATCH):
        index = slice(start, start + _BATCH)
        yield index, *score_images(values[index], constants, score, criterion)


def _halved(maps: Tensor) -> Tensor:
    """Round maps to float16 for their ranks: 11 bits of each, down to steps of 2^-12, up to 2e8 nats."""
    return (maps * 2.0**-12).clamp_max(65504.0).half()


def evaluate(
    model: Method, values: LevelValues, class_idx: np.ndarray, labels: np.ndarray,
    masks: dict[int, np.ndarray] | None, *,
    score: ScoreConfig, protocol: Protocol, labelled: np.ndarray | None = None,
    taken: np.ndarray | None = None,
) -> Evaluation:  # fmt: skip
    """Compute every metric of a test set under one protocol.

    Args:
        model: Holds the classes and the stored constants.
        values: Of the N test images.
        class_idx: (N,).
        labels: True where anomalous, (N,).
        masks: For each class that has them, its images' masks (n_k, S, S) bool at the maps' size; None
            leaves the pixel metrics out.
        score: Map size, levels of the map, blur and image score.
        protocol: Normalisation and criterion.
        labelled: False where nobody said whether an image is anomalous, (N,); it gets a score, but counts
            in no metric. None where all are labelled.
        taken: Class that each image is scored as, (N,), where it is not the true one: inferred, say. The
            values must be of it too; the metrics are of the true classes.
    Source: paper Sec. 3.4 and 4.1.
    """
    scores = np.zeros(len(labels), dtype=np.float32)
    counted = np.ones(len(labels), dtype=bool) if labelled is None else labelled
    per_class: dict[str, dict[str, float | None]] = {}
    taken = class_idx if taken is None else taken
    constants: dict[str, Constants] = {}
    for j in np.unique(taken).tolist():
        own = values[torch.from_numpy(taken == j)]
        name = model.classes[j]
        constants[name] = class_normalisation(model, own, j, protocol.normalisation, score.map_size)
    for k, name in enumerate(model.classes):
        members = np.flatnonzero(class_idx == k)
        if len(members) == 0:
            continue
        truth, pixels = (masks or {}).get(k), PixelMetrics()
        for j in np.unique(taken[members]).tolist():
            places = np.flatnonzero(taken[members] == j)
            mine = values[torch.from_numpy(members[places])]
            own_constants = constants[model.classes[j]]
            for index, found, maps in score_batches(mine, own_constants, score, protocol.criterion):
                rows = places[index]
                scores[members[rows]] = found.numpy()
                if truth is not None:
                    known = counted[members[rows]]
                    pixels.update(_halved(maps).numpy()[known], truth[rows][known])
        known = members[counted[members]]
        image = image_metrics(scores[known], labels[known]) if len(known) else dict.fromkeys(IMAGE_METRICS)
        per_class[name] = image | pixels.compute()  # all None where no pixel was seen, for want of masks
    return Evaluation(per_class, mean_metrics(per_class), scores, protocol, constants)
