"""Training on features computed once against the published loop, backbone in every pass.

Run it as ``python benchmarks/training.py``; it prints JSON lines. Both sides train the same model by the same
schedule on the same images. First both take the same steps from the same weights on the same features, and
the epochs' losses are compared; then an epoch of ours and one of the peer's take turns. Our time over a run
holds the computation of the features once and the calibration at its end; images are read from their files by
the same threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import harness
import subset
import torch
from harness import CLOCKS, Timing, emit, environment, peak_memory, speedup
from peer import PublishedBackbone, PublishedModel, image_batches
from torch import Tensor

from hgadlib.config import Config
from hgadlib.features.store import Features
from hgadlib.model import HGAD
from hgadlib.runs.experiment import build_model
from hgadlib.runs.inputs import Inputs
from hgadlib.training import batch_order, first_stage_epochs, fit

NAME = "training"
# Losses of an epoch; rounding is amplified from step to step.
TOLERANCE = 1e-4


class Bench:
    """One setting: images, features, and the two sides with the same initial weights."""

    def __init__(self, args: argparse.Namespace, setting: str, epochs: int) -> None:
        self.config: Config = subset.configure(
            args, setting, **{"train.epochs": epochs, "train.first_stage": args.first_stage}
        )
        self.clock = CLOCKS[args.clock]
        dataset, records = subset.some_images(self.config, args.per_class, "train")
        self.paths = [record.path for record in records]
        self.backbone = subset.make_backbone(self.config)
        self.published = PublishedBackbone(self.backbone)
        started = self.clock()
        self.features: Features = subset.compute_features(self.config, self.backbone, records)
        self.features_s = self.clock() - started
        self.device = torch.device(self.config.device)
        inputs = Inputs(dataset, self.backbone, self.features, self.features, self.device)
        self.model: HGAD = build_model(self.config, inputs)
        self.class_idx = inputs.train_classes
        self.labels = torch.from_numpy(self.class_idx).to(self.device)
        self.peer = PublishedModel(self.model, self.config)
        self.backbone_s = 0.0

    def order(self, epoch: int) -> list[Tensor]:
        """Give an epoch's batches: the same for both sides."""
        return batch_order(len(self.paths), self.config.train.batch_size, self.config.seed, epoch)

    def fit(self, on_epoch: Callable[[int], None]) -> list[float]:
        """Train ours; give the loss of each epoch."""

        def after(epoch: int, _: HGAD) -> dict[str, float]:
            on_epoch(epoch - 1)
            return {}

        history = fit(
            self.model, self.features, self.class_idx, train=self.config.train, loss=self.config.loss,
            seed=self.config.seed, on_epoch=after, progress=False,
        )  # fmt: skip
        return history["total"].tolist()

    def peer_epoch(self, epoch: int, *, stored_features: bool) -> float:
        """Train the peer for an epoch, on images or on our stored features; give its mean loss."""
        order = self.order(epoch)
        intra = epoch >= first_stage_epochs(self.config.train)
        total = 0.0
        batches = self._stored(order) if stored_features else self._computed(order)
        for step, (indices, maps) in enumerate(batches):
            progress = (epoch * len(order) + step) / (self.config.train.epochs * len(order))
            loss = self.peer.step(maps, self.labels[indices], intra=intra, progress=progress)
            total += loss * len(indices) / len(self.paths)
        return total

    def _stored(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for indices in order:
            rows = self.features.batch(indices.to(self.features.levels[0].device))
            yield (
                indices,
                [
                    x.to(self.device).mT.unflatten(2, grid)
                    for x, grid in zip(rows, self.features.grids, strict=True)
                ],
            )

    def _computed(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        started = self.clock()
        for indices, images in image_batches(self.paths, order, self.config, self.backbone):
            with torch.no_grad():
                maps = self.published(images.to(self.device))
            self.backbone_s += self.clock() - started
            yield indices, maps
            started = self.clock()


def compare(args: argparse.Namespace, setting: str) -> None:
    """Let both take the same steps, one epoch of each stage, and compare the losses.

    Raises:
        SystemExit: They differ by more than rounding.
    """
    bench = Bench(args, setting, epochs=2)
    expected = [bench.peer_epoch(epoch, stored_features=True) for epoch in range(2)]
    found = bench.fit(lambda _: None)
    difference = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if not difference <= TOLERANCE:
        raise SystemExit(f"expected the peer's losses {expected} to {TOLERANCE}, found {found}")
    steps = 2 * len(bench.order(0))
    emit(NAME, "losses", setting=setting, steps=steps, ours=found, peer=expected, difference=difference)


def measure(args: argparse.Namespace, setting: str) -> None:
    """Let an epoch of ours and one of the peer's take turns over a whole run."""
    bench = Bench(args, setting, epochs=args.epochs)
    ours: list[float] = []
    theirs: list[float] = []
    mark = bench.clock()

    def turn(epoch: int) -> None:
        nonlocal mark
        ours.append(bench.clock() - mark)
        mark = bench.clock()
        bench.peer_epoch(epoch, stored_features=False)
        theirs.append(bench.clock() - mark)
        mark = bench.clock()

    bench.fit(turn)
    calibration_s = bench.clock() - mark
    label = {"setting": setting, "images": len(bench.paths), "epochs": args.epochs}
    emit(
        NAME, "model", **label, classes=len(bench.model.classes), channels=bench.features.channels,
        grids=bench.features.grids, layers=bench.config.flow.layers,
        position_dim=bench.config.flow.position_dim, hidden_ratio=bench.config.flow.hidden_ratio,
        out_indices=bench.config.features.out_indices, pyramid=bench.config.features.pyramid,
    )  # fmt: skip
    times = {"ours": Timing(tuple(ours)), "published_loop": Timing(tuple(theirs))}
    for name, timing in times.items():
        emit(NAME, "seconds_per_epoch", **label, loop=name, **timing.summary())
    total = bench.features_s + sum(ours) + calibration_s
    emit(NAME, "features_once", **label, seconds=bench.features_s, share_of_run=bench.features_s / total)
    if bench.device.type == "cpu":  # elsewhere the host goes on before the backbone is done
        share = bench.backbone_s / sum(theirs)
        emit(NAME, "backbone_in_peer", **label, seconds=bench.backbone_s, share_of_run=share)
    seen = len(bench.paths) * args.epochs
    emit(NAME, "images_per_s", **label, ours=seen / total, published_loop=seen / sum(theirs))
    emit(NAME, "speedup", **label, of="an epoch", **speedup(times["ours"], times["published_loop"]))
    emit(NAME, "speedup", **label, of="the run, features included", ratio=sum(theirs) / total)


def prepare(name: str, args: argparse.Namespace, setting: str) -> Callable[[], object]:
    """Make a memory measurement's task: one epoch, ours with its features in memory."""
    harness.apply_arguments(args)
    bench = Bench(args, setting, epochs=1)
    if name == "ours":
        return lambda: bench.fit(lambda _: None)
    return lambda: bench.peer_epoch(0, stored_features=False)


def main() -> None:
    """Compare, time, measure memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subset.add_arguments(parser, per_class=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--first-stage", type=float, default=0.08, help="share without intra-class terms")
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
        compare(args, setting)
        measure(args, setting)
        for name in () if args.no_memory else ("ours", "published_loop"):
            peak = peak_memory(prepare, name, args, setting)
            emit(NAME, "memory", setting=setting, loop=name, **peak.summary())


if __name__ == "__main__":
    main()
