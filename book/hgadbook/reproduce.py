"""How to reproduce the paper's numbers: which run answers which, and its time and memory by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from hgadbook.complexity import Complexity
from hgadbook.paper import METRICS, read_table
from hgadlib.config import Config, config_from_dict, load_config, params_dir, read_params, training_key
from hgadlib.datasets import published
from hgadlib.errors import InputError

PAPER_FILE = "params/experiments/paper.yaml"
# Rows of Tab. 2 as the paper names them, and what they are called here; Tab. 1 is MVTec AD.
_DATASETS = {"BTAD": "btad", "MVTec3D-RGB": "mvtec3d", "VisA": "visa", "Union": "union"}
_ABLATIONS = ("table3a", "table3b", "table3c", "table3d", "table3e")
_FLOAT32 = 4  # bytes


def words(dataset: str, experiment: str) -> str:
    """Write the command of a run under the paper's settings.

    A row of Tab. 3 takes the paper's file as well: the experiment is stronger, and sets what its row varies.

    >>> words("mvtec", "paper")
    'hgad -p dataset mvtec -p experiment paper'
    """
    as_printed = "" if experiment in ("paper", "released") else f" -f {PAPER_FILE}"
    return f"hgad -p dataset {dataset}{as_printed} -p experiment {experiment}"


def configured(dataset: str, experiment: str) -> Config:
    """Resolve the configuration of the run that :func:`words` names."""
    given = {} if experiment in ("paper", "released") else read_params("paper", params_dir() / "experiments")
    return load_config({**given, "dataset": dataset, "experiment": experiment})


def comparisons() -> pd.DataFrame:
    """List the paper's numbers of HGAD beside the runs that answer them.

    Returns:
        A row per number pair: table, row, the paper's image_auroc and pixel_auroc (percent, NaN where the
        table as read has none), dataset, experiment and command.
    """
    found = [
        ("Tab. 1", "Mean", "mvtec", name, _pair("table1", category="Mean")) for name in ("paper", "released")
    ]
    found += [
        ("Tab. 2", row, dataset, "paper", _pair("table2", dataset=row)) for row, dataset in _DATASETS.items()
    ]
    for name in _ABLATIONS:
        table = read_table(name)
        for experiment, part in table[table["experiment"] != ""].groupby("experiment", sort=False):
            label = name.replace("table", "Tab. ")
            pair = _pair(name, experiment=str(experiment))
            found.append((label, part["row"].iloc[0], "mvtec", str(experiment), pair))
    lines = [
        {"table": table, "row": row, **pair, "dataset": dataset, "experiment": experiment}
        for table, row, dataset, experiment, pair in found
    ]
    return pd.DataFrame(lines).assign(
        command=lambda t: [words(*p) for p in t[["dataset", "experiment"]].values]
    )


def _pair(name: str, **where: str) -> dict[str, float]:
    """Look up both AUROCs of one row of HGAD."""
    table = read_table(name)
    if "method" in table:
        where = {**where, "method": "HGAD"}
    for column, value in where.items():
        table = table[table[column] == value]
    values = table.set_index("metric")["value"]
    return {metric: float(values.get(metric, math.nan)) for metric in METRICS}


def distinct_trainings(table: pd.DataFrame) -> int:
    """Count the trainings behind rows of :func:`comparisons`: rows that several tables share are one."""
    runs = table[["dataset", "experiment"]].itertuples(index=False)
    return len({training_key(configured(*run)) for run in runs})


def recorded(table: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Find the records of the ledger that answer each row of :func:`comparisons`, whatever their seed.

    A record is found by what it trained, wherever the file with the backbone's weights lay.
    """
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(_key(config_from_dict(record["config"])), []).append(str(record["record"]))
    runs = table[["dataset", "experiment"]].itertuples(index=False)
    return [found.get(_key(configured(*run)), []) for run in runs]


def _key(config: Config) -> str:
    return training_key(replace(config, features=replace(config.features, weights=None)), seed=False)


def weights_commands(config: Config) -> str:
    """Write the commands that bring the weights of a backbone to a machine and tell the library of them.

    Raises:
        InputError: timm knows no published weights for it.
    """
    from timm import get_pretrained_cfg

    known = get_pretrained_cfg(config.features.backbone)
    if known is None or not known.hf_hub_id:
        raise InputError(f"{config.features.backbone}: timm knows no published weights for it")
    file = known.hf_hub_filename or "model.safetensors"
    given = f"{{overrides: {{features.weights: {file}}}}}"
    return (
        "# on a machine with a network, once: into the hub's cache, where timm looks by itself\n"
        f"hf download {known.hf_hub_id} {file}\n"
        "# or a file that was brought here some other way\n"
        f"{words(config.dataset, config.experiment)} -y '{given}'"
    )


def image_counts(dataset: str) -> dict[str, int]:
    """Count the classes and the images of a published dataset, as its loader expects them (App. D).

    VisA's table of images, which divides its normal ones, comes with the dataset: here all are in "train",
    which is an upper bound.

    Returns:
        "classes", "train" and "test".

    Raises:
        InputError: It is none of the paper's.
    """
    if dataset == "union":
        parts = [image_counts(part) for part in published.PARTS]
        return {key: sum(part[key] for part in parts) for key in parts[0]}
    known: dict[str, Mapping[str, tuple[int, ...]]] = {
        "mvtec": published.MVTEC, "btad": published.BTAD, "mvtec3d": published.MVTEC3D_TRAIN_TEST,
        "visa": published.VISA_NORMAL_ANOMALOUS,
    }  # fmt: skip
    if dataset not in known:
        raise InputError(
            f"expected one of the paper's datasets, {', '.join([*known, 'union'])}; found {dataset!r}"
        )
    counts = known[dataset].values()
    return {
        "classes": len(counts), "train": sum(c[0] for c in counts), "test": sum(sum(c[1:]) for c in counts)
    }  # fmt: skip


def card_rate(*, cores: int, clock_ghz: float, share: float) -> float:
    """Work out the multiply-adds a second of a card: one a core and cycle, times the share that is reached.

    >>> card_rate(cores=1000, clock_ghz=1.5, share=0.5)
    750000000000.0
    """
    if not (cores > 0 and clock_ghz > 0 and 0 < share <= 1):
        raise InputError(
            f"expected cores and a clock above 0 and a share up to 1, found {cores}, {clock_ghz}, {share}"
        )
    return cores * clock_ghz * 1e9 * share


def evaluations(config: Config) -> int:
    """Count how often a training scores the test images: every so many epochs, and at the end."""
    every, epochs = config.train.evaluate_every, config.train.epochs
    return 1 if every == 0 else math.ceil(epochs / every)


def multiply_adds(config: Config, cost: Complexity, counts: Mapping[str, int]) -> dict[str, int]:
    """Count the multiply-adds of a whole run, by what they are for.

    Args:
        config: Of the run.
        cost: Of one image, by :func:`hgadbook.complexity.measure_complexity`.
        counts: "train" and "test" images.
    """
    one = cost.multiply_adds
    scored = one["flow"] + one["prior"]
    whole = {
        "features, once": (counts["train"] + counts["test"]) * one["backbone"],
        "training": counts["train"] * config.train.epochs * cost.step,
        "scores of the test images": evaluations(config) * counts["test"] * (scored + one["maps"]),
    }
    if config.score.normalisation == "inductive":
        whole["constants of the scores"] = counts["train"] * scored
    return whole


def memory(config: Config, cost: Complexity, counts: Mapping[str, int]) -> dict[str, int]:
    """Work out the bytes that a run holds, by what they are for.

    The step is that of the plain form, where every block keeps its input, its hidden layer, what the subnet
    gives and its output for the way back; hgadlib.fast keeps less.
    """
    numbers = sum(channels * height * width for channels, height, width in cost.levels)
    width = {"float16": 2, "float32": _FLOAT32}[config.features.dtype]
    kept = 0
    for channels, rows, columns in cost.levels:
        passive = channels - channels // 2
        hidden = round(config.flow.hidden_ratio * (passive + config.flow.position_dim))
        kept += rows * columns * config.flow.layers * (2 * channels + hidden + 2 * (channels // 2))
    return {
        "features of all images (host or disk will do)": (counts["train"] + counts["test"]) * numbers * width,
        "backbone": cost.frozen * _FLOAT32,
        "flows and priors, gradients, Adam's two averages": 4 * (cost.flow + cost.prior) * _FLOAT32,
        "one step's intermediate values": config.train.batch_size * kept * _FLOAT32,
    }


def duration(seconds: float) -> str:
    """Write a duration in the unit that fits it.

    >>> duration(30), duration(600), duration(9000)
    ('30 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def layouts() -> dict[str, str]:
    """Say for each of the paper's datasets which files its loader looks for, below its folder."""
    return {
        "mvtec": "CLASS/train/good/*.png, CLASS/test/DEFECT/*.png, CLASS/ground_truth/DEFECT/*_mask.png",
        "btad": "CLASS/train/ok/*, CLASS/test/ok/*, CLASS/test/ko/*, CLASS/ground_truth/ko/*",
        "mvtec3d": "CLASS/train/good/rgb/*.png, CLASS/test/DEFECT/rgb/*.png, CLASS/test/DEFECT/gt/*.png",
        "visa": "split_csv/1cls.csv and the files it names; or the layout of mvtec",
        "union": "the four above, side by side",
    }
