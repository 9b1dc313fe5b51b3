"""What the chapter `beyond` asks of a dataset: classes inferred, thresholds tried, a class left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from hgadlib.class_inference import auroc_by_class, infer_classes, score_as
from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.features import Features
from hgadlib.inputs import Inputs
from hgadlib.metrics import image_metrics
from hgadlib.model import HGAD
from hgadlib.settings import ScoreConfig
from hgadlib.subsets import held_out, select_features, select_train, train_in_memory
from hgadlib.thresholds import Rate, binomial_rate, conformal_threshold

Classes = NDArray[np.int64]


def inference_table(
    model: HGAD, inputs: Inputs, score: ScoreConfig, inferred: Mapping[str, Classes]
) -> pd.DataFrame:
    """Set the true class beside inferred ones: how often they agree, and what that costs in detection.

    Args:
        model: Trained on all classes.
        inputs: Its dataset.
        score: Map size, blur and criterion.
        inferred: Name of the way to infer to the classes of the test images, (N,).

    Returns:
        In percent, a row a class and the mean: "AUROC, class given", and for each way "right" (share of test
        images given their true class) and "AUROC".
    """
    names, true, known = inputs.dataset.classes, inputs.test_classes, inputs.test_labelled
    ways = {"class given": true, **inferred}
    columns: dict[tuple[str, str], dict[str, float]] = {}
    for way, class_idx in ways.items():
        if way in inferred:
            columns[way, "right"] = {
                name: 100 * float((class_idx == k)[true == k].mean())
                for k, name in enumerate(names)
                if (true == k).any()
            }
        scores = score_as(model, inputs.test, class_idx, score)
        found = auroc_by_class(scores[known], inputs.test_labels[known], true[known], names)
        columns[way, "AUROC"] = {n: np.nan if v is None else 100 * v for n, v in found.items()}
    table = pd.DataFrame(columns)
    table.loc["mean"] = table.mean()
    return table


def discovery_table(inputs: Inputs, discovered: Inputs) -> pd.DataFrame:
    """Compare discovered classes with the folders' names, which discovery did not see.

    Args:
        inputs: The dataset with its own classes.
        discovered: The same images in the same order, with discovered classes.

    Returns:
        A row a split: images, classes there and found, adjusted Rand index and normalised mutual information
        (both 1 where the partitions agree).

    Raises:
        InputError: They are not of the same images.
    """
    rows = {}
    for split in ("train", "test"):
        ours, theirs = getattr(inputs, f"{split}_classes"), getattr(discovered, f"{split}_classes")
        if len(ours) != len(theirs):
            raise InputError(f"expected the same images twice, found {len(ours)} and {len(theirs)}")
        rows[split] = {
            "images": len(ours),
            "classes": len(np.unique(ours)),
            "found": len(np.unique(theirs)),
            "adjusted Rand index": adjusted_rand_score(ours, theirs),
            "normalised mutual information": normalized_mutual_info_score(ours, theirs),
        }
    return pd.DataFrame(rows).T


def discovered_auroc(
    model: HGAD, inputs: Inputs, discovered: Inputs, score: ScoreConfig
) -> dict[str, float | None]:
    """Score the test images as members of their discovered classes; AUROC within each true class."""
    known = inputs.test_labelled
    scores = score_as(model, discovered.test, discovered.test_classes, score)
    return auroc_by_class(
        scores[known], inputs.test_labels[known], inputs.test_classes[known], inputs.dataset.classes
    )


@dataclass(frozen=True)
class HeldOutModel:
    """A model and the normal images that it was not shown.

    Attributes:
        model: Trained on the rest.
        inputs: What it was trained on, and the test images of its classes.
        features: Of the held-out images of its classes.
        class_idx: Their classes, as the model numbers them.
    """

    model: HGAD
    inputs: Inputs
    features: Features
    class_idx: Classes

    def thresholds(self, score: ScoreConfig, rate: float) -> dict[str, float]:
        """Choose a threshold for each class from the held-out images, and "all" for one that serves all.

        Raises:
            InputError: Too few images of a class were held out for the rate.
        """
        scores = score_as(self.model, self.features, self.class_idx, score)
        found = {
            name: conformal_threshold(scores[self.class_idx == k], rate)
            for k, name in enumerate(self.model.classes)
        }
        return {**found, "all": conformal_threshold(scores, rate)}

    def training_thresholds(self, score: ScoreConfig, rate: float) -> dict[str, float]:
        """Choose thresholds from the images trained on, as one should not."""
        scores = score_as(self.model, self.inputs.train, self.inputs.train_classes, score)
        return {
            name: float(np.quantile(scores[self.inputs.train_classes == k], 1 - rate))
            for k, name in enumerate(self.model.classes)
        }


def hold_out(
    config: Config, inputs: Inputs, share: float, *, without: str | None = None, progress: bool = False
) -> HeldOutModel:
    """Train on all but a share of each class's normal images, and perhaps without a class altogether.

    Args:
        config: Of the model and its training.
        inputs: The dataset.
        share: Of each class to hold out; the same images whatever class is left out.
        without: A class to leave out.
        progress: Show a bar.

    Raises:
        InputError: No such class, no other class, or a share outside (0, 1).
    """
    names, classes = inputs.dataset.classes, inputs.train_classes
    if without is not None and (without not in names or len(names) < 2):
        raise InputError(
            f"expected a class to leave out of {', '.join(names)}, two at least; found {without!r}"
        )
    out = held_out(classes, share)
    wanted = np.array([name != without for name in names])[classes]
    rest = select_train(inputs, wanted & ~out)
    order = {name: k for k, name in enumerate(rest.dataset.classes)}
    held = wanted & out
    class_idx = np.array([order[names[k]] for k in classes[held]], dtype=np.int64)
    return HeldOutModel(
        train_in_memory(config, rest, progress=progress), rest, select_features(inputs.train, held), class_idx
    )


def alarm_rates(
    scores: NDArray[np.float32],
    thresholds: NDArray[np.float64],
    labels: NDArray[np.bool_],
    class_idx: Classes,
    names: Sequence[str],
) -> tuple[dict[str, Rate], dict[str, Rate]]:
    """Count alarms on normal and on anomalous images.

    Args:
        scores: (N,).
        thresholds: That each image's score is held against, (N,).
        labels: True where anomalous, (N,).
        class_idx: True classes, (N,).
        names: Class names.

    Returns:
        False alarm rate and recall by class name, and of "all".
    """
    alarms = scores > thresholds
    rates: tuple[dict[str, Rate], dict[str, Rate]] = ({}, {})
    for anomalous, found in zip((False, True), rates, strict=True):
        for k, name in enumerate(names):
            found[name] = binomial_rate(alarms[(class_idx == k) & (labels == anomalous)])
        found["all"] = binomial_rate(alarms[labels == anomalous])
    return rates


@dataclass(frozen=True)
class Unseen:
    """What became of a class that the model never saw.

    Attributes:
        name: The class.
        taken_for: Names of the classes that its test images were taken for, (N,).
        alarms: On its normal images.
        recall: On its anomalous ones.
        alarms_seen: On normal images of the classes that the model knows, treated the same way.
        auroc: Of its anomalous against its normal images.
        novelty: AUROC of its normal images against normal ones of known classes: 1 where all of them look
            more anomalous than what is known, 0.5 where nothing tells them apart.
    """

    name: str
    taken_for: tuple[str, ...]
    alarms: Rate
    recall: Rate
    alarms_seen: Rate
    auroc: float | None
    novelty: float | None


def leave_out(
    config: Config, inputs: Inputs, name: str, share: float, rate: float, *, progress: bool = False
) -> Unseen:
    """Train without a class and look at its images, each taken for the class that makes it most likely.

    Args:
        config: Of the model, its training and its scores.
        inputs: The dataset, with all classes.
        name: The class to leave out.
        share: Of each known class to hold out for its threshold.
        rate: False alarm rate that the thresholds are chosen for.
        progress: Show a bar.

    Raises:
        InputError: As :func:`hold_out`, or too few images were held out.

    Source: paper App. A.5.
    """
    part = hold_out(config, inputs, share, without=name, progress=progress)
    limits = part.thresholds(config.score, rate)
    by_class = np.array([limits[known] for known in part.model.classes])
    mine = (inputs.test_classes == inputs.dataset.classes.index(name)) & inputs.test_labelled
    unseen = select_features(inputs.test, mine)
    taken, known = infer_classes(part.model, unseen), infer_classes(part.model, part.inputs.test)
    scores = score_as(part.model, unseen, taken, config.score)
    seen_scores = score_as(part.model, part.inputs.test, known, config.score)
    labels = inputs.test_labels[mine]
    normal = part.inputs.test_labelled & ~part.inputs.test_labels
    both = np.concatenate([scores[~labels], seen_scores[normal]])
    is_new = np.arange(len(both)) < (~labels).sum()
    return Unseen(
        name,
        tuple(part.model.classes[k] for k in taken),
        binomial_rate((scores > by_class[taken])[~labels]),
        binomial_rate((scores > by_class[taken])[labels]),
        binomial_rate((seen_scores > by_class[known])[normal]),
        image_metrics(scores, labels)["image_auroc"],
        image_metrics(both, is_new)["image_auroc"],
    )


def unseen_table(found: Sequence[Unseen]) -> pd.DataFrame:
    """Set out what became of each class left out: a row a class."""
    rows = []
    for one in found:
        most = max(set(one.taken_for), key=one.taken_for.count)
        share = 100 * one.taken_for.count(most) / len(one.taken_for)
        rows.append(
            {
                "left out": one.name,
                "taken for": f"{most} ({share:.0f} %)",
                "false alarms (%)": str(one.alarms),
                "false alarms, known classes (%)": str(one.alarms_seen),
                "AUROC within (%)": np.nan if one.auroc is None else 100 * one.auroc,
                "AUROC new against known (%)": np.nan if one.novelty is None else 100 * one.novelty,
            }
        )
    return pd.DataFrame(rows).set_index("left out")
