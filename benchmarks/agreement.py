"""Do this project's PaDiM and PatchCore find what anomalib's do, on the same images and weights?

Run it as ``python benchmarks/agreement.py --dataset demo``; it prints JSON lines, and nothing is timed. Ours
is the experiment baseline_NAME as it stands; anomalib's has the same backbone with the same weights, stages
and image size, and its own settings else. Both see all classes' training images at once, know no class, and
are tested by image AUROC of each class. Needs anomalib: ``pip install -e .[compare,export]``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import anomalib_models
import harness
import numpy as np
from harness import emit, environment

from hgadlib.config import load_config
from hgadlib.evaluation.metrics import image_metrics
from hgadlib.runs.directory import RunDirectory
from hgadlib.runs.experiment import finish_run, train_model
from hgadlib.runs.inputs import prepare

NAME = "agreement"
SHARED = ("padim", "patchcore")
"""Of both libraries."""


def main() -> None:
    """Fit both and test both, method by method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_dataset(parser)
    parser.add_argument("--name", help="what to call it; the dataset's name unless given")
    parser.add_argument("--methods", nargs="*", choices=SHARED, default=list(SHARED))
    parser.add_argument("--seed", type=int, default=0)
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.apply_arguments(args)
    name = args.name or args.dataset
    emit(NAME, "environment", **environment(clock=args.clock), dataset=name)
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(
                dataset=args.dataset, data_root=args.data_root, experiment=f"baseline_{method}",
                seed=args.seed, run_dir=str(Path(folder) / "run"),
            )  # fmt: skip
            inputs = prepare(config, progress=False)
            run = RunDirectory.open(config)
            model = train_model(config, inputs, run, progress=False)
            found = finish_run(config, inputs, model, run).metrics["per_class"]
        report(name, method, "ours", {key: values["image_auroc"] for key, values in found.items()})
        data, features = inputs.dataset, config.features
        theirs = anomalib_models.fit(
            method, [record.path for record in data.train], backbone=features.backbone,
            layers=features.out_indices, image_size=config.data.image_size, weights=features.weights,
            seed=args.seed,
        )  # fmt: skip
        files = [record.path for record in data.test]
        scores = np.concatenate([part for part, _ in anomalib_models.predict(theirs, files)])
        by_class = {}
        for k, key in enumerate(data.classes):
            own = (inputs.test_classes == k) & inputs.test_labelled
            by_class[key] = image_metrics(scores[own], inputs.test_labels[own])["image_auroc"]
        report(name, method, "anomalib", by_class)


def report(dataset: str, method: str, library: str, by_class: dict[str, float | None]) -> None:
    """Print image AUROC of each class, and the mean over those that have one."""
    values = [value for value in by_class.values() if value is not None]
    emit(
        NAME, "image_auroc", dataset=dataset, method=method, library=library,
        mean=float(np.mean(values)), per_class=by_class,
    )  # fmt: skip


if __name__ == "__main__":
    main()
