"""What the ledger has of the main comparison: HGAD beside the single Gaussian, under equal settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hgadbook.ablations import (
    half_width,
    image_titles,
    judge,
    load_ablation,
    measure,
    percent,
    sets_of_images,
)
from hgadlib.config import config_from_dict

# Experiments that are whole methods; the others are rows of an ablation.
_METHODS = (
    "hgad",
    "sec32_hgad",
    "tab3a_full",
    "tab3a_sgc",
    "sec32_single",
    "sec32_single_whiten",
    "sec32_fastflow",
    "paper",
    "released",
)
_COLUMNS = [
    "images",
    "settings",
    "method",
    "seed",
    "class",
    "image_auroc",
    "pixel_auroc",
    "criterion",
    "record",
]


def method_runs(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """List the runs of whole methods, a line per run and class, the mean as class "mean".

    Runs can be compared where ``images`` and ``settings`` are equal: these name the images, and what both
    methods share (image size, levels, depth of the flow, epochs).

    Returns:
        Columns images, settings, method, seed, class, image_auroc and pixel_auroc (percent, NaN where there
        is none), criterion (of the record's headline), record.
    """
    found = [record for record in records if record["experiment"] in _METHODS]
    titles = image_titles(found)
    names = _setting_names(found)
    lines = []
    for record in found:
        for name, values in {**record["per_class"], "mean": record["mean"]}.items():
            lines.append(
                {
                    "images": titles[record["data"]["digest"]],
                    "settings": names[_shared(record)],
                    "method": method_name(record),
                    "seed": record["seed"],
                    "class": name,
                    "image_auroc": percent(values["image_auroc"]),
                    "pixel_auroc": percent(values["pixel_auroc"]),
                    "criterion": record["protocol"]["criterion"],
                    "record": record["record"],
                }
            )
    return pd.DataFrame(lines, columns=_COLUMNS).astype({"image_auroc": float, "pixel_auroc": float})


def method_name(record: Mapping[str, Any]) -> str:
    """Name a run's method by what it trained."""
    config = config_from_dict(record["config"])
    if config.prior.kind == "single":
        convolutional = config.flow.kind == "convolutional"
        return "single Gaussian, convolutional flow" if convolutional else "single Gaussian"
    return f"HGAD, lambda2 = {config.loss.lambda2:g}"


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Average over seeds.

    Args:
        runs: Lines of :func:`method_runs`.

    Returns:
        A line per images, settings, method and class, in order of appearance: texts "image" and "pixel"
        (percent, ± half the 95 % interval over the seeds), the criterion and the records.
    """
    keys = ["images", "settings", "method", "class"]
    lines = []
    for names, part in runs.groupby(keys, sort=False):
        line = dict(zip(keys, names, strict=True))
        for metric in ("image_auroc", "pixel_auroc"):
            line[metric] = _text(part.groupby("seed")[metric].mean())
        lines.append(line | {"criterion": part["criterion"].iloc[0], "records": list(part["record"])})
    return pd.DataFrame(lines, columns=[*keys, "image_auroc", "pixel_auroc", "criterion", "records"])


def leads(runs: pd.DataFrame, metric: str = "image_auroc") -> pd.DataFrame:
    """Subtract the single Gaussian from HGAD seed by seed, for the means over the classes.

    Returns:
        A line per images, settings and HGAD method that has a partner: difference by seed (a list).
    """
    lines = []
    means = runs[runs["class"] == "mean"]
    for (images, settings), part in means.groupby(["images", "settings"], sort=False):
        by = part.groupby(["method", "seed"])[metric].mean().unstack("seed")
        for method in by.index:
            if method.startswith("HGAD") and "single Gaussian" in by.index:
                difference = (by.loc[method] - by.loc["single Gaussian"]).dropna()
                lines.append(
                    {
                        "images": images,
                        "settings": settings,
                        "method": method,
                        "differences": list(difference),
                    }
                )
    return pd.DataFrame(lines, columns=["images", "settings", "method", "differences"])


def findings(
    records: Sequence[Mapping[str, Any]], *, criterion: str = "own", grid: str = "ablations"
) -> pd.DataFrame:
    """Hold every ordering that the paper claims in Tab. 3a to 3e against the ledger, on every set of images.

    Args:
        records: The ledger's.
        criterion: As in :func:`hgadbook.ablations.measure`. By another than "own" Tab. 3c, which is about
            the criterion, is left out.
        grid: A file of params/grids.

    Returns:
        Lines of :func:`hgadbook.ablations.judge` behind two columns, table and images.
    """
    parts = []
    for letter in "abcde" if criterion == "own" else "abde":
        ablation = load_ablation(f"table3{letter}", grid)
        runs = measure(ablation, records, criterion=criterion)
        for images in sets_of_images(ablation, runs):
            judged = judge(ablation, runs, images)
            judged.insert(0, "images", images)
            judged.insert(0, "table", f"3{letter}")
            parts.append(judged)
    return pd.concat(parts, ignore_index=True)


def _text(values: pd.Series) -> str:
    if values.isna().all():
        return "–"
    width = half_width(values)
    return f"{values.mean():.1f}" if np.isnan(width) else f"{values.mean():.1f} ± {width:.1f}"


def _shared(record: Mapping[str, Any]) -> str:
    """Give a text that is equal for runs that differ in prior, losses, kind of flow and seed alone."""
    values = config_from_dict(record["config"]).identity()
    for key in ("dataset", "experiment", "seed", "prior", "loss"):
        del values[key]
    for section, key in (
        ("flow", "kind"), ("flow", "hidden_ratio"), ("train", "first_stage"), ("train", "evaluate_every"),
        ("train", "entropy_in_first_stage"), ("score", "criterion"), ("score", "normalisation"),
    ):  # fmt: skip
        del values[section][key]
    return json.dumps(values, sort_keys=True)


def _setting_names(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name groups of settings by what a reader asks first; numbered where that is not enough."""
    names: dict[str, str] = {}
    for record in records:
        key, config = _shared(record), config_from_dict(record["config"])
        sizes = config.features.pyramid or (config.data.image_size,)
        name = f"{' + '.join(map(str, sizes))} px, {config.flow.layers} layers, {config.train.epochs} epochs"
        if config.flow.normalise != "whiten":
            name += f", features {config.flow.normalise}"
        if key not in names:
            same = sum(found.split(" [")[0] == name and other != key for other, found in names.items())
            names[key] = f"{name} [{same + 1}]" if same else name
    return names
