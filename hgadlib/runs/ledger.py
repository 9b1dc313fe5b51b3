"""The ledger of runs: one small committed record per real run, `hgad runs add RUN_DIR`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hgadlib.config import config_from_dict, project_dir, training_key
from hgadlib.errors import InputError
from hgadlib.evaluation.likelihoods import class_overlaps
from hgadlib.files import write_atomically
from hgadlib.runs.directory import read_config, read_coupling, read_history, read_json, read_metrics

# Rows of a history that a record keeps at most, and evaluated epochs of the couplings' coefficients.
_CURVE_ROWS, _COUPLING_EPOCHS = 60, 8
_KEPT = ("schema", "dataset", "experiment", "seed", "protocol", "mean", "per_class", "best_epoch", "timing")


def record_of(run: Path, note: str = "") -> dict[str, Any]:
    """Return the record of a finished run: figures, configuration, images, hardware; no path of a machine.

    The note is what a reader must know beside it, such as which images a folder held. An InputError if the
    run, a directory, is not finished.
    """
    metrics, config, history = read_metrics(run), read_config(run), read_history(run)
    return {
        **{key: metrics[key] for key in _KEPT},
        **{key: metrics[key] for key in ("inferred", "cost") if key in metrics},
        "note": note,
        "other_protocols": {name: found["mean"] for name, found in metrics["other_protocols"].items()},
        **{key: metrics[key] for key in ("memory", "counts")},
        "epochs": int(history["epoch"].iloc[-1]),
        "curves": curves(history),
        "overlap": overlaps(run / "scores.npz"),
        "image_scores": image_scores(run / "scores.npz"),
        "coupling": coupling(read_coupling(run)) if (run / "coupling.csv").is_file() else {},
        "config_digest": config.digest,
        "config": config.identity(),
        **{name: read_json(run / f"{name}.json", "run it again") for name in ("data", "environment")},
    }


def curves(history: pd.DataFrame) -> dict[str, list[Any]]:
    """Thin a run's history to evenly spread epochs and every one that was evaluated; columns by name."""
    keep = history.filter(regex="^test_").notna().any(axis=1).to_numpy(copy=True)
    keep[_spread(len(history), _CURVE_ROWS)] = True
    kept = history[keep].drop(columns=["seconds", "images_per_s", "lr"], errors="ignore")
    return {str(name): _rounded(kept[name], 5) for name in kept}


def coupling(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Thin a run's coupling.csv to a few evaluated epochs, evenly spread; columns by name."""
    epochs = np.unique(table["epoch"])
    kept = table[table["epoch"].isin(epochs[_spread(len(epochs), _COUPLING_EPOCHS)])]
    exact = ("epoch", "level", "layer", "group")
    return {str(name): kept[name].tolist() if name in exact else _rounded(kept[name], 4) for name in kept}


def _spread(n: int, k: int) -> np.ndarray:
    """Choose k of n indices, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, k).round().astype(int))


def _rounded(values: pd.Series, digits: int) -> list[float | None]:
    return [None if pd.isna(value) else float(f"{value:.{digits}g}") for value in values]


def overlaps(scores: Path) -> dict[str, list[float | None]]:
    """Compute what normal and anomalous log-likelihoods have in common: by class, one number a level."""
    if not scores.is_file():
        return {}
    with np.load(scores) as arrays:
        return class_overlaps(arrays)


def image_scores(scores: Path) -> dict[str, dict[str, str]]:
    """Collect the headline's scores, to compare runs image by image: by class, in the order of the images.

    Returns:
        Labels, a character an image (1 anomalous, 0 normal, ? unknown), and scores of four digits, in one
        line of text each; nothing where the run keeps none.
    """
    if not scores.is_file():
        return {}
    found = {}
    with np.load(scores) as arrays:
        state = np.where(arrays["labelled"], np.where(arrays["label"], "1", "0"), "?")
        for k, name in enumerate(arrays["classes"]):
            own = arrays["class_idx"] == k
            values = " ".join(f"{value:.4g}" for value in arrays["score"][own])
            found[str(name)] = {"labels": "".join(state[own]), "scores": values}
    return found


def add(run: Path, folder: Path, note: str = "") -> Path:
    """Write a finished run's record into the ledger, a folder; the same run always gives the same file."""
    record = record_of(run, note)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{record['dataset']}-{record['experiment']}-seed{record['seed']}{_digests(record)}.json"
    write_atomically(file, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return file


def _digests(record: Mapping[str, Any]) -> str:
    return f"-{record['config_digest'][:8]}-{record['data']['digest'][:8]}"


def read_records(folder: Path | None = None) -> list[dict[str, Any]]:
    """Read the ledger (results/runs) by file name; each record says its file's name under "record"."""
    files = sorted((folder or project_dir() / "results" / "runs").glob("*.json"))
    return [read_json(file, "restore it, or delete it") | {"record": file.stem} for file in files]


def read_ledger(folder: Path) -> pd.DataFrame:
    """List the ledger: a row per run, with its mean metrics, sorted by name."""
    return pd.DataFrame(
        {
            **{key: record[key] for key in ("dataset", "experiment", "seed", "epochs")},
            **record["mean"],
            "train_s": record["timing"]["train_s"],
            **{key: record["environment"][key] for key in ("device", "commit")},
            "record": record["record"],
        }
        for record in read_records(folder)
    )


def group_records(
    records: Iterable[Mapping[str, Any]], *, seed: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Group runs that trained the same by :func:`hgadlib.config.training_key`; each by images, then seed.

    Records are :func:`read_records`'s; a setting that one is too old to name has its default. Where seed is
    True, runs of different seeds are told apart.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        key = training_key(config_from_dict(record["config"]), seed=seed)
        groups.setdefault(key, []).append(dict(record))
    for found in groups.values():
        found.sort(key=lambda record: (record["data"]["digest"], record["seed"]))
    return groups


def image_title(record: Mapping[str, Any]) -> str:
    """Name a record's images: the dataset, or for a folder what its note says before the colon."""
    if record["dataset"] != "folder":
        return str(record["dataset"])
    title, colon, _ = str(record.get("note", "")).partition(":")
    return title if colon and title else f"folder {record['data']['digest'][:8]}"


def problems(record: Mapping[str, Any]) -> list[str]:
    """Check a record, with its file's name as "record", against itself.

    Returns what is wrong, a sentence each: its configuration does not resolve, a digest is not that of the
    configuration or not in the file's name, a metric is not a share, a mean is not that of the classes.
    """
    found = []
    try:
        config_from_dict(record["config"])
    except InputError as error:
        found.append(f"its configuration does not resolve: {error}")
    text = json.dumps(record["config"], sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != record["config_digest"]:
        found.append("its configuration is not that of its digest")
    if not str(record["record"]).endswith(_digests(record)):
        found.append("its file is not named by its digests")
    for metric, mean in record["mean"].items():
        values = [values[metric] for values in record["per_class"].values() if values[metric] is not None]
        if any(not 0 <= value <= 1 for value in values):
            found.append(f"{metric} is not a share from 0 to 1")
        if (mean is None) != (not values) or (values and abs(np.mean(values) - mean) > 1e-9):
            found.append(f"{metric}: the mean is not that of the classes")
    return found
