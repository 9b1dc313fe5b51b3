"""How well do defects drawn on held-out normal images predict which settings detect real ones?

Run it as ``python benchmarks/choice.py --dataset demo``; it prints JSON lines. Of each class a share of the
training images is held out and defects are drawn on it (``hgad data validation``), several draws. What is
left trains Gaussians per class without a flow, which takes seconds, so that many settings of features and
scores can be tried: image sizes, stages, joined or not, pyramids of them, shrinkage of covariances and of
calibrated scores, blur, image score. Each is tested on the drawn defects and on the test set. Settings are
chosen by the first; the second says, once, how well that went. Nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import emit, environment

from hgadlib.config import FlowConfig, PriorConfig
from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import load_masks
from hgadlib.datasets.records import Dataset, ImageRecord
from hgadlib.datasets.validation import hold_out, make_validation
from hgadlib.evaluation.evaluate import level_values
from hgadlib.evaluation.metrics import PixelMetrics, image_metrics
from hgadlib.features.backbone import build_backbone
from hgadlib.features.extract import dataset_features
from hgadlib.features.store import Features, spread_sample
from hgadlib.model import HGAD
from hgadlib.scoring import Calibration, LevelValues, anomaly_maps, image_scores, inductive, normal_statistics

NAME = "choice"
# Isotropic variance added to a class's covariance; see prior.shrinkage.
SHRINKAGES = (0.03, 0.003, 0.01, 0.1)
SIZES, STAGES = (512, 384, 256), (3, 4)
# A level is an image size with the strides of its stages: "512:16+32" has both, joined.
KINDS = ("16", "32", "16+32")
LEVELS = tuple(f"{size}:{kind}" for size in SIZES for kind in KINDS)
PYRAMIDS = (
    *((level,) for level in LEVELS),
    *((f"512:{kind}", f"256:{kind}") for kind in KINDS),
    ("384:16+32", "256:16+32"), ("512:16+32", "384:16+32"), ("512:16+32", "384:16+32", "256:16+32"),
    ("512:16", "512:32"), ("384:16", "384:32"), ("256:16", "256:32"), ("384:16", "256:16+32"),
    ("384:16", "384:16+32", "256:32"), ("512:16", "512:16+32", "256:16+32"),
    ("512:16", "512:32", "256:16", "256:32"),
)  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """How level values become scores; the defaults are the first setting tried."""

    normalisation: str = "calibrated"
    kappa: float = 5.0
    sigma: float | None = None
    image: str = "maximum"
    image_share: float = 0.01


VARIANTS = (
    *(Scoring(kappa=kappa) for kappa in (2.0, 20.0, 60.0, 1e6)),
    Scoring("inductive"), Scoring("inductive", sigma=4.0),
    *(Scoring(sigma=sigma) for sigma in (0.0, 2.0, 4.0, 8.0)),
    *(Scoring(image="top", image_share=share) for share in (0.003, 0.01, 0.03)),
    *(Scoring(image="quantile", image_share=share) for share in (0.003, 0.01)),
)  # fmt: skip
VARIED: tuple[tuple[str, ...], ...] = (("512:16+32", "256:16+32"),)


def all_levels(records: tuple[ImageRecord, ...], backbone: str, sizes: Sequence[int]) -> Features:
    """Compute every level of :data:`LEVELS` at these sizes, joined as the library's backbone joins stages."""
    levels, grids = [], []
    for size in sizes:
        network = build_backbone(backbone, out_indices=STAGES)
        found = dataset_features(records, network, image_size=size, progress=False)
        fine, coarse = found.levels
        maps = coarse.float().transpose(1, 2).unflatten(2, found.grids[1])
        large = F.interpolate(maps, found.grids[0], mode="bilinear", align_corners=False)
        joined = torch.cat([fine, large.flatten(2).transpose(1, 2).half()], 2)
        levels += [fine, coarse, joined]
        grids += [*found.grids, found.grids[0]]
    return replace(found, levels=tuple(levels), grids=tuple(grids))


def values_by_set(
    dataset: Dataset, tests: Mapping[str, tuple[ImageRecord, ...]], backbone: str, sizes: Sequence[int]
) -> Iterator[tuple[float, LevelValues, dict[str, LevelValues]]]:
    """Fit a Gaussian per class and level with each shrinkage; values of held-out normal images, and of tests.

    A part is read once, for what all levels of a thousand images take is as much as there is room for.
    """
    names, parts = dataset.classes, {"normal": dataset.held_out, **tests}
    features, class_idx = all_levels(dataset.train, backbone, sizes), dataset.class_idx(dataset.train)
    sample, labels = spread_sample(class_idx, len(names), 64), torch.from_numpy(class_idx)
    varied = sorted({LEVELS.index(level) for pyramid in VARIED for level in pyramid})
    models, chosen = [], [range(len(LEVELS)), *[varied] * (len(SHRINKAGES) - 1)]
    for shrinkage, levels in zip(SHRINKAGES, chosen, strict=True):
        own = _levels(features, levels)
        prior = PriorConfig(covariance="class", n_centers=1, shrinkage=shrinkage)
        model = HGAD(names, own.channels, own.grids, flow=FlowConfig(layers=0), prior=prior)
        batches = partial(own.batches, sample.split(8), torch.device("cpu"))
        model.initialise(lambda batches=batches: ((x, labels[index]) for index, x in batches()))  # type: ignore[misc]
        models.append(model)
    found: list[dict[str, LevelValues]] = [{} for _ in models]
    for name, records in parts.items():
        features = all_levels(records, backbone, sizes)
        for model, levels, values in zip(models, chosen, found, strict=True):
            values[name] = _at(
                level_values(model, _levels(features, levels), dataset.class_idx(records)), levels
            )
    for shrinkage, values in zip(SHRINKAGES, found, strict=True):
        yield shrinkage, values.pop("normal"), values


def _levels(features: Features, levels: Sequence[int]) -> Features:
    return replace(
        features,
        levels=tuple(features.levels[i] for i in levels),
        grids=tuple(features.grids[i] for i in levels),
    )


def _at(values: LevelValues, levels: Sequence[int]) -> LevelValues:
    """Put values back at the places of their levels; the others are empty."""
    placed = [torch.empty(0)] * len(LEVELS)
    for i, value in zip(levels, values.log_prob, strict=True):
        placed[i] = value
    return LevelValues(tuple(placed), ())


def constants(normal: LevelValues, scoring: Scoring) -> Calibration:
    """Standardise by a class's held-out normal images, (n, h, w) a level; or, inductive, by their maxima."""
    if scoring.normalisation == "inductive":
        return inductive(normal)  # type: ignore[return-value]
    mean, std = [], []
    for level in normal.log_prob:
        x = level.double()[None, :, None]
        found = normal_statistics(torch.tensor([len(level)]), x.sum(1), x.square().sum(1), scoring.kappa)
        mean.append(found[0][0, 0])
        std.append(found[1][0, 0])
    return Calibration(LevelValues(tuple(mean), ()), LevelValues(tuple(std), ()))


def auroc(
    normal: LevelValues, normal_idx: np.ndarray, values: LevelValues, dataset: Dataset,
    records: tuple[ImageRecord, ...], scoring: Scoring, masks: np.ndarray | None,
) -> dict[str, float]:  # fmt: skip
    """Test one setting: metrics, means over classes."""
    class_idx = dataset.class_idx(records)
    labels = np.array([record.is_anomalous for record in records])
    drawn = np.array([record.mask_path is not None for record in records])
    found: dict[str, list[float]] = {}
    for k in np.unique(class_idx).tolist():
        members = np.flatnonzero(class_idx == k)
        own = constants(normal[torch.from_numpy(np.flatnonzero(normal_idx == k))], scoring)
        scores, pixels = [], PixelMetrics()
        for part in torch.from_numpy(members).split(32):
            maps = anomaly_maps(values[part], own, size=256, sigma=scoring.sigma, criterion="likelihood")
            scores.append(image_scores(maps, scoring.image, scoring.image_share))  # type: ignore[arg-type]
            if masks is not None and drawn[members][labels[members]].all():
                pixels.update((maps * 2.0**-12).half().numpy(), masks[part.numpy()])
        metrics = image_metrics(torch.cat(scores).numpy(), labels[members]) | pixels.compute()
        for name in ("image_auroc", "pixel_auroc", "aupro"):
            if metrics[name] is not None:
                found.setdefault(name, []).append(float(metrics[name]))  # type: ignore[arg-type]
    return {name: float(np.mean(of)) for name, of in found.items()}


def settings(shrinkage: float) -> Iterator[tuple[tuple[str, ...], Scoring]]:
    """Every pyramid with the first way of scoring and shrinkage, and some pyramids with every one."""
    for pyramid in PYRAMIDS if shrinkage == SHRINKAGES[0] else VARIED:
        yield pyramid, Scoring()
    if shrinkage == SHRINKAGES[0]:
        yield from itertools.product(VARIED, VARIANTS)


def real_records(dataset: Dataset, validation: Dataset) -> tuple[ImageRecord, ...]:
    """Return the labelled test images of a dataset, their classes named as in its validation set."""
    # Classes named A/B became folders A_B; their order is the same.
    flat = dict(zip(dataset.classes, validation.classes, strict=True))
    return tuple(replace(r, class_name=flat[r.class_name]) for r in dataset.test if r.is_labelled)


def main() -> None:
    """Try every setting on every draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_dataset(parser)
    parser.add_argument("--name", help="what to call it; the dataset's name unless given")
    parser.add_argument("--backbone", default="tf_efficientnet_lite2")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--least", type=int, default=30, help="drawn defects of each class, at least")
    parser.add_argument(
        "--sizes", type=int, nargs=len(SIZES), default=SIZES, help="image sizes in place of these, to try it"
    )
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.apply_arguments(args)
    name = args.name or args.dataset
    dataset = load_dataset(args.dataset, root=args.data_root)
    fewest = min(sum(r.class_name == c for r in dataset.train) for c in dataset.classes)
    held_out = min(0.5, max(0.15, (args.least / 2 + 0.5) / fewest))
    shown = dict(zip(LEVELS, (f"{size}:{kind}" for size in args.sizes for kind in KINDS), strict=True))
    emit(NAME, "environment", **environment(clock=args.clock), dataset=name, backbone=args.backbone)
    for draw in range(args.draws):
        with tempfile.TemporaryDirectory() as folder:
            made = make_validation(dataset, Path(folder) / "drawn", held_out=held_out, seed=draw)
            validation = hold_out(load_dataset("folder", root=made), 0.5)
            tests = {"drawn": validation.test, "real": real_records(dataset, validation)}
            masks = {key: load_masks(of, size=256, resize="stretch") for key, of in tests.items()}
            normal_idx = validation.class_idx(validation.held_out)
            for shrinkage, normal, values in values_by_set(validation, tests, args.backbone, args.sizes):
                for pyramid, scoring in settings(shrinkage):
                    chosen = [LEVELS.index(level) for level in pyramid]
                    metrics = {
                        key: auroc(
                            _take(normal, chosen), normal_idx, _take(values[key], chosen), validation,
                            records, scoring, masks[key] if scoring.image == "maximum" else None,
                        )
                        for key, records in tests.items()
                    }  # fmt: skip
                    emit(
                        NAME, "setting", dataset=name, draw=draw, levels=[shown[level] for level in pyramid],
                        shrinkage=shrinkage, **vars(scoring), **metrics,
                    )  # fmt: skip


def _take(values: LevelValues, chosen: list[int]) -> LevelValues:
    return LevelValues(tuple(values.log_prob[i] for i in chosen), ())


if __name__ == "__main__":
    main()
