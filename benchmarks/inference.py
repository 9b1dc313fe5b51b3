"""Scores and maps from image files against the published path with the same weights.

Run it as ``python benchmarks/inference.py``; it prints JSON lines. Ours is
`hgadlib.evaluation.predict`; the peer takes the same images from their files, an unfolded backbone,
AllInOneBlock flows, (N, M, D) distances, and upsamples and blurs on the host. Both use the constants that the
model stores; image scores and maps are compared before a ratio is printed. The model is not trained: that
changes no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import harness
import numpy as np
import subset
import torch
from harness import emit, environment, interleave, peak_memory, speedup
from peer import PublishedBackbone, PublishedFlow, image_batches, predict

from hgadlib.features.backbone import flatten_maps
from hgadlib.runs.experiment import build_model, predict_files
from hgadlib.runs.inputs import Inputs
from hgadlib.scoring import anomaly_maps
from hgadlib.training import calibrate

NAME = "inference"
# Of scores and maps, relative to the largest. Maps are exponentials of log-likelihoods, so they carry
# their absolute rounding.
TOLERANCE = 1e-3

Result = tuple[np.ndarray, np.ndarray]


class Bench:
    """One setting: a calibrated model, images, and both paths from file to score."""

    def __init__(self, args: argparse.Namespace, setting: str) -> None:
        self.batch = args.batch
        self.config = subset.configure(
            args, setting, **{"features.dtype": "float32", "features.batch_size": args.batch}
        )
        dataset, train = subset.some_images(self.config, 2, "train")
        backbone = subset.make_backbone(self.config)
        features = subset.compute_features(self.config, backbone, train)
        self.device = torch.device(self.config.device)
        self.inputs = Inputs(dataset, backbone, features, features, self.device)
        self.model = build_model(self.config, self.inputs)
        calibrate(self.model, features, self.inputs.train_classes)
        self.records = subset.some_images(self.config, args.per_class, "test")[1]
        self.classes = torch.from_numpy(dataset.class_idx(self.records)).to(self.device)
        self.published = PublishedBackbone(backbone)
        self.flows = [PublishedFlow(flow) for flow, _ in self.model.levels]

    def ours(self, size: int) -> Result:
        """Score all images, `size` at a time: each call of the library gets that many."""
        parts = [
            part
            for start in range(0, len(self.records), size)
            for part in predict_files(
                self.config, self.inputs, self.model, self.records[start : start + size]
            )
        ]
        return np.concatenate([s for s, _ in parts]), np.concatenate([m for _, m in parts])

    def theirs(self, size: int) -> Result:
        """Score all images the published way, `size` at a time."""
        paths = [record.path for record in self.records]
        parts = []
        for index in torch.arange(len(paths)).split(size):
            for rows, images in image_batches(paths, [index], self.config, self.inputs.backbone):
                own = self.classes[rows.to(self.device)]
                images = images.to(self.device)
                parts.append(predict(self.config, self.published, self.flows, self.model, images, own))
        return np.concatenate([s for s, _ in parts]), np.concatenate([m for _, m in parts])

    def stages(self, clock: str, repeats: int) -> dict[str, float]:
        """Time the parts of ours and of the peer's backbone on one batch: seconds by name."""
        paths = [record.path for record in self.records[: self.batch]]
        own, score, backbone = self.classes[: len(paths)], self.config.score, self.inputs.backbone

        def read() -> torch.Tensor:
            return next(image_batches(paths, [torch.arange(len(paths))], self.config, backbone))[1]

        images = read().to(self.device)
        with torch.inference_mode():
            features = flatten_maps(backbone(images))
            values = self.model.level_values(features, own)

        def maps() -> object:
            return anomaly_maps(
                values, self.model.normalisation(own), size=score.map_size, sigma=score.sigma,
                criterion=score.criterion,
            )  # fmt: skip

        def quiet(task: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                with torch.inference_mode():
                    return task()

            return run

        tasks = {
            "read": read,
            "backbone": lambda: backbone(images),
            "flow_and_prior": lambda: self.model.level_values(features, own),
            "maps": maps,
            "peer_backbone": lambda: self.published(images),
        }
        times = interleave(
            {k: quiet(v) for k, v in tasks.items()}, repeats=repeats, device=self.config.device, clock=clock
        )
        return {name: timing.median for name, timing in times.items()}


def compare(bench: Bench) -> dict[str, float]:
    """Give the largest difference of scores and maps, relative to the largest value.

    Raises:
        SystemExit: It is more than rounding, or an image's score depends on the images beside it.
    """
    ours, theirs, alone = bench.ours(bench.batch), bench.theirs(bench.batch), bench.ours(1)
    # Ours rank by t, the peer's by the published S: S is its top times e^(-e^(-t)).
    top = len(bench.model.flows) ** (2 if bench.config.score.criterion == "both" else 1)
    ours, alone = (tuple(top * np.exp(-np.exp(-part)) for part in side) for side in (ours, alone))
    found = {
        name: float(np.abs(a - b).max() / np.abs(b).max())
        for name, a, b in (
            ("scores", ours[0], theirs[0]),
            ("maps", ours[1], theirs[1]),
            ("scores_alone", alone[0], ours[0]),
        )
    }
    if not max(found.values()) <= TOLERANCE:
        raise SystemExit(f"expected the published path's scores and maps to {TOLERANCE}, found {found}")
    return found


def prepare(name: str, size: int, args: argparse.Namespace, setting: str) -> Callable[[], object]:
    """Make the task of a memory measurement."""
    harness.apply_arguments(args)
    bench = Bench(args, setting)
    task = bench.ours if name == "ours" else bench.theirs
    return lambda: task(size)


def main() -> None:
    """Compare, time, measure memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subset.add_arguments(parser, per_class=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed")
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.apply_arguments(args)
    emit(
        NAME,
        "environment",
        **environment(args.device, args.clock),
        dataset=args.dataset,
        image_size=args.image_size,
    )
    for setting in args.settings:
        bench = Bench(args, setting)
        emit(NAME, "differences", setting=setting, images=len(bench.records), **compare(bench))
        emit(
            NAME, "stages", setting=setting, batch=bench.batch, seconds=bench.stages(args.clock, args.repeats)
        )
        for size in (bench.batch, 1):
            measure(bench, size, args, setting)


def measure(bench: Bench, size: int, args: argparse.Namespace, setting: str) -> None:
    """Time both paths on so many images at a time, and measure their memory."""
    label = {"setting": setting, "at_a_time": size}
    tasks = {"ours": lambda: bench.ours(size), "published_path": lambda: bench.theirs(size)}
    # The comparison was the first call of each.
    times = interleave(tasks, repeats=args.repeats, warmup=0, device=args.device, clock=args.clock)
    for name, timing in times.items():
        rate = len(bench.records) / timing.median
        emit(NAME, "seconds", **label, path=name, **timing.summary(), images_per_s=rate)
    emit(NAME, "speedup", **label, **speedup(times["ours"], times["published_path"]))
    for name in () if args.no_memory else times:
        peak = peak_memory(prepare, name, size, args, setting)
        emit(NAME, "memory", **label, path=name, **peak.summary())


if __name__ == "__main__":
    main()
