"""Classes inferred, classes discovered, thresholds from normal images alone, a class left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.metrics import ConfusionMatrixDisplay, adjusted_rand_score, normalized_mutual_info_score

from hgadbook.paper import number_text
from hgadlib.config import Config, ScoreConfig
from hgadlib.errors import InputError
from hgadlib.evaluation.class_inference import auroc_by_class, infer_classes, score_as
from hgadlib.evaluation.metrics import image_metrics
from hgadlib.evaluation.thresholds import Rate, binomial_rate, conformal_threshold
from hgadlib.features.store import Features
from hgadlib.figures.theme import PALETTE, literal
from hgadlib.model import HGAD
from hgadlib.runs.experiment import build_model
from hgadlib.runs.inputs import Inputs
from hgadlib.training import fit

Classes = NDArray[np.int64]


def select_features(features: Features, chosen: ArrayLike) -> Features:
    """Copy the features of the images for which `chosen`, (N,) bool, is true.

    Raises:
        InputError: No image is kept, or the mask is of another length.
    """
    keep = np.asarray(chosen, dtype=bool)
    if keep.shape != (len(features),) or not keep.any():
        raise InputError(
            f"expected a choice of some of {len(features)} images, found {keep.sum()} of {keep.shape}"
        )
    rows = torch.from_numpy(np.flatnonzero(keep))
    levels = tuple(level.index_select(0, rows.to(level.device)) for level in features.levels)
    storage = "host" if features.storage == "file" else features.storage
    return replace(features, levels=levels, storage=storage, key=f"part of {features.key}")


def select_train(inputs: Inputs, chosen: ArrayLike) -> Inputs:
    """Keep some of the training images; classes that have none left are no longer classes.

    The test images are those of the remaining classes.

    Raises:
        InputError: As :func:`select_features`.
    """
    keep = np.asarray(chosen, dtype=bool)
    train = select_features(inputs.train, keep)
    dataset = inputs.dataset
    classes = tuple(sorted({r.class_name for r, k in zip(dataset.train, keep, strict=True) if k}))
    tested = np.array([record.class_name in classes for record in dataset.test], dtype=bool)
    wanted = {"train": iter(keep), "test": iter(tested)}
    records = tuple(record for record in dataset.records if next(wanted[record.split]))
    test = inputs.test if tested.all() else select_features(inputs.test, tested)
    return replace(inputs, dataset=replace(dataset, classes=classes, records=records), train=train, test=test)


def held_out(class_idx: Classes, share: float, *, seed: int = 0) -> NDArray[np.bool_]:
    """Draw the images to hold out: of every class the same share in (0, 1), at least one and never all.

    Raises:
        InputError: The share lies outside (0, 1), or a class has a single image.
    """
    if not 0 < share < 1:
        raise InputError(f"expected a share to hold out between 0 and 1, found {share}")
    rng = np.random.default_rng(seed)
    out = np.zeros(len(class_idx), dtype=bool)
    for k in np.unique(class_idx):
        members = np.flatnonzero(class_idx == k)
        if len(members) < 2:
            raise InputError(f"class {k} has one training image; expected two at least to hold one out")
        count = min(max(1, round(share * len(members))), len(members) - 1)
        out[rng.permutation(members)[:count]] = True
    return out


def train_in_memory(config: Config, inputs: Inputs) -> HGAD:
    """Train and calibrate a model on these inputs; no run directory is written."""
    model, own = cast(HGAD, build_model(config, inputs)), inputs.train_classes
    fit(model, inputs.train, own, train=config.train, loss=config.loss, seed=config.seed, progress=False)
    return model


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
    return pd.concat([table, table.mean().to_frame("mean").T])


def confusion(true: Classes, inferred: Classes, names: Sequence[str], *, title: str) -> Axes:
    """Draw how many images of each class were taken for which, in percent of the row."""
    size = (1.4 + 0.52 * len(names), 0.9 + 0.36 * len(names))
    ax = plt.subplots(figsize=size)[1]
    ConfusionMatrixDisplay.from_predictions(
        true, inferred, labels=range(len(names)), display_labels=[*map(literal, names)], normalize="true",
        values_format=".0%", include_values=len(names) <= 20, cmap="Blues",
        im_kw={"aspect": "auto", "vmin": 0, "vmax": 1}, text_kw={"fontsize": 8}, colorbar=False, ax=ax,
    )  # fmt: skip
    plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    ax.set_title(title, loc="left")
    ax.set(xlabel="taken for (% of the row)", ylabel="true class")
    return ax


def discovery_table(inputs: Inputs, discovered: Inputs) -> pd.DataFrame:
    """Compare discovered classes with the folders' names, which discovery did not see.

    Args:
        inputs: The dataset with its own classes.
        discovered: The same images in the same order, with discovered classes.

    Returns:
        A row a split: images, classes there and found, adjusted Rand index and normalised mutual information
        (both 1 where the partitions agree).
    """
    rows = {}
    for split in ("train", "test"):
        ours, theirs = getattr(inputs, f"{split}_classes"), getattr(discovered, f"{split}_classes")
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


def hold_out(config: Config, inputs: Inputs, share: float, *, without: str | None = None) -> HeldOutModel:
    """Train on all but a share of each class's normal images, and perhaps without a class altogether.

    Args:
        config: Of the model and its training.
        inputs: The dataset.
        share: Of each class to hold out; the same images whatever class is left out.
        without: A class to leave out.

    Raises:
        InputError: No such class, no other class, or a share outside (0, 1).
    """
    names, classes = inputs.dataset.classes, inputs.train_classes
    if without is not None and (without not in names or len(names) < 2):
        raise InputError(
            f"expected a class to leave out of {', '.join(names)}, two at least; found {without!r}"
        )
    if "all" in names:
        raise InputError("a class is called 'all', which here stands for all of them; rename its folder")
    out = held_out(classes, share)
    wanted = np.array([name != without for name in names])[classes]
    rest = select_train(inputs, wanted & ~out)
    order = {name: k for k, name in enumerate(rest.dataset.classes)}
    held = wanted & out
    class_idx = np.array([order[names[k]] for k in classes[held]], dtype=np.int64)
    return HeldOutModel(train_in_memory(config, rest), rest, select_features(inputs.train, held), class_idx)


def expected_alarms(
    held_out: int, tested: int, false_alarm_rate: float, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Compute the range in which the false alarm rate on new normal images falls if all is as it should be.

    The threshold itself comes from a finite sample, so the rate behind it is Beta-distributed over draws of
    the held-out images, and the count on the tested ones beta-binomial.

    Args:
        held_out: n, images behind the threshold.
        tested: Normal images that it is tried on.
        false_alarm_rate: That was asked for.
        confidence: Probability of the range, at least.

    Returns:
        Lowest and highest rate.

    Raises:
        InputError: The rate lies outside (0, 1) or takes more held-out images.
    """
    # Of n ranks the threshold is the rank of the threshold.
    rank = round(conformal_threshold(np.arange(1, held_out + 1), false_alarm_rate))
    alarms = stats.betabinom(tested, held_out + 1 - rank, rank)
    low, high = alarms.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low) / tested, float(high) / tested


def alarm_rates(
    scores: NDArray[np.float32],
    thresholds: NDArray[np.float64],
    labels: NDArray[np.bool_],
    class_idx: Classes,
    names: Sequence[str],
) -> tuple[dict[str, Rate], dict[str, Rate]]:
    """Count alarms, scores above their thresholds: on normal images, and on anomalous ones.

    Returns:
        The rates of both, each by class name and of "all".
    """
    alarms = scores > thresholds
    rates: tuple[dict[str, Rate], dict[str, Rate]] = ({}, {})
    for anomalous, found in zip((False, True), rates, strict=True):
        for k, name in enumerate(names):
            found[name] = binomial_rate(alarms[(class_idx == k) & (labels == anomalous)])
        found["all"] = binomial_rate(alarms[labels == anomalous])
    return rates


def rate_intervals(
    rates: Mapping[str, Mapping[str, Rate]],
    *,
    target: float,
    label: str,
    colors: Sequence[str] = (PALETTE[2], PALETTE[1], PALETTE[4], PALETTE[7]),
) -> Axes:
    """Draw counted shares with their intervals, a row a name and a colour a series.

    Args:
        rates: Series to name to rate; the same names in each.
        target: What was asked for, drawn as a dashed line.
        label: Of the axis.
        colors: Of the series; blue and vermilion are for normal and anomalous images.
    """
    names = list(next(iter(rates.values())))
    ax = plt.subplots(figsize=(5.6, 0.9 + 0.34 * len(names)))[1]
    for i, ((series, found), color, marker) in enumerate(zip(rates.items(), colors, "osD^", strict=False)):
        shift = (i - (len(rates) - 1) / 2) * 0.5 / len(rates)
        rows = [(y + shift, rate) for y, rate in enumerate(found[name] for name in names) if rate.trials]
        at, value, low, high = np.array([(y, rate.value, rate.low, rate.high) for y, rate in rows]).T
        ax.errorbar(
            100 * value, at, xerr=100 * np.array([value - low, high - value]), fmt=marker, color=color,
            capsize=3, markersize=5, linewidth=1.2, label=series,
        )  # fmt: skip
    ax.axvline(100 * target, color="0.4", linestyle=(0, (4, 3)), linewidth=1.2, zorder=0, label="asked for")
    ax.set_yticks(range(len(names)), [*map(literal, names)])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(-2, 102)
    ax.set_xlabel(label)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


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


def leave_out(config: Config, inputs: Inputs, name: str, share: float, rate: float) -> Unseen:
    """Train without a class and look at its images, each taken for the class that makes it most likely.

    Args:
        config: Of the model, its training and its scores.
        inputs: The dataset, with all classes.
        name: The class to leave out.
        share: Of each known class to hold out for its threshold.
        rate: False alarm rate that the thresholds are chosen for.

    Raises:
        InputError: As :func:`hold_out`, or too few images were held out.

    Source: paper App. A.5.
    """
    part = hold_out(config, inputs, share, without=name)
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


def beyond_sentences(
    inferred: pd.DataFrame,
    discovery: pd.DataFrame,
    compared: pd.DataFrame,
    alarms: tuple[Mapping[str, Rate], Mapping[str, Rate]],
    unseen: Sequence[Unseen],
    *,
    rate: float,
) -> list[str]:
    """Answer the chapter's four questions, a sentence each.

    Args:
        inferred: From :func:`inference_table`, with the way "likeliest class".
        discovery: From :func:`discovery_table`.
        compared: AUROC with classes given and discovered, with the row "mean" and the column "difference".
        alarms: From :func:`alarm_rates`, for thresholds by class.
        unseen: From :func:`leave_out`.
        rate: The false alarm rate that was asked for.
    """
    mean, train = inferred.loc["mean"], discovery.loc["train"]
    auroc = inferred.xs("AUROC", axis=1, level=1).loc["mean"]
    change = number_text(float(compared["difference"]["mean"]), sign="+")
    normal = [sum(getattr(one.alarms, count) for one in unseen) for count in ("events", "trials")]
    false, found = (of["all"] for of in alarms)
    return [
        f"The class inferred from the image is right for {mean['likeliest class', 'right']:.1f} % of the "
        f"test images; image AUROC is {auroc['likeliest class']:.1f} % with it and "
        f"{auroc['class given']:.1f} % with the class given.",
        f"Clustering finds {train['found']:.0f} classes where there are {train['classes']:.0f} (adjusted "
        f"Rand index {train['adjusted Rand index']:.2f}); trained on them, image AUROC differs by {change} "
        "points.",
        f"Thresholds for {100 * rate:g} % false alarms raise an alarm on {false.events} of {false.trials} "
        f"normal test images and find {found.events} of {found.trials} anomalous ones.",
        f"Of a class that was never seen, {normal[0]} of {normal[1]} normal images raise an alarm, over "
        f"{len(unseen)} class{'es' * (len(unseen) != 1)} left out one by one.",
    ]
