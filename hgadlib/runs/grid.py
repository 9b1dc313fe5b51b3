"""A grid of runs, declared once in params/grids/NAME.yaml: the workflow runs it, tables look for its runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from hgadlib.config import Config, load_config, params_dir, project_dir, read_params, run_dir, training_key
from hgadlib.errors import InputError
from hgadlib.files import write_atomically
from hgadlib.runs.directory import RunDirectory, read_metrics
from hgadlib.runs.ledger import group_records

State = Literal["recorded", "whole", "unfinished", "stale", "missing"]
"""Of a run: its record is in the ledger; or its directory is whole, was begun, holds another
configuration's or other images' run, or is not there."""

METRICS = ("image_auroc", "pixel_auroc", "aupro")
_KEYS = ("datasets", "experiments", "seeds", "overrides")


@dataclass(frozen=True)
class Grid:
    """Datasets times experiments times seeds, under shared settings.

    Attributes:
        datasets: Files of params/.
        experiments: Files of params/experiments/; "hgad" for the dataset's own settings.
        overrides: Dotted settings on top of every experiment.
        data_root: Where the images of a dataset lie that has no place of its own.
    """

    name: str
    datasets: tuple[str, ...]
    experiments: tuple[str, ...]
    seeds: tuple[int, ...]
    overrides: dict[str, Any] = field(default_factory=dict)
    data_root: str | None = None

    def parameters(self, dataset: str, experiment: str, seed: int) -> dict[str, Any]:
        """Return the notebook parameters of one run, as papermill takes them."""
        given: dict[str, Any] = {"dataset": dataset, "experiment": experiment, "seed": seed}
        if self.data_root is not None:
            given["data_root"] = self.data_root
        return given | ({"overrides": self.overrides} if self.overrides else {})

    def config(self, dataset: str, experiment: str, seed: int) -> Config:
        """Resolve the configuration of one run; an InputError as from :func:`hgadlib.config.load_config`."""
        return load_config(self.parameters(dataset, experiment, seed))

    def configs(self) -> Iterator[Config]:
        """Resolve every run: by seed, then dataset, then experiment, so that a first seed is whole early."""
        for seed, dataset, experiment in itertools.product(self.seeds, self.datasets, self.experiments):
            yield self.config(dataset, experiment, seed)

    def distinct(self) -> list[Config]:
        """List the runs that differ in what they train: rows that several tables share come once."""
        found: dict[str, Config] = {}
        for config in self.configs():
            found.setdefault(training_key(config), config)
        return list(found.values())


def load_grid(name: str, folder: Path | None = None, **changes: Any) -> Grid:
    """Read params/grids/NAME.yaml, or that of another folder, with fields (say data_root=PATH) replaced.

    An InputError if there is no such file, a key is unknown, or a list is missing or empty.
    """
    source = f"params/grids/{name}.yaml"
    values = read_params(name, folder or params_dir() / "grids")
    if surplus := [key for key in values if key not in _KEYS]:
        raise InputError(f"{source}: expected the keys {', '.join(_KEYS)}, found {', '.join(surplus)}")
    values |= {key: value for key, value in changes.items() if value is not None}
    for key in _KEYS[:3]:
        found = values.get(key)
        if not isinstance(found, list | tuple) or not found:
            raise InputError(f"{source}: expected a list of {key}, found {found!r}")
        values[key] = tuple(found)
    return Grid(name=name, **values)


Records = Mapping[str, Sequence[dict[str, Any]]]


def run_states(
    grid: Grid, records: Sequence[dict[str, Any]], *, fresh: bool = False
) -> list[tuple[Config, State]]:
    """Find out of every distinct run of a grid how far it is, by its configuration, never by a file's time.

    The records are the ledger. Fresh counts a run only if it lies in its directory here; its record must be
    of that run. An InputError if a setting is wrong, or a folder of images is not there.
    """
    groups = group_records(records, seed=True)
    return [(config, _state(config, _records_of(config, groups), fresh)) for config in grid.distinct()]


def _state(config: Config, records: Sequence[dict[str, Any]], fresh: bool) -> State:
    if records and not fresh:
        return "recorded"
    run = RunDirectory(run_dir(config), config)
    if not (run.path / "config.yaml").is_file():
        return "missing"
    if run.another(_images(config.dataset, config.data.root, config.data.classes)):
        return "stale"
    if not run.complete:
        return "unfinished"
    # No two runs take the same time: with these figures a record is of this very run.
    timing = read_metrics(run.path)["timing"]
    return "recorded" if any(record["timing"] == timing for record in records) else "whole"


def _records_of(config: Config, groups: Records) -> Sequence[dict[str, Any]]:
    """Find a run's records, without those of other images under the same name, which any folder may be."""
    records = groups.get(training_key(config), [])
    if config.dataset != "folder" or not records:
        return records
    images = _images(config.dataset, config.data.root, config.data.classes)
    return [record for record in records if images and record["data"]["digest"] == images["digest"]]


@cache
def _images(dataset: str, root: str | None, classes: str) -> dict[str, Any] | None:
    """Identify a folder's images; None where the dataset's name says it all, or classes are yet unknown."""
    if dataset != "folder" or classes != "folders":
        return None
    # Torch and timm take seconds to import, and most grids do not need them here.
    from hgadlib.datasets import load_dataset
    from hgadlib.runs.inputs import identify

    return identify(load_dataset(dataset, root=root))


def summary(grid: Grid, records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Average the seeds of every experiment of a grid, each under its own way of scoring.

    A row per dataset and experiment: the seeds that are recorded, mean and sample standard deviation of
    each metric over them (NaN where not measured), and the records by name.
    """
    groups = group_records(records, seed=True)
    rows = []
    for dataset, experiment in itertools.product(grid.datasets, grid.experiments):
        configs = [grid.config(dataset, experiment, seed) for seed in grid.seeds]
        found = {c.seed: own[-1] for c in configs if (own := _records_of(c, groups))}
        protocol = configs[0].protocol
        row: dict[str, Any] = {"dataset": dataset, "experiment": experiment}
        row |= {"seeds": " ".join(map(str, found)) or "none", "protocol": protocol}
        means = [record["other_protocols"].get(protocol, {}) for record in found.values()]
        for metric in METRICS:
            values = pd.Series([mean.get(metric) for mean in means], dtype=float)
            row |= {metric: values.mean(), f"{metric}_std": values.std()}
        rows.append(row | {"records": " ".join(record["record"] for record in found.values())})
    return pd.DataFrame(rows)


def write_summary(grid: Grid, table: pd.DataFrame) -> str:
    """Write runs/tables/NAME.csv; return the table as text."""
    file = project_dir() / "runs" / "tables" / f"{grid.name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, table.to_csv(index=False, float_format="%.6f"))
    shown = table.drop(columns="records").to_string(index=False, na_rep="-", float_format="{:.4f}".format)
    return f"{shown}\nThe table, with the record behind each row: {file.relative_to(project_dir())}"
