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
from hgadlib.features.store import Features
from hgadlib.model import HGAD
from hgadlib.scoring import Criterion, LevelValues, Normalisation, anomaly_maps, image_scores, transductive

_BATCH = 32


@dataclass(frozen=True)
class Protocol:
    """One way to turn level values into scores."""

    normalisation: Literal["inductive", "transductive"]
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
        constants: The normalisation of each class, to draw its maps again.
    """

    per_class: dict[str, dict[str, float | None]]
    mean: dict[str, float | None]
    scores: np.ndarray
    protocol: Protocol
    constants: dict[str, Normalisation]

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as metrics.json holds them."""
        return {"mean": self.mean, "per_class": self.per_class}


def level_values(model: HGAD, features: Features, class_idx: np.ndarray) -> LevelValues:
    """Compute all images' level values: two numbers a position, kept on the host."""
    labels = torch.as_tensor(class_idx, dtype=torch.int64, device=model.device)
    parts = []
    for index, batch in features.batches(torch.arange(len(labels)).split(_BATCH), model.device):
        values = model.level_values(batch, labels[index.to(model.device)])
        log_prob, neg_entropy = map(Tensor.cpu, values.log_prob), map(Tensor.cpu, values.neg_entropy)
        parts.append(LevelValues(tuple(log_prob), tuple(neg_entropy)))
    return LevelValues.cat(parts)


def class_normalisation(
    model: HGAD, values: LevelValues, k: int, normalisation: str, map_size: int
) -> Normalisation:
    """Look up the stored constants of one class, or take those of its test images."""
    if normalisation == "transductive":
        return transductive(values, map_size)
    return Normalisation(model.log_prob_max[k], model.neg_entropy_max[k]).to("cpu")


def map_batches(
    values: LevelValues, constants: Normalisation, score: ScoreConfig, criterion: Criterion
) -> Iterator[tuple[slice, Tensor]]:
    """Make the maps of one class, a batch at a time."""
    size, sigma = score.map_size, score.sigma
    for start in range(0, len(values), _BATCH):
        index = slice(start, start + _BATCH)
        yield index, anomaly_maps(values[index], constants, size=size, sigma=sigma, criterion=criterion)


def _halved(maps: Tensor) -> Tensor:
    """Round maps to float16 for their ranks: 11 bits of each, down to steps of 2^-12, up to 2e8 nats."""
    return (maps * 2.0**-12).clamp_max(65504.0).half()


def evaluate(
    model: HGAD, values: LevelValues, class_idx: np.ndarray, labels: np.ndarray,
    masks: dict[int, np.ndarray] | None, *,
    score: ScoreConfig, protocol: Protocol, labelled: np.ndarray | None = None,
) -> Evaluation:  # fmt: skip
    """Compute every metric of a test set under one protocol.

    Args:
        model: Holds the classes and the stored constants.
        values: Of the N test images.
        class_idx: (N,).
        labels: True where anomalous, (N,).
        masks: For each class that has them, its images' masks (n_k, S, S) bool at the maps' size; None
            leaves the pixel metrics out.
        score: Map size and blur.
        protocol: Normalisation and criterion.
        labelled: False where nobody said whether an image is anomalous, (N,); it gets a score, but counts
            in no metric. None where all are labelled.
    Source: paper Sec. 3.4 and 4.1.
    """
    scores = np.zeros(len(labels), dtype=np.float32)
    counted = np.ones(len(labels), dtype=bool) if labelled is None else labelled
    per_class: dict[str, dict[str, float | None]] = {}
    constants: dict[str, Normalisation] = {}
    for k, name in enumerate(model.classes):
        members = np.flatnonzero(class_idx == k)
        if len(members) == 0:
            continue
        mine = values[torch.from_numpy(members)]
        constants[name] = class_normalisation(model, mine, k, protocol.normalisation, score.map_size)
        truth, pixels = (masks or {}).get(k), PixelMetrics()
        for index, maps in map_batches(mine, constants[name], score, protocol.criterion):
            scores[members[index]] = image_scores(maps).numpy()
            if truth is not None:
                known = counted[members[index]]
                pixels.update(_halved(maps).numpy()[known], truth[index][known])
        known = members[counted[members]]
        found = image_metrics(scores[known], labels[known]) if len(known) else dict.fromkeys(IMAGE_METRICS)
        per_class[name] = found | pixels.compute()  # all None where no pixel was seen, for want of masks
    return Evaluation(per_class, mean_metrics(per_class), scores, protocol, constants)
