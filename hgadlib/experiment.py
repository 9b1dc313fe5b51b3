"""One run, end to end: dataset, features, fit, evaluation, record. The steps that notebooks call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from hgadlib.backbone import Backbone, build_backbone
from hgadlib.config import Config
from hgadlib.datasets import Dataset, ImageRecord, load_dataset
from hgadlib.errors import InputError
from hgadlib.evaluation import Evaluation, Protocol, evaluate, level_values
from hgadlib.features import Features, dataset_features
from hgadlib.images import load_images, load_masks
from hgadlib.model import HGAD
from hgadlib.runs import RunDirectory, peak_memory
from hgadlib.scoring import LevelValues, anomaly_maps, image_scores
from hgadlib.training import calibrate, fit

_HISTOGRAM_BINS = 120


def select_device(name: str = "auto") -> torch.device:
    """Choose where to compute: CUDA when there, else Apple's GPU, else the processor.

    Raises:
        InputError: The named device is unknown or not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= there:
        raise InputError(
            f"device {name!r} is not there: found {there} {device.type} device(s); use -p device auto or cpu"
        )
    return device


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and is tested on."""

    dataset: Dataset
    backbone: Backbone
    train: Features
    test: Features
    device: torch.device

    @property
    def train_classes(self) -> np.ndarray:
        """Class of each training image."""
        return self.dataset.class_idx(self.dataset.train)

    @property
    def test_classes(self) -> np.ndarray:
        """Class of each test image."""
        return self.dataset.class_idx(self.dataset.test)

    @property
    def test_labels(self) -> np.ndarray:
        """True where a test image is anomalous."""
        return np.array([record.is_anomalous for record in self.dataset.test])


def prepare(config: Config, *, progress: bool = True) -> Inputs:
    """Load the dataset and compute its features, or find them in the cache.

    Raises:
        InputError: A device, dataset, image or weights file that is not there or not usable.
    """
    device = select_device(config.device)
    data, features = config.data, config.features
    dataset = load_dataset(
        config.dataset, root=data.root, download=data.download, strict=data.strict, seed=0
    )  # the split belongs to the dataset: it is the same for every seed of a run
    backbone = build_backbone(
        features.backbone,
        out_indices=features.out_indices,
        pyramid=features.pyramid,
        weights=features.weights,
    ).to(device)

    def of(records: tuple[ImageRecord, ...]) -> Features:
        return dataset_features(
            records,
            backbone,
            image_size=data.image_size,
            resize=data.resize,
            dtype=features.dtype,
            storage=features.storage,
            device=device,
            batch_size=features.batch_size,
            num_workers=data.num_workers,
            progress=progress,
        )

    return Inputs(dataset, backbone, of(dataset.train), of(dataset.test), device)


def build_model(config: Config, inputs: Inputs) -> HGAD:
    """Make the model for these inputs: seeded, on their device, initialised from training features."""
    torch.manual_seed(config.seed)
    model = HGAD(
        inputs.dataset.classes,
        [level.shape[-1] for level in inputs.train.levels],
        inputs.train.grids,
        flow=config.flow,
        prior=config.prior,
        per_dimension=config.score.per_dimension,
    ).to(inputs.device)
    classes = inputs.train_classes
    # A sample of every class, spread evenly, is enough for moments and means.
    chosen = np.concatenate([np.flatnonzero(classes == k)[:: max(1, (classes == k).sum() // 64)] for k in range(len(inputs.dataset.classes))])  # fmt: skip # noqa: E501
    sample = inputs.train.batch(torch.from_numpy(np.sort(chosen)), inputs.device)
    model.initialise(sample, torch.from_numpy(classes[np.sort(chosen)]).to(inputs.device))
    return model


def train_model(config: Config, inputs: Inputs, run: RunDirectory, *, progress: bool = True) -> HGAD:
    """Train, or load what this run has trained already; resumes from the run's checkpoint.

    Returns:
        The calibrated model, also saved in the run's directory with its history.
    """
    if run.model.is_file():
        return HGAD.load(run.model, inputs.device)
    model = build_model(config, inputs)
    run.write_environment(inputs.device)
    masks = class_masks(config, inputs) if config.train.evaluate_every else None

    def test(epoch: int, current: HGAD) -> dict[str, float]:
        every = config.train.evaluate_every
        if not every or (epoch % every and epoch != config.train.epochs):
            return {}
        calibrate(current, inputs.train, inputs.train_classes)
        values = level_values(current, inputs.test, inputs.test_classes)
        found = evaluate_protocol(config, inputs, current, values, masks, headline(config)).mean
        return {f"test_{name}": np.nan if found[name] is None else found[name] for name in ("image_auroc", "pixel_auroc")}  # type: ignore[misc]  # fmt: skip # noqa: E501

    fit(
        model,
        inputs.train,
        inputs.train_classes,
        train=config.train,
        loss=config.loss,
        seed=config.seed,
        checkpoint=run.checkpoint,
        on_epoch=test,
        on_history=run.write_history,
        progress=progress,
    )
    model.save(run.model)
    return model


def headline(config: Config) -> Protocol:
    """Give the protocol whose figures stand first in the record."""
    return Protocol(config.score.normalisation, config.score.criterion)


def class_masks(config: Config, inputs: Inputs) -> dict[int, np.ndarray]:
    """Load the masks of every class whose anomalous test images all have one."""
    masks: dict[int, np.ndarray] = {}
    test, classes = inputs.dataset.test, inputs.test_classes
    for k in range(len(inputs.dataset.classes)):
        records = [test[i] for i in np.flatnonzero(classes == k)]
        anomalous = [record for record in records if record.is_anomalous]
        if anomalous and all(record.mask_path is not None for record in anomalous):
            masks[k] = load_masks(records, size=config.score.map_size, resize=config.data.resize)
    return masks


def evaluate_protocol(
    config: Config,
    inputs: Inputs,
    model: HGAD,
    values: LevelValues,
    masks: dict[int, np.ndarray] | None,
    protocol: Protocol,
) -> Evaluation:
    """Evaluate the run's test set under one protocol."""
    return evaluate(
        model, values, inputs.test_classes, inputs.test_labels, masks, score=config.score, protocol=protocol
    )


@dataclass(frozen=True)
class Result:
    """A run's outcome: the content of metrics.json, and what figures are drawn from."""

    metrics: dict[str, Any]
    values: LevelValues
    evaluation: Evaluation


def evaluate_model(config: Config, inputs: Inputs, model: HGAD, run: RunDirectory) -> Result:
    """Evaluate the test set under every protocol and complete the run's record."""
    started = time.perf_counter()
    values = level_values(model, inputs.test, inputs.test_classes)
    masks = class_masks(config, inputs)
    first = headline(config)
    evaluation = evaluate_protocol(config, inputs, model, values, masks, first)
    evaluate_s = time.perf_counter() - started
    criteria = ("likelihood", "entropy", "both") if model.has_entropy else ("likelihood",)
    others = [Protocol(n, c) for n in ("inductive", "transductive") for c in criteria]  # type: ignore[arg-type]
    variants = {
        p.name: (
            evaluation if p == first else evaluate_protocol(config, inputs, model, values, masks, p)
        ).to_dict()
        for p in others
    }
    history = pd.read_csv(run.path / "history.csv")
    train_s = float(history["seconds"].sum())
    metrics: dict[str, Any] = {
        "protocol": {"epoch": "last", "normalisation": first.normalisation, "criterion": first.criterion},
        **evaluation.to_dict(),
        "best_epoch": best_epochs(history),
        "other_protocols": variants,
        "timing": {
            "features_s": round(inputs.train.seconds + inputs.test.seconds, 2),
            "train_s": round(train_s, 2),
            "evaluate_s": round(evaluate_s, 2),
            "train_images_per_s": round(len(history) * len(inputs.dataset.train) / train_s, 2),
            "predict_images_per_s": round(prediction_rate(config, inputs, model), 2),
        },
        "memory": peak_memory(inputs.device),
        "counts": {
            "train": len(inputs.dataset.train),
            "test_normal": int((~inputs.test_labels).sum()),
            "test_anomalous": int(inputs.test_labels.sum()),
            "skipped": list(inputs.dataset.skipped),
        },
        "config_digest": config.digest,
        "features_key": {"train": inputs.train.key, "test": inputs.test.key},
    }
    if not run.complete:
        edges, counts = log_likelihood_counts(inputs, values, masks)
        run.write_arrays(
            "scores",
            {
                "score": evaluation.scores,
                "label": inputs.test_labels,
                "class_idx": inputs.test_classes,
                "classes": np.array(inputs.dataset.classes),
                "image": np.array([image_name(inputs.dataset, record) for record in inputs.dataset.test]),
                "log_likelihood_edges": edges,
                "log_likelihood_counts": counts,
            },
        )
        run.finish(metrics)
    return Result(metrics, values, evaluation)


def image_name(dataset: Dataset, record: ImageRecord) -> str:
    """Name an image by its path below the dataset's root, the same on every machine."""
    path = record.path
    return path.relative_to(dataset.root).as_posix() if path.is_relative_to(dataset.root) else path.name


def best_epochs(history: pd.DataFrame) -> dict[str, Any]:
    """Give the best epoch of each metric evaluated in training. Chosen on the test set: never the headline."""
    best: dict[str, Any] = {}
    for name in ("image_auroc", "pixel_auroc"):
        column = history.get(f"test_{name}")
        if column is not None and column.notna().any():
            row = int(column.idxmax())
            best[name] = {"epoch": int(history["epoch"][row]), "value": float(column[row])}
    return best


def log_likelihood_counts(
    inputs: Inputs, values: LevelValues, masks: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Histogram the positions' log-likelihoods, normal against anomalous.

    A position is anomalous where the mask touches its cell; in classes without masks, where its image is.

    Returns:
        Bin edges per level, (L, bins + 1), and counts, (K, L, 2, bins).
    """
    classes, labels = inputs.test_classes, inputs.test_labels
    edges, counts = (
        [],
        np.zeros((len(inputs.dataset.classes), len(values.log_prob), 2, _HISTOGRAM_BINS), np.int64),
    )
    for level, log_prob in enumerate(values.log_prob):
        # Few positions fall far below the rest; they go into the first bin.
        low, high = np.quantile(log_prob.numpy(), [0.001, 1.0])
        edge = np.linspace(low, high + 1e-6, _HISTOGRAM_BINS + 1)
        edges.append(edge)
        for k in range(len(inputs.dataset.classes)):
            mine = log_prob[torch.from_numpy(classes == k)]
            if k in masks:
                touched = (
                    F.adaptive_max_pool2d(torch.from_numpy(masks[k])[:, None].float(), mine.shape[1:])[:, 0]
                    > 0
                )
            else:
                touched = torch.from_numpy(labels[classes == k])[:, None, None].expand_as(mine)
            for state in (0, 1):
                chosen = mine[touched == bool(state)].clamp_min(float(low)).numpy()
                counts[k, level, state] = np.histogram(chosen, edge)[0]
    return np.stack(edges), counts


def predict(config: Config, inputs: Inputs, model: HGAD, records: tuple[ImageRecord, ...]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip # noqa: E501
    """Score images from their files, under the stored constants.

    Returns:
        Image scores (N,) and anomaly maps (N, S, S), float32; higher is more anomalous.
    """
    classes = torch.from_numpy(inputs.dataset.class_idx(records)).to(inputs.device)
    scores, maps = [], []
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
            levels = [
                m.permute(0, 2, 3, 1).flatten(1, 2).float() for m in inputs.backbone(images.to(inputs.device))
            ]
            mine = classes[index.to(inputs.device)]
            values = model.level_values(levels, mine)
            constants = model.normalisation(mine)
            found = anomaly_maps(
                values, constants, size=config.score.map_size, sigma=config.score.sigma, criterion=config.score.criterion
            )  # fmt: skip
        maps.append(found.cpu().numpy())
        scores.append(image_scores(found).cpu().numpy())
    return np.concatenate(scores), np.concatenate(maps)


def prediction_rate(config: Config, inputs: Inputs, model: HGAD, *, images: int = 64) -> float:
    """Measure images per second from file to map, on some test images after a warm-up batch."""
    records = inputs.dataset.test[:images]
    predict(config, inputs, model, records[: config.features.batch_size])
    started = time.perf_counter()
    predict(config, inputs, model, records)
    return len(records) / (time.perf_counter() - started)
