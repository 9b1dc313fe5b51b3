"""Images per second: measured here in a short run, and as records of earlier runs and benchmarks say."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hgadlib.backbone import build_backbone
from hgadlib.config import Config, project_dir
from hgadlib.datasets import load_dataset
from hgadlib.experiment import build_model
from hgadlib.features import dataset_features
from hgadlib.hardware import select_device
from hgadlib.inputs import Inputs
from hgadlib.prediction import prediction_rate
from hgadlib.training import fit


def measure_throughput(config: Config, *, images: int = 48, epochs: int = 4) -> dict[str, float]:
    """Time a short run on some images of a dataset, spread over its classes; nothing of it is kept.

    Args:
        config: Dataset, features, flow, prior, training and scores.
        images: Training images, and test images, to time with.
        epochs: Of the training; half without and half with the intra-class terms.

    Returns:
        Images/s: "features" (file to features), "training" (from stored features, the median epoch of the
        second stage), "prediction" (file to map).
    """
    device = select_device(config.device)
    dataset = load_dataset(config.dataset, root=config.data.root, download=config.data.download, seed=0)
    some = [records[:: max(1, len(records) // images)][:images] for records in (dataset.train, dataset.test)]
    dataset = replace(dataset, records=(*some[0], *some[1]))
    backbone = build_backbone(
        config.features.backbone,
        out_indices=config.features.out_indices,
        pyramid=config.features.pyramid,
        weights=config.features.weights,
    ).to(device)
    backbone.grids(config.data.image_size)  # the first pass is slow
    features = dataset_features(
        dataset.train,
        backbone,
        image_size=config.data.image_size,
        resize=config.data.resize,
        dtype=config.features.dtype,
        device=device,
        keep=False,
        batch_size=config.features.batch_size,
        num_workers=config.data.num_workers,
        progress=False,
    )
    inputs = Inputs(dataset, backbone, features, features, device)
    model = build_model(config, inputs)
    train = replace(config.train, epochs=epochs, first_stage=0.5)
    history = fit(model, features, inputs.train_classes, train=train, loss=config.loss, progress=False)
    second = history[history["stage"] == 2]["images_per_s"]
    return {
        "features": len(dataset.train) / features.seconds,
        "training": float(second.median()),
        "prediction": prediction_rate(config, inputs, model, images=images),
    }


def product_rate(device: torch.device, *, size: int = 1024, repeats: int = 7) -> float:
    """Measure the rate of float32 matrix products, the median of some, in 1e9 multiply-adds per second."""
    a = torch.randn(size, size, device=device)
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return size**3 / statistics.median(seconds[1:]) / 1e9


_RATES = {"training (images/s)": "train_images_per_s", "prediction (images/s)": "predict_images_per_s"}


def recorded_rates(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Gather the rates that the ledger's runs recorded: a row for equal settings on equal hardware.

    Args:
        records: What :func:`hgadlib.ledger.read_records` gave.

    Returns:
        Columns of the settings, device, the medians of both rates, and records, a list of names.
    """
    settings = ["backbone", "pixels", "pyramid", "flow layers", "device"]
    rows = []
    for record in records:
        features = record["config"]["features"]
        rows.append(
            {
                "backbone": features["backbone"],
                "pixels": record["config"]["data"]["image_size"],
                "pyramid": str(features["pyramid"] or "none").strip("[]"),
                "flow layers": record["config"]["flow"]["layers"],
                "device": record["environment"]["device"],
                **{column: record["timing"][key] for column, key in _RATES.items()},
                "records": record["record"],
            }
        )
    table = pd.DataFrame(rows, columns=[*settings, *_RATES, "records"])
    merged = dict.fromkeys(_RATES, "median") | {"records": list}
    return table.groupby(settings, as_index=False, sort=False).agg(merged)


def benchmark_ratios(folder: Path | None = None) -> pd.DataFrame:
    """Collect the speed-ups that benchmarks committed as JSON lines: a row a line that has one.

    Args:
        folder: Where the files lie; None for results/benchmarks.

    Returns:
        Columns benchmark, case (what was compared), times as fast (the median), from, to (NaN where a
        ratio is of one measurement), device, threads and file; no row where nothing is committed.
    """
    folder = folder or project_dir() / "results" / "benchmarks"
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        device, threads = "not recorded", 0
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line) if line.strip() else {}
            if entry.get("what") == "environment":
                device = entry["machine"] if entry.get("device", "cpu") == "cpu" else entry["device"]
                threads = entry.get("threads", 0)
            if entry.get("what") != "speedup":
                continue
            rows.append(
                {
                    "benchmark": entry["benchmark"],
                    "case": _case(entry),
                    "times as fast": float(entry["median"] if "median" in entry else entry["ratio"]),
                    "from": float(entry.get("min", "nan")),
                    "to": float(entry.get("max", "nan")),
                    "device": device,
                    "threads": threads,
                    "file": file.name,
                }
            )
    columns = ["benchmark", "case", "times as fast", "from", "to", "device", "threads", "file"]
    return pd.DataFrame(rows, columns=columns)


def _case(entry: Mapping[str, Any]) -> str:
    """Say in words what a benchmark's line compares."""
    words = []
    if "channels" in entry:
        words.append(f"{entry['channels']} channels on {entry['grid'][0]} x {entry['grid'][1]}")
    if "setting" in entry:
        words.append(f"{entry['setting']} setting")
    if "at_a_time" in entry:
        words.append(f"{entry['at_a_time']} at a time")
    words += [str(entry[key]).replace("_", " ") for key in ("task", "of") if key in entry]
    if "over" in entry and entry["benchmark"] == "metrics":
        words.append(f"over {entry['over']}".replace("_", " "))
    return ", ".join(words)
