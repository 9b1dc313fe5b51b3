r"""Which class is this? Infer what an image shows, where nobody says so, and score it as that.

The paper's score needs the class of the image (Sec. 3.4). Two ways to do without:

* the model's own: the class whose mixture makes most positions likely, a share of which may be defects,
  :func:`hgadlib.mixture.class_evidence` (the log-determinant is the same for all classes and drops out);
* the nearest training image in global features (App. A.2): see
  :func:`hgadlib.features.discovery.assign_nearest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hgadlib.config import ScoreConfig
from hgadlib.evaluation.evaluate import Protocol, evaluate, level_values
from hgadlib.evaluation.metrics import image_metrics
from hgadlib.features.store import Features
from hgadlib.mixture import class_evidence
from hgadlib.model import HGAD
from hgadlib.scoring import LevelValues

_BATCH = 32


@torch.inference_mode()
def image_evidence(model: HGAD, features: Features) -> NDArray[np.float64]:
    """Compute images' evidence for each class, summed over levels and positions: (N, K), nats.

    Raises:
        InputError: The model has one Gaussian for all classes, so no class is likelier than another.
    Source: paper Sec. 3.4, for every class in turn.
    """
    totals = torch.zeros(len(features), len(model.classes), dtype=torch.float64, device=model.device)
    for rows, batch in features.batches(torch.arange(len(features)).split(_BATCH), model.device):
        for _, _, by_class in model.by_class(batch):
            totals[rows] += class_evidence(by_class)
    return totals.cpu().numpy()


def infer_classes(model: HGAD, features: Features) -> NDArray[np.int64]:
    """Find the class of most evidence for each image: (N,); raises as :func:`image_evidence`."""
    return image_evidence(model, features).argmax(1).astype(np.int64)


def score_as(
    model: HGAD, features: Features, class_idx: NDArray[np.int64], score: ScoreConfig
) -> NDArray[np.float32]:
    """Score N images as members of classes (N,), true or inferred, under the constants that training stored.

    Image scores, (N,); higher is more anomalous.
    """
    values, nobody = level_values(model, features, class_idx), np.zeros(len(class_idx), bool)
    stored: Any = "inductive" if score.normalisation == "transductive" else score.normalisation
    how = Protocol(stored, score.criterion)
    found = evaluate(model, values, class_idx, nobody, None, score=score, protocol=how, labelled=nobody)
    return found.scores


def evaluate_inferred(
    model: HGAD,
    features: Features,
    values: LevelValues,
    class_idx: NDArray[np.int64],
    *truth: Any,
    **how: Any,
) -> dict[str, Any]:
    """Evaluate images as members of the class that makes them most likely, by the true classes' metrics.

    Args:
        model: Its prior is a mixture.
        features: Of the N test images.
        values: Theirs under the true classes; those of images taken for another are computed anew.
        class_idx: True classes, (N,).
        *truth: Labels and masks, as :func:`evaluate` takes them.
        **how: Its score, protocol and labelled.
    Returns:
        "accuracy", the share of images whose class is found, and the metrics: "mean", "per_class".
    """
    taken = infer_classes(model, features)
    changed = torch.from_numpy(np.flatnonzero(taken != class_idx))
    if len(changed):
        new = level_values(model, features, taken, changed)
        # Entropies are over all classes, whichever is taken.
        log_prob = tuple(
            old.index_copy(0, changed, v) for old, v in zip(values.log_prob, new.log_prob, strict=True)
        )
        values = LevelValues(log_prob, values.neg_entropy)
    found = evaluate(model, values, class_idx, *truth, taken=taken, **how)
    return {"accuracy": float((taken == class_idx).mean()), **found.to_dict()}


def auroc_by_class(
    scores: NDArray[np.float32], labels: NDArray[np.bool_], class_idx: NDArray[np.int64], names: Sequence[str]
) -> dict[str, float | None]:
    """Compute the image AUROC within each true class (N,), whatever classes the scores took the images for.

    It is None where a class has images of one kind only; classes without images are left out.
    """
    members = {name: class_idx == k for k, name in enumerate(names)}
    return {n: image_metrics(scores[m], labels[m])["image_auroc"] for n, m in members.items() if m.any()}
