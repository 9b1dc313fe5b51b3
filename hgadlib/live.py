"""Rows of a paper's table trained on the spot, where the ledger lacks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hgadlib.against_paper import Ablation
from hgadlib.config import Config
from hgadlib.errors import InputError
from hgadlib.experiment import evaluate_model, prepare, train_model
from hgadlib.grid import training_key
from hgadlib.ledger import group_records, record_of
from hgadlib.runs import RunDirectory


def choose_rows(
    ablation: Ablation,
    records: Sequence[Mapping[str, Any]],
    *,
    dataset: str,
    seed: int,
    rows: Sequence[str] | str,
) -> list[Config]:
    """Resolve which runs to train.

    Args:
        ablation: The table's rows.
        records: The ledger's.
        dataset: A file of params/.
        seed: Of the runs.
        rows: Experiments; "missing" for those of which the ledger has no run of this dataset and seed.

    Returns:
        The configurations, rows that train the same once. A row that another table shares has the directory
        of the grid's first such experiment, where the grid's run lies.

    Raises:
        InputError: A row that the table does not have.
    """
    if isinstance(rows, str) and rows != "missing":
        raise InputError(f"parameter rows: expected a list of experiments or missing, found {rows!r}")
    names = list(ablation.labels) if rows == "missing" else list(rows)
    if surplus := [name for name in names if name not in ablation.labels]:
        raise InputError(
            f"parameter rows: expected some of {', '.join(ablation.labels)}, found {', '.join(surplus)}"
        )
    groups = group_records(records)
    chosen: dict[str, Config] = {}
    for name in names:
        config = ablation.config(dataset, name, seed)
        there = groups.get(training_key(config, seed=False), ())
        if rows == "missing" and any(record["seed"] == seed for record in there):
            continue
        key = training_key(config)
        shared = (ablation.config(dataset, other, seed) for other in ablation.grid.experiments)
        chosen.setdefault(key, next((other for other in shared if training_key(other) == key), config))
    return list(chosen.values())


def train_rows(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Train, or load, each run and give its record, as the ledger would hold it.

    Returns:
        Records; each is named by its run directory, since it is not committed.
    """
    found = []
    for config in configs:
        run = RunDirectory.open(config)
        inputs = prepare(config)
        evaluate_model(config, inputs, train_model(config, inputs, run), run)
        name = f"{run.path.parent.parent.name}/{run.path.parent.name}/{run.path.name}"
        found.append(record_of(run.path) | {"record": f"run here: {name}"})
    return found
