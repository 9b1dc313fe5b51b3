"""What a run's record says: the content of metrics.json and scores.npz."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from hgadlib.config import Config
from hgadlib.evaluation.evaluate import Evaluation
from hgadlib.evaluation.likelihoods import anomalous_positions, histogram_overlap
from hgadlib.runs.hardware import peak_memory
from hgadlib.runs.inputs import Inputs, image_name
from hgadlib.scoring import LevelValues

_HISTOGRAM_BINS = 120


@dataclass(frozen=True)
class Result:
    """A run's outcome.

    Attributes:
        metrics: The content of metrics.json.
        values: Level values of the test images.
        evaluation: Under the headline protocol.
    """

    metrics: dict[str, Any]
    values: LevelValues
    evaluation: Evaluation


def metrics_record(
    config: Config,
    inputs: Inputs,
    headline: Evaluation,
    others: dict[str, Evaluation],
    history: pd.DataFrame,
    *,
    evaluate_s: float,
    predict_images_per_s: float,
) -> dict[str, Any]:
    """Put together what metrics.json says, but for the run's name.

    Args:
        config: Of the run.
        inputs: Of the run.
        headline: The evaluation whose figures stand first.
        others: Evaluations by the name of their protocol.
        history: A row an epoch.
        evaluate_s: Seconds from features to the headline's metrics.
        predict_images_per_s: From file to map.

    Returns:
        Plain values; None where a metric has no meaning.
    """
    dataset, labels, labelled = inputs.dataset, inputs.test_labels, inputs.test_labelled
    train_s = float(history["seconds"].sum())
    protocol = headline.protocol
    return {
        "protocol": {
            "epoch": "last",
            "normalisation": protocol.normalisation,
            "criterion": protocol.criterion,
        },
        **headline.to_dict(),
        "best_epoch": best_epochs(history),
        "other_protocols": {name: evaluation.to_dict() for name, evaluation in others.items()},
        "timing": {
            "features_s": round(inputs.train.seconds + inputs.test.seconds, 2),
            "features_cached": inputs.train.cached and inputs.test.cached,
            "train_s": round(train_s, 2),
            "evaluate_s": round(evaluate_s, 2),
            "train_images_per_s": round(len(history) * len(dataset.train) / max(train_s, 1e-9), 2),
            "predict_images_per_s": round(predict_images_per_s, 2),
        },
        "memory": peak_memory(inputs.device),
        "counts": {
            "train": len(dataset.train),
            "test_normal": int((~labels & labelled).sum()),
            "test_anomalous": int((labels & labelled).sum()),
            "test_unlabelled": int((~labelled).sum()),
            "skipped": list(dataset.skipped),
        },
        "config_digest": config.digest,
        "features_key": {"train": inputs.train.key, "test": inputs.test.key},
    }


def scores_record(
    inputs: Inputs, values: LevelValues, evaluation: Evaluation, masks: dict[int, np.ndarray]
) -> dict[str, np.ndarray]:
    """Put together the arrays of scores.npz: a row per test image, and histograms of log-likelihoods."""
    edges, counts = log_likelihood_counts(inputs, values, masks)
    return {
        "score": evaluation.scores,
        "label": inputs.test_labels,
        "labelled": inputs.test_labelled,
        "class_idx": inputs.test_classes,
        "classes": np.array(inputs.dataset.classes),
        "image": np.array([image_name(inputs.dataset, record) for record in inputs.dataset.test]),
        "log_likelihood_edges": edges,
        "log_likelihood_counts": counts,
    }


def best_epochs(history: pd.DataFrame) -> dict[str, Any]:
    """Give the best epoch of each metric that was evaluated in training.

    It is chosen on the test set, so it stands beside the headline and never in its place.
    """
    best: dict[str, Any] = {}
    for name in ("image_auroc", "pixel_auroc"):
        if f"test_{name}" not in history:
            continue
        column = history[f"test_{name}"].to_numpy(dtype=float)
        if np.isfinite(column).any():
            row = int(np.nanargmax(column))
            best[name] = {"epoch": int(history["epoch"].iloc[row]), "value": float(column[row])}
    return best


def log_likelihood_counts(
    inputs: Inputs, values: LevelValues, masks: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Histogram the positions' log-likelihoods, normal against anomalous.

    Which are anomalous, :func:`anomalous_positions` says. Images of which nobody said what they are count in
    neither.

    Returns:
        Bin edges per level, (L, bins + 1), and counts, (K, L, 2, bins).
    """
    classes, labelled = inputs.test_classes, inputs.test_labelled
    n_classes, n_levels = len(inputs.dataset.classes), len(values.log_prob)
    edges = np.zeros((n_levels, _HISTOGRAM_BINS + 1))
    counts = np.zeros((n_classes, n_levels, 2, _HISTOGRAM_BINS), np.int64)
    for level, log_prob in enumerate(values.log_prob):
        flat = log_prob.numpy()
        # Few positions fall far below the rest; they go into the first bin.
        low = float(np.quantile(flat, 0.001).astype(np.float32))
        edges[level] = np.linspace(low, max(float(flat.max()), low + 1e-6), _HISTOGRAM_BINS + 1)
        touched = anomalous_positions(classes, inputs.test_labels & labelled, masks, log_prob.shape[1:])
        for k in range(n_classes):
            members = torch.from_numpy(np.flatnonzero((classes == k) & labelled))
            for state in (False, True):
                found = log_prob[members][touched[members] == state].clamp_min(low)
                counts[k, level, int(state)] = np.histogram(found.numpy(), edges[level])[0]
    return edges, counts


def likelihood_columns(inputs: Inputs, values: LevelValues, masks: dict[int, np.ndarray]) -> dict[str, float]:
    """Sum up normal and anomalous log-likelihoods in a few numbers, means over classes and levels.

    Returns:
        ``test_overlap``, the share that the two histograms of a class have in common, and the mean
        log-likelihoods ``test_log_prob_normal`` and ``test_log_prob_anomalous``, as the scores have them
        (nats, or nats per dimension); without classes that have both kinds, none of them.

    Source: paper Fig. 2.
    """
    classes, labelled = inputs.test_classes, inputs.test_labelled
    _, counts = log_likelihood_counts(inputs, values, masks)
    found: dict[str, list[float]] = {"overlap": [], "log_prob_normal": [], "log_prob_anomalous": []}
    for level, log_prob in enumerate(values.log_prob):
        touched = anomalous_positions(classes, inputs.test_labels & labelled, masks, log_prob.shape[1:])
        for k in range(len(counts)):
            overlap = histogram_overlap(*counts[k, level])
            if overlap is None:
                continue
            members = torch.from_numpy(np.flatnonzero((classes == k) & labelled))
            own, where = log_prob[members], touched[members]
            found["overlap"].append(overlap)
            found["log_prob_normal"].append(float(own[~where].double().mean()))
            found["log_prob_anomalous"].append(float(own[where].double().mean()))
    return {f"test_{name}": float(np.mean(of)) for name, of in found.items() if of}


Histograms = dict[str, tuple[np.ndarray, np.ndarray]]


def stored_histograms(scores: Mapping[str, np.ndarray], level: int = -1) -> tuple[Histograms, Histograms]:
    """Take one level's log-likelihood histograms out of a run's scores.npz.

    Args:
        scores: The arrays of scores.npz.
        level: Which level; the deepest by default.

    Returns:
        For normal and for anomalous positions: class name to (edges, counts).
    """
    edges, counts = scores["log_likelihood_edges"][level], scores["log_likelihood_counts"][:, level]
    names = [str(name) for name in scores["classes"]]
    normal, anomalous = ({n: (edges, counts[k, s]) for k, n in enumerate(names)} for s in (0, 1))
    return normal, anomalous
