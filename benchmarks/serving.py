"""A detector as its user feels it: from images to a fitted model, from a file to a decision, on disk.

Run it as ``python benchmarks/serving.py``; it prints JSON lines. For each preset a detector is fitted to the
dataset's training images, without cached features and without its test images, saved, loaded and exported;
then 512 x 512 JPEG files are judged one at a time and in batches by PyTorch, and one at a time by the ONNX
file under onnxruntime, in turns. Speed-ups are over the first preset by PyTorch.

Where anomalib is installed (``pip install -e .[compare,export]``), its PaDiM, PatchCore and CFLOW do the same
beside one of the presets, with its backbone's weights, stages and image size: one model each on the images of
all classes, which ours knows apart and theirs does not. They are fitted by anomalib's engine to all images,
none kept aside for a threshold; they serve by their own modules and their own ONNX export. CFLOW trains for
as many epochs as is said, fewer than anyone would. Ratios are theirs over ours: above 1 ours is ahead.

Each fit runs in a process of its own, where its peak memory is measured too. anomalib's reading processes
and the files that are mapped do not count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import CLOCKS, Memory, Task, Timing, emit, environment, interleave, peak_memory, speedup
from PIL import Image

# PyTorch and all that loads it are imported where they are used: onnxruntime's memory is without them.
NAME = "serving"
SIDE = 512
PEERS = ("padim", "patchcore", "cflow")
WAYS = ("alone", "batches", "ONNX")
# A rate for which few images suffice.
_FALSE_ALARMS = 0.1


@dataclass(frozen=True)
class Fitted:
    """A model of ours or of anomalib's on disk, and what it took.

    Attributes:
        name: The preset, or the peer's name.
        peer: Whether it is anomalib's.
        file: For PyTorch.
        seconds: Of the fit.
        memory: Of the fit's process.
        onnx: The export; "" before it is made.
        load_s: Seconds from the file to a model.
    """

    name: str
    peer: bool
    file: str
    seconds: float
    memory: Memory
    onnx: str = ""
    load_s: float = 0.0

    def megabytes(self, way: str) -> float:
        """Size of what a way of serving reads, with what the file refers to."""
        file = Path(self.onnx if way == "ONNX" else self.file)
        return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) / 1e6


def write_files(dataset: str, root: str | None, count: int, folder: Path) -> list[str]:
    """Write test images, spread over the test set, as JPEG files of 512 pixels a side."""
    from hgadlib.datasets import load_dataset
    from hgadlib.datasets.images import read_image, resize_image

    test = load_dataset(dataset, root=root).test
    files = []
    for i, record in enumerate(test[:: max(1, len(test) // count)][:count]):
        files.append(str(folder / f"{i:03d}.jpg"))
        Image.fromarray(resize_image(read_image(record.path), SIDE)).save(files[-1], quality=95)
    return files


def training_images(dataset: str, root: str | None, per_class: int) -> dict[str, list[str]]:
    """List the training images by class, all of them or so many."""
    from hgadlib.datasets import load_dataset

    found = load_dataset(dataset, root=root)
    images: dict[str, list[str]] = {name: [] for name in found.classes}
    for record in found.train:
        images[record.class_name].append(str(record.path))
    return {name: own[: per_class or None] for name, own in images.items()}


def prepare_fit(
    name: str, images: Mapping[str, Sequence[str]], folder: str, settings: Mapping[str, Any]
) -> Task:
    """Return the fit of a preset, or of a peer where there is a backbone for it; it saves what it fits."""
    import torch

    torch.set_num_threads(settings["threads"])
    target, now = Path(folder), CLOCKS[settings["clock"]]
    os.environ["HGAD_CACHE"] = str(target / "cache")

    if (backbone := settings.get("backbone")) is None:
        from hgadlib import Detector

        detector = Detector(
            experiment=name, epochs=settings["epochs"], false_alarm_rate=_FALSE_ALARMS,
            run_dir=target / "run",
        )  # fmt: skip

        def fit() -> Path:
            return detector.fit(images, progress=False).save(target / "model.safetensors")

    else:
        import anomalib_models

        files = [file for own in images.values() for file in own]

        def fit() -> Path:
            # Its processes' seconds would not count by the clock of this one.
            workers = settings["threads"] if settings["clock"] == "wall" else 0
            model = anomalib_models.fit(
                name, files, **backbone, epochs=settings["peer_epochs"], num_workers=workers
            )
            return anomalib_models.save(model, target)

    def timed() -> None:
        started = now()
        file = fit()
        seconds = now() - started
        (target / "fit.json").write_text(json.dumps({"file": str(file), "seconds": seconds}))

    return timed


def run_fit(name: str, images: dict[str, list[str]], folder: Path, settings: dict[str, Any]) -> Fitted:
    """Fit in a process of its own."""
    folder.mkdir()
    memory = peak_memory(prepare_fit, name, images, str(folder), settings)
    found = json.loads((folder / "fit.json").read_text())
    return Fitted(name, settings.get("backbone") is not None, memory=memory, **found)


def export(model: Fitted) -> Fitted:
    """Load a model and write its ONNX file."""
    folder, load = Path(model.file).parent, loader(model)
    started = time.perf_counter()
    loaded = load(model.file)
    seconds = time.perf_counter() - started
    if model.peer:
        import anomalib_models

        onnx = anomalib_models.export(loaded, folder)
    else:
        onnx = loaded.export(folder / "model.onnx")
    return replace(model, onnx=str(onnx), load_s=seconds)


def loader(model: Fitted) -> Callable[[str], Any]:
    """Import what reads the model's file."""
    if model.peer:
        import anomalib_models

        return anomalib_models.load
    from hgadlib import Detector

    return Detector.load


def prepare_serving(model: Fitted, way: str, files: Sequence[str], threads: int) -> Task:
    """Load a model and return what judges all files, from each file to its score and its map."""
    if way == "ONNX":
        return _exported(model, files, threads)
    import torch

    torch.set_num_threads(threads)
    detector = loader(model)(model.file)
    if model.peer:
        import anomalib_models

        return lambda: list(anomalib_models.predict(detector, files, 1 if way == "alone" else 8))
    if way == "alone":
        return lambda: [next(detector.predict(file)) for file in files]
    return lambda: list(detector.predict(list(files)))


def _exported(model: Fitted, files: Sequence[str], threads: int) -> Task:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.onnx, options, providers=["CPUExecutionProvider"])

    def inputs(file: str) -> dict[str, np.ndarray]:
        pixels = np.asarray(Image.open(file))[None]
        if not model.peer:
            return {"images": pixels, "class_id": np.array([-1])}
        return {"input": pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)}

    return lambda: [session.run(None, inputs(file)) for file in files]


def ratios(
    ours: Fitted, peer: Fitted, times: Mapping[str, Timing], peaks: Mapping[str, Memory]
) -> dict[str, Any]:
    """Compare a peer with ours: theirs over ours, of all that is measured."""
    found: dict[str, Any] = {
        "fit": peer.seconds / ours.seconds,
        "fit_memory": _whole(peer.memory) / _whole(ours.memory),
    }
    for way in WAYS:
        own, other = f"{ours.name}, {way}", f"{peer.name}, {way}"
        found[f"{way}_seconds"] = speedup(times[own], times[other])
        if peaks:
            found[f"{way}_memory"] = _whole(peaks[other]) / _whole(peaks[own])
    return found | {
        "model_size": peer.megabytes("alone") / ours.megabytes("alone"),
        "onnx_size": peer.megabytes("ONNX") / ours.megabytes("ONNX"),
    }


def _whole(memory: Memory) -> float:
    return memory.base + memory.added


def parse_arguments() -> argparse.Namespace:
    """Read the command line; peers that cannot be imported are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_dataset(parser)
    parser.add_argument("--presets", nargs="+", default=["hgad", "fast"], help="files of params/experiments")
    parser.add_argument("--epochs", type=int, help="of the presets' fits; their own unless given")
    parser.add_argument("--per-class", type=int, default=0, help="training images a class; 0 for all")
    parser.add_argument("--images", type=int, default=16, help="files that are judged")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="of anomalib; all where it is installed unless given"
    )
    parser.add_argument("--beside", help="the preset that peers stand beside; the last one unless given")
    parser.add_argument("--peer-epochs", type=int, default=1, help="of CFLOW's fit")
    harness.add_arguments(parser)
    args = parser.parse_args()
    installed = anomalib_version()
    if args.peers and not installed:
        raise SystemExit("--peers: anomalib is not installed; run: pip install -e .[compare,export]")
    if args.peers is None:
        args.peers = list(PEERS) if installed else []
    args.beside = args.beside or args.presets[-1]
    if args.beside not in args.presets:
        raise SystemExit(f"--beside: expected one of {', '.join(args.presets)}, found {args.beside}")
    harness.apply_arguments(args)
    return args


def anomalib_version() -> str | None:
    """Return the version of anomalib; None where it is not installed."""
    try:
        return importlib.metadata.version("anomalib")
    except importlib.metadata.PackageNotFoundError:
        return None


def backbone_of(preset: str) -> dict[str, Any]:
    """Return the backbone's name, its stages and the largest image size of a preset."""
    from hgadlib import load_config

    config = load_config({"dataset": "folder", "experiment": preset})
    features = config.features
    return {
        "backbone": features.backbone, "layers": list(features.out_indices),
        "image_size": config.data.image_size, "weights": features.weights,
    }  # fmt: skip


def main() -> None:
    """Fit, save, load, export and serve each preset and each peer."""
    args = parse_arguments()
    import torch

    threads = torch.get_num_threads()
    emit(
        NAME, "environment", **environment(clock=args.clock), dataset=args.dataset,
        anomalib=anomalib_version() or "not installed",
    )  # fmt: skip
    settings = {"threads": threads, "clock": args.clock, "epochs": args.epochs}
    images = training_images(args.dataset, args.data_root, args.per_class)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = []
        for preset in args.presets:
            models.append(export(run_fit(preset, images, folder / preset, settings)))
            emit_fit(models[-1], images, preset=preset)
        backbone = backbone_of(args.beside)
        for peer in args.peers:
            own = settings | {"backbone": backbone, "peer_epochs": args.peer_epochs}
            models.append(export(run_fit(peer, images, folder / peer, own)))
            epochs = {"epochs": args.peer_epochs} if peer == "cflow" else {}
            emit_fit(models[-1], images, peer=peer, beside=args.beside, **backbone, **epochs)
        files = write_files(args.dataset, args.data_root, args.images, folder)
        serve(models, files, threads, args)


def emit_fit(model: Fitted, images: Mapping[str, Sequence[str]], **labels: object) -> None:
    """Print what a fit took and what it left on disk."""
    emit(
        NAME, "fit", **labels, images=sum(map(len, images.values())), classes=len(images),
        seconds=model.seconds, load_s=model.load_s, **model.memory.summary(),
        detector_mb=model.megabytes("alone"), onnx_mb=model.megabytes("ONNX"),
    )  # fmt: skip


def serve(models: Sequence[Fitted], files: list[str], threads: int, args: argparse.Namespace) -> None:
    """Let all models judge the files in turns, then each in a process of its own for its memory."""
    ways = {f"{model.name}, {way}": (model, way) for model in models for way in WAYS}
    tasks = {name: prepare_serving(*of, files, threads) for name, of in ways.items()}
    times = interleave(tasks, repeats=args.repeats, clock=args.clock)
    first = times[next(iter(times))]
    for name, timing in times.items():
        rate = len(files) / timing.median
        emit(NAME, "serve", task=name, images_per_s=rate, speedup=speedup(timing, first), **timing.summary())
    peaks = {}
    for name, of in () if args.no_memory else ways.items():
        peaks[name] = peak_memory(prepare_serving, *of, files, threads)
        emit(NAME, "memory", task=name, **peaks[name].summary())
    ours = next(model for model in models if model.name == args.beside and not model.peer)
    for peer in (model for model in models if model.peer):
        emit(NAME, "ratios", preset=ours.name, peer=peer.name, **ratios(ours, peer, times, peaks))


if __name__ == "__main__":
    main()
