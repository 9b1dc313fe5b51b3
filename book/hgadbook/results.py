"""What the ledger has of the main comparison: HGAD beside the single Gaussian, under equal settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from hgadbook.ablations import Criterion, compare, half_width, image_titles, load_ablation, percent
from hgadbook.paper import number_text
from hgadlib.config import config_from_dict
from hgadlib.figures.tables import styled

# Experiments that are whole methods; the others are rows of an ablation.
_METHODS = (
    "hgad", "sec32_hgad", "tab3a_full", "tab3a_sgc", "sec32_single", "sec32_single_whiten", "sec32_fastflow",
    "paper", "released",
)  # fmt: skip
# Settings in which methods may differ and still be compared: beside these, the sections prior and loss.
_OWN_SETTINGS = (
    ("flow", "kind"), ("flow", "hidden_ratio"), ("train", "first_stage"), ("train", "evaluate_every"),
    ("train", "entropy_in_first_stage"), ("score", "criterion"), ("score", "normalisation"),
)  # fmt: skip
_COLUMNS = [
    "images", "settings", "method", "seed", "class", "image_auroc", "pixel_auroc", "criterion", "record",
]  # fmt: skip


def method_runs(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """List the runs of whole methods, a line per run and class, the mean as class "mean".

    Runs can be compared where ``images`` and ``settings`` are equal: these name the images, and what both
    methods share (image size, levels, depth of the flow, epochs).

    Returns:
        Columns images, settings, method, seed, class, image_auroc and pixel_auroc (percent, NaN where there
        is none), criterion (of the record's headline), record.
    """
    found = [record for record in records if record["experiment"] in _METHODS]
    titles, settings = image_titles(found), _settings(found)
    lines = [
        {
            "images": titles[record["data"]["digest"]],
            "settings": shared,
            "method": _method(record),
            "seed": record["seed"],
            # A class of that name is none of the means.
            "class": "class mean" if name == "mean" and values is not record["mean"] else name,
            "image_auroc": percent(values["image_auroc"]),
            "pixel_auroc": percent(values["pixel_auroc"]),
            "criterion": record["protocol"]["criterion"],
            "record": record["record"],
        }
        for record, shared in zip(found, settings, strict=True)
        for name, values in [*record["per_class"].items(), ("mean", record["mean"])]
    ]
    return pd.DataFrame(lines, columns=_COLUMNS)


def _method(record: Mapping[str, Any]) -> str:
    """Name a run's method by what it trained."""
    config = config_from_dict(record["config"])
    if config.prior.kind == "single":
        convolutional = config.flow.kind == "convolutional"
        return "single Gaussian, convolutional flow" if convolutional else "single Gaussian"
    return f"HGAD, lambda2 = {config.loss.lambda2:g}"


def _settings(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name what runs share by what a reader asks first; numbered where that is not enough."""
    found: dict[str, dict[str, str]] = {}  # by name, then by all that is shared
    names = []
    for record in records:
        config = config_from_dict(record["config"])
        sizes = config.features.pyramid or (config.data.image_size,)
        name = f"{' + '.join(map(str, sizes))} px, {config.flow.layers} layers, {config.train.epochs} epochs"
        if config.flow.normalise != "whiten":
            name += f", features {config.flow.normalise}"
        values = config.identity()
        for key in ("dataset", "experiment", "seed", "prior", "loss"):
            del values[key]
        for section, key in _OWN_SETTINGS:
            del values[section][key]
        same = found.setdefault(name, {})
        number = f" [{len(same) + 1}]" if same else ""
        names.append(same.setdefault(json.dumps(values, sort_keys=True), name + number))
    return names


def mean_over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Average lines of :func:`method_runs` over their seeds, in order of appearance.

    Returns:
        A line per images, settings, method and class: texts image_auroc and pixel_auroc (percent, ± half the
        95 % interval over the seeds), criterion, records (names).
    """
    keys = ["images", "settings", "method", "class"]
    lines = []
    for names, part in runs.groupby(keys, sort=False):
        line = dict(zip(keys, names, strict=True))
        for metric in ("image_auroc", "pixel_auroc"):
            by_seed = part.groupby("seed")[metric].mean()
            line[metric] = number_text(by_seed.mean(), half_width(by_seed))
        lines.append(line | {"criterion": part["criterion"].iloc[0], "records": list(part["record"])})
    return pd.DataFrame(lines, columns=[*keys, "image_auroc", "pixel_auroc", "criterion", "records"])


def leads(runs: pd.DataFrame) -> pd.DataFrame:
    """Subtract the single Gaussian's image AUROC from HGAD's seed by seed, for the means over the classes.

    Returns:
        A line per images, settings and HGAD method that has a partner: differences by seed (a list).
    """
    lines = []
    means = runs[runs["class"] == "mean"]
    for (images, settings), part in means.groupby(["images", "settings"], sort=False):
        by = part.pivot_table(index="seed", columns="method", values="image_auroc")
        for method in by.columns:
            if method.startswith("HGAD") and "single Gaussian" in by:
                differences = list((by[method] - by["single Gaussian"]).dropna())
                lines.append((images, settings, method, differences))
    return pd.DataFrame(lines, columns=["images", "settings", "method", "differences"])


def all_claims(records: Sequence[Mapping[str, Any]], *, criterion: Criterion = "own") -> pd.DataFrame:
    """List what the ledger says of every ordering that the paper claims in Tab. 3a to 3e.

    By the likelihood, Tab. 3c is left out, which is about the criterion.

    Returns:
        The lines of :attr:`hgadbook.ablations.Comparison.claims` behind two columns, table and images.
    """
    parts: dict[tuple[str, str], pd.DataFrame] = {}
    for letter in "abcde" if criterion == "own" else "abde":
        compared = compare(load_ablation(f"table3{letter}"), records, criterion=criterion)
        parts |= {(f"3{letter}", images): claims for images, claims in compared.claims.items()}
    return pd.concat(parts, names=["table", "images"]).reset_index(["table", "images"]).reset_index(drop=True)


def claims_table(claims: pd.DataFrame, *, caption: str, name: str) -> Styler:
    """Set out the orderings of image AUROC that the paper claims: its lead, and that on each set."""
    rows: dict[str, dict[str, str]] = {}
    for line in claims[claims["metric"] == "image_auroc"].to_dict("records"):
        paper = {"paper": number_text(line["paper"], sign="+")}
        row = rows.setdefault(f"{line['table']}: {line['claim']}", paper)
        # Of one run, the sign says all that there is to say.
        word = "one run" if line["seeds"] == 1 else line["verdict"]
        value = f"{number_text(line['ours'], line['half_width'], sign='+')}, {word}"
        row[line["images"]] = value if line["seeds"] else "not measured"
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("not measured")
    return styled(table, name=name, caption=caption)
