"""What a run's record says: the content of metrics.json and scores.npz."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from hgadlib.config import Config
from hgadlib.evaluation.evaluate import Evaluation
from hgadlib.evaluation.likelihoods import Likelihoods
from hgadlib.method import Method
from hgadlib.runs.cost import cost
from hgadlib.runs.hardware import peak_memory
from hgadlib.runs.inputs import Inputs, image_name
from hgadlib.scoring import LevelValues


@dataclass(frozen=True)
class Result:
    """A run's outcome on the test images.

    Attributes:
        evaluation: Under the headline protocol.
        by_protocol: Under every protocol, by its name, the headline first.
        seconds: From features to the headline's metrics.
        inferred: Metrics with each image's class inferred, and how many are; empty where not measured.
        metrics: The content of metrics.json; empty before the run is recorded.
    """

    values: LevelValues
    evaluation: Evaluation
    likelihoods: Likelihoods
    by_protocol: dict[str, Evaluation]
    seconds: float
    inferred: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def metrics_record(
    config: Config,
    inputs: Inputs,
    model: Method,
    result: Result,
    history: pd.DataFrame,
    *,
    predict_images_per_s: float,
) -> dict[str, Any]:
    """Compose metrics.json, but for the run's name: plain values, None where a metric has no meaning."""
    dataset, labels, labelled = inputs.dataset, inputs.test_labels, inputs.test_labelled
    held_out = inputs.held_out
    parts = [part for part in (inputs.train, held_out, inputs.test) if part is not None]
    train_s, epochs = float(history["seconds"].sum()), int(history["epoch"].iloc[-1])
    return {
        "protocol": {"epoch": "last", **asdict(result.evaluation.protocol)},
        **result.evaluation.to_dict(),
        **({"inferred": result.inferred} if result.inferred else {}),
        "best_epoch": best_epochs(history),
        "other_protocols": {name: evaluation.to_dict() for name, evaluation in result.by_protocol.items()},
        "timing": {
            "features_s": round(sum(part.seconds for part in parts), 2),
            "features_cached": all(part.cached for part in parts),
            "train_s": round(train_s, 2),
            "evaluate_s": round(result.seconds, 2),
            "train_images_per_s": round(epochs * len(dataset.train) / max(train_s, 1e-9), 2),
            "predict_images_per_s": round(predict_images_per_s, 2),
        },
        "memory": peak_memory(inputs.device),
        "cost": cost(inputs.backbone, model, config.data.image_size),
        "counts": {
            "train": len(dataset.train),
            **({"held_out": len(held_out)} if held_out is not None else {}),
            **({"threshold": len(dataset.threshold)} if dataset.threshold else {}),
            "test_normal": int((~labels & labelled).sum()),
            "test_anomalous": int((labels & labelled).sum()),
            "test_unlabelled": int((~labelled).sum()),
            "skipped": list(dataset.skipped),
        },
        "notes": list(dataset.remarks),
        "config_digest": config.digest,
        "features_key": {
            "train": inputs.train.key,
            **({"held_out": held_out.key} if held_out is not None else {}),
            "test": inputs.test.key,
        },
    }


def scores_record(inputs: Inputs, result: Result) -> dict[str, np.ndarray]:
    """Compose scores.npz: a row per test image, and histograms of log-likelihoods."""
    return {
        "score": result.evaluation.scores, "label": inputs.test_labels, "labelled": inputs.test_labelled,
        "class_idx": inputs.test_classes, "classes": np.array(inputs.dataset.classes),
        "image": np.array([image_name(inputs.dataset, record) for record in inputs.dataset.test]),
        "log_likelihood_edges": result.likelihoods.edges, "log_likelihood_counts": result.likelihoods.counts,
    }  # fmt: skip


def history_columns(result: Result) -> dict[str, float]:
    """Compose what history.csv says of the test set: AUROCs that have a meaning, and log-likelihoods."""
    mean = result.evaluation.mean
    found = {f"test_{name}": mean[name] for name in ("image_auroc", "pixel_auroc")}
    return {name: v for name, v in found.items() if v is not None} | result.likelihoods.columns


def best_epochs(history: pd.DataFrame) -> dict[str, Any]:
    """Find the best epoch of each metric that was evaluated in training.

    It is chosen on the test set, so it stands beside the headline and never in its place.
    """
    best: dict[str, Any] = {}
    for name in ("image_auroc", "pixel_auroc"):
        column = history.get(f"test_{name}")
        if column is not None and column.notna().any():
            row = column.argmax()  # of the values that are there
            best[name] = {"epoch": int(history["epoch"].iloc[row]), "value": float(column.iloc[row])}
    return best
