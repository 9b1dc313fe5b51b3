"""What does training a flow add to Gaussians per class, and which settings of the fit and the prior help?

Run it as ``python benchmarks/fit.py --dataset demo``; it prints JSON lines. Of each class a share of the
training images is held out and defects are drawn on it (``hgad data validation``); half of what is left
trains, half calibrates the scores. One part of the fit is changed at a time, from one start on the default's
features at one image size; by epoch, 0 being the untrained model: the log-likelihood of trained and of
held-out normal features, and the image AUROC on the drawn defects, which may choose, and on the test set,
which may not. With ``--priors`` it changes a part of today's prior instead, by the last epoch's figures.
Nothing is timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import harness
import numpy as np
import torch
from choice import real_records
from harness import emit, environment

from hgadlib.config import Config, load_config
from hgadlib.datasets import load_dataset
from hgadlib.datasets.records import ImageRecord
from hgadlib.datasets.validation import make_validation
from hgadlib.evaluation.evaluate import Protocol, evaluate, level_values
from hgadlib.features.extract import dataset_features
from hgadlib.features.store import Features
from hgadlib.model import HGAD
from hgadlib.runs.experiment import build_model
from hgadlib.runs.inputs import Inputs, class_masks, prepare
from hgadlib.training import calibrate, fit

NAME = "fit"
_HALF = {"data.held_out": 0.5}
_BEFORE = {**_HALF, "prior.n_centers": 10, "prior.shrinkage": 0.01, "train.smooth": False}
START = {"train.lr": 4e-3, "train.gradient_clip": 100.0, **_BEFORE}
"""What the changes are made to: the default of then. What they showed of several classes lowered the rate."""
CHANGES: dict[str, dict[str, Any]] = {
    "start": {},
    "rate 0.001, clipped": {"train.lr": 1e-3, "train.gradient_clip": 1.0},
    "rate 0.001": {"train.lr": 1e-3},
    "rate 0.01": {"train.lr": 1e-2},
    "2 blocks": {"flow.layers": 2},
    "8 blocks": {"flow.layers": 8},
    "12 wide blocks": {"flow.layers": 12, "flow.hidden_ratio": 2.0},
    "additive": {"flow.coupling": "additive"},
    "all rows": {"train.rows": 1.0},
    "lambda2 = 1": {"loss.lambda2": 1.0},
    "lambda2 = 0": {"loss.lambda2": 0.0},
    "dropout 0.1": {"flow.dropout": 0.1},
    "noise 0.1": {"train.noise": 0.1},
    "averaged weights": {"train.average": 0.5},
    "learnt covariances": {"prior.covariance": "learnt"},
    "covariance I": {"prior.covariance": "identity"},
    "one Gaussian": {"prior.kind": "single"},
}
_LOOKED_FOR = {**_HALF, "prior.n_centers": 512}
PRIORS: dict[str, dict[str, Any]] = {
    "default": {},
    "no flow": {"flow.layers": 0},
    "2048 centres": {"prior.n_centers": 2048},
    "half held out": _HALF,
    "half, as before": _BEFORE,
    "half, 1 centre": {**_HALF, "prior.n_centers": 1},
    "half, 64 centres": {**_HALF, "prior.n_centers": 64},
    "half, 512 centres": _LOOKED_FOR,
    "half, 512, shrinkage 0.01": {**_LOOKED_FOR, "prior.shrinkage": 0.01},
    "half, 512, shrinkage 0.1": {**_LOOKED_FOR, "prior.shrinkage": 0.1},
    "half, 512, shrinkage 1": {**_LOOKED_FOR, "prior.shrinkage": 1.0},
    "half, 512, no noise": {**_LOOKED_FOR, "train.smooth": False},
    "half, no flow": {**_HALF, "flow.layers": 0},
}
"""Parts of the prior, changed one at a time from the default, or from half of the training images held out to
calibrate on, or from that and 512 centres, as the name says."""


def main() -> None:
    """Train with every change and look at it by epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_dataset(parser)
    parser.add_argument("--name", help="what to call it; the dataset's name unless given")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--every", type=int, default=4, help="epochs between looks")
    parser.add_argument("--image-size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--changes", nargs="*", choices=CHANGES, default=list(CHANGES))
    parser.add_argument(
        "--together", type=int, nargs="*", default=[], metavar="K",
        help="instead: train models of K classes each, by the last epoch's figures; 0 for all in one",
    )  # fmt: skip
    parser.add_argument(
        "--priors",
        nargs="*",
        choices=PRIORS,
        help="instead: change these parts of the prior, all if none is named",
    )
    harness.add_device(parser)
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.apply_arguments(args)
    name = args.name or args.dataset
    dataset = load_dataset(args.dataset, root=args.data_root)
    emit(NAME, "environment", **environment(clock=args.clock), dataset=name)
    with tempfile.TemporaryDirectory() as folder:
        made = make_validation(dataset, Path(folder) / "drawn")
        given = {"dataset": "folder", "data_root": str(made), "device": args.device, "epochs": args.epochs}
        shared = {"data.image_size": args.image_size, "features.pyramid": None, "train.evaluate_every": 1}
        whole = prepare(load_config(**given, overrides=shared), progress=False)
        half = prepare(load_config(**given, overrides=shared | _HALF), progress=False)
        records = real_records(dataset, whole.dataset)
        features = dataset_features(records, whole.backbone, image_size=args.image_size, progress=False)

        def tested_on_real(inputs: Inputs) -> Inputs:
            train = (*inputs.dataset.train, *inputs.dataset.held_out)
            return replace(inputs, dataset=replace(inputs.dataset, records=(*train, *records)), test=features)

        for together in args.together:
            classes = together or len(dataset.classes)
            by_number_of_classes(name, given, shared, classes, tested_on_real(whole))
        for change in (args.priors or PRIORS) if args.priors is not None else ():
            config = load_config(**given, overrides={**shared, **PRIORS[change]})
            drawn = half if config.data.held_out else whole
            model, real = trained(config, drawn), tested_on_real(drawn)
            figures = {
                f"{key}_{metric}": value
                for key, of in (("drawn", drawn), ("real", real))
                for metric, value in metrics(model, of, config).items()
            }
            emit(NAME, "prior", dataset=name, change=change, epochs=args.epochs, **figures)
        drawn, real = half, tested_on_real(half)
        for change in args.changes if not args.together and args.priors is None else ():
            config = load_config(**given, overrides={**shared, **START, **CHANGES[change]})

            def look(epoch: int, model: HGAD, config=config, change=change) -> dict[str, float]:  # type: ignore[no-untyped-def]
                if epoch % args.every and epoch != args.epochs:
                    return {}
                calibrate(model, drawn.train, drawn.train_classes, drawn.calibration)
                found = {
                    f"{key}_auroc": metrics(model, of, config, pixels=False).get("image_auroc", np.nan)
                    for key, of in (("drawn", drawn), ("real", real))
                }
                held, held_classes = drawn.calibration or (drawn.train, drawn.train_classes)
                for key, part, classes in (
                    ("trained", drawn.train, drawn.train_classes), ("held_out", held, held_classes)
                ):  # fmt: skip
                    values = level_values(model, part, classes)
                    found[f"{key}_log_prob"] = float(np.mean([v.mean().item() for v in values.log_prob]))
                emit(NAME, "epoch", dataset=name, change=change, epoch=epoch, **found)
                return found

            fit(
                build_model(config, drawn), drawn.train, drawn.train_classes, drawn.calibration,
                train=config.train, loss=config.loss, seed=config.seed, on_epoch=look, progress=False,
            )  # fmt: skip


def trained(config: Config, inputs: Inputs) -> HGAD:
    """Build a model and train it to the last epoch."""
    model = build_model(config, inputs)
    fit(
        model, inputs.train, inputs.train_classes, inputs.calibration,
        train=config.train, loss=config.loss, seed=config.seed, progress=False,
    )  # fmt: skip
    return cast(HGAD, model)


def by_number_of_classes(
    name: str, given: dict[str, Any], shared: dict[str, Any], together: int, inputs: Inputs
) -> None:
    """Train a model for each group of so many classes, under each prior; mean over all classes."""
    names = inputs.dataset.classes
    for change in ("one Gaussian", "covariance I", "default"):
        config, found = load_config(**given, overrides={**shared, **CHANGES.get(change, {})}), []
        for start in range(0, len(names), together):
            group = of_classes(inputs, names[start : start + together])
            model = trained(config, group)
            own = metrics(model, group, config, pixels=False).get("image_auroc", np.nan)
            found += [own] * len(group.dataset.classes)
        emit(
            NAME, "classes", dataset=name, change=change, together=together, real_auroc=float(np.mean(found))
        )


def of_classes(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """Keep what is of some classes."""

    def kept(features: Features, records: Sequence[ImageRecord]) -> Features:
        own = torch.tensor([i for i, record in enumerate(records) if record.class_name in names])
        return replace(features, levels=tuple(level[own] for level in features.levels))

    dataset = inputs.dataset
    held_out = None if inputs.held_out is None else kept(inputs.held_out, dataset.held_out)
    return replace(
        inputs,
        dataset=replace(
            dataset,
            records=tuple(record for record in dataset.records if record.class_name in names),
            classes=tuple(names),
        ),
        train=kept(inputs.train, dataset.train),
        test=kept(inputs.test, dataset.test),
        held_out=held_out,
    )


def metrics(model: HGAD, inputs: Inputs, config: Config, *, pixels: bool = True) -> dict[str, float]:
    """Image AUROC and, with pixels and where there are masks, pixel AUROC and AUPRO: means over classes."""
    found = evaluate(
        model, level_values(model, inputs.test, inputs.test_classes), inputs.test_classes, inputs.test_labels,
        class_masks(config, inputs) if pixels else None, score=config.score,
        protocol=Protocol("calibrated", "likelihood"),
    ).mean  # fmt: skip
    shown = {name: found.get(name) for name in ("image_auroc", "pixel_auroc", "aupro")}
    return {name: value for name, value in shown.items() if value is not None}


if __name__ == "__main__":
    main()
