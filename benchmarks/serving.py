"""A detector as its user feels it: from images to a fitted model, from a file to a decision, on disk.

Run it as ``python benchmarks/serving.py``; it prints JSON lines. For each preset a detector is fitted on the
dataset, saved, loaded and exported; then 512 x 512 JPEG files are judged one at a time and in batches by
PyTorch, and one at a time by the ONNX file under onnxruntime, in turns. Ratios are to the default by PyTorch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from harness import emit, environment, interleave, speedup
from PIL import Image

from hgadlib import Detector
from hgadlib.datasets import load_dataset
from hgadlib.datasets.images import read_image, resize_image

NAME = "serving"
SIDE = 512


def write_files(dataset: str, root: str | None, count: int, folder: Path) -> list[Path]:
    """Write test images, spread over the test set, as JPEG files of 512 pixels a side."""
    test = load_dataset(dataset, root=root).test
    files = []
    for i, record in enumerate(test[:: max(1, len(test) // count)][:count]):
        files.append(folder / f"{i:03d}.jpg")
        Image.fromarray(resize_image(read_image(record.path), SIDE)).save(files[-1], quality=95)
    return files


def main() -> None:
    """Fit, save, load, export and serve each preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_dataset(parser)
    parser.add_argument("--presets", nargs="+", default=["hgad", "fast"], help="files of params/experiments")
    parser.add_argument("--epochs", type=int, help="of the fit; the preset's unless given")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    harness.add_arguments(parser)
    args = parser.parse_args()
    harness.apply_arguments(args)
    import onnxruntime

    emit(NAME, "environment", **environment(clock=args.clock), dataset=args.dataset)
    source = args.dataset if args.data_root is None else args.data_root
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = write_files(args.dataset, args.data_root, args.images, folder)
        tasks = {}
        for preset in args.presets:
            started = time.perf_counter()
            detector = Detector(
                experiment=preset, epochs=args.epochs, false_alarm_rate=0.1, run_dir=folder / preset
            )
            detector.fit(source, progress=False)
            fitted = time.perf_counter() - started
            file = detector.save(folder / f"{preset}.safetensors")
            onnx = detector.export(folder / f"{preset}.onnx")
            started = time.perf_counter()
            detector = Detector.load(file)
            emit(
                NAME, "fit", preset=preset, seconds=fitted, load_s=time.perf_counter() - started,
                features_cached=detector.metrics_["timing"]["features_cached"],
                detector_mb=file.stat().st_size / 1e6, onnx_mb=onnx.stat().st_size / 1e6,
                **{k: v for k, v in detector.metrics_["mean"].items() if k in ("image_auroc", "pixel_auroc")},
            )  # fmt: skip
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])

            def alone(detector: Detector = detector) -> object:
                return [next(detector.predict(file)) for file in files]

            def batches(detector: Detector = detector) -> object:
                return list(detector.predict(files))

            def exported(session: onnxruntime.InferenceSession = session) -> object:
                unknown = np.array([-1])
                return [
                    session.run(None, {"images": np.asarray(Image.open(f))[None], "class_id": unknown})
                    for f in files
                ]

            tasks |= {f"{preset}, alone": alone, f"{preset}, batches": batches, f"{preset}, ONNX": exported}
        times = interleave(tasks, repeats=args.repeats, clock=args.clock)
    first = times[next(iter(times))]
    for name, timing in times.items():
        rate = len(files) / timing.median
        emit(NAME, "serve", task=name, images_per_s=rate, speedup=speedup(timing, first), **timing.summary())


if __name__ == "__main__":
    main()
