"""What the upper end of the published score costs: AUROC by epoch in both forms, on sets small and large.

Run it as ``python benchmarks/saturation.py``; it prints JSON lines. The training of the paper's tables
(params/experiments/tables.yaml) on the first images of each class (``--per-class``, 0 for all), looked at as
it goes on: the image AUROC, mean over classes, of the published score S and of the score that the library
ranks by, from the same log-likelihoods, with the constants of the training features; and how many test images
share the largest published score. Nothing is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import harness
import numpy as np
import torch
from harness import emit, environment

from hgadlib.config import load_config
from hgadlib.evaluation.evaluate import level_values
from hgadlib.evaluation.metrics import image_metrics
from hgadlib.model import HGAD
from hgadlib.runs.experiment import build_model
from hgadlib.runs.inputs import Inputs, prepare
from hgadlib.scoring import anomaly_maps, image_scores, published_maps
from hgadlib.training import calibrate, fit

NAME = "saturation"
FORMS = {"published": published_maps, "ranked": anomaly_maps}


def measure(model: HGAD, inputs: Inputs, sigma: float | None, size: int) -> dict[str, float]:
    """Score the test set in both forms."""
    calibrate(model, inputs.train, inputs.train_classes)
    values = level_values(model, inputs.test, inputs.test_classes)
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    tied = 0
    for k in range(len(model.classes)):
        members = np.flatnonzero(inputs.test_classes == k)
        mine, constants = values[torch.from_numpy(members)], model.normalisation(torch.tensor(k)).to("cpu")
        for name, form in FORMS.items():
            maps = form(mine, constants, size=size, sigma=sigma, criterion="likelihood")
            scores = image_scores(maps).numpy()
            found[name].append(image_metrics(scores, inputs.test_labels[members])["image_auroc"] or np.nan)
            if name == "published":
                tied += int((scores == scores.max()).sum()) - 1
    means = {f"{name}_auroc": float(np.nanmean(of)) for name, of in found.items()}
    return {**means, "tied_at_the_top": tied / len(inputs.test_classes)}


def main() -> None:
    """Train on each size of set and look at it by epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_dataset(parser)
    parser.add_argument("--per-class", type=int, nargs="+", default=[4, 24, 0], help="0 for all images")
    parser.add_argument("--epochs", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--every", type=int, default=8, help="epochs between looks")
    harness.add_device(parser)
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.apply_arguments(args)
    emit(NAME, "environment", **environment(clock=args.clock), dataset=args.dataset)
    for per_class in args.per_class:
        config = load_config(
            dataset=args.dataset, data_root=args.data_root, epochs=args.epochs, device=args.device,
            image_size=args.image_size, base="tables",
        )  # fmt: skip
        inputs = prepare(config, progress=False)
        if per_class:
            classes = inputs.train_classes
            firsts = [np.flatnonzero(classes == k)[:per_class] for k in np.unique(classes)]
            chosen = np.sort(np.concatenate(firsts))
            dataset, kept = inputs.dataset, [inputs.dataset.train[i] for i in chosen]
            inputs = replace(
                inputs,
                dataset=replace(dataset, records=(*kept, *dataset.test)),
                train=replace(inputs.train, levels=tuple(level[chosen] for level in inputs.train.levels)),
            )
        model = build_model(config, inputs)
        seen: dict[int, dict[str, float]] = {}

        def look(epoch: int, current: HGAD, inputs: Inputs = inputs, score=config.score, seen=seen):  # type: ignore[no-untyped-def]
            if epoch and (epoch % args.every == 0 or epoch in (1, args.epochs)):
                seen[epoch] = measure(current, inputs, score.sigma, score.map_size)
            return {}

        fit(
            model, inputs.train, inputs.train_classes, train=config.train, loss=config.loss, seed=config.seed,
            on_epoch=look, progress=False,
        )  # fmt: skip
        for epoch, found in seen.items():
            emit(
                NAME,
                "auroc",
                per_class=per_class or None,
                train=len(inputs.train_classes),
                epoch=epoch,
                **found,
            )


if __name__ == "__main__":
    main()
