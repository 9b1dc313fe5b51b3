"""A grid of runs, declared once in params/grids/NAME.yaml: the workflow runs it, tables look for its runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgadlib.config import Config, load_config, project_dir, read_params
from hgadlib.errors import InputError

_KEYS = ("datasets", "experiments", "seeds", "overrides")


@dataclass(frozen=True)
class Grid:
    """Datasets times experiments times seeds, under shared settings.

    Attributes:
        name: Of its file.
        datasets: Files of params/.
        experiments: Files of params/experiments/; "hgad" for the dataset's own settings.
        seeds: Of each.
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
        """Give the notebook parameters of one run, as papermill takes them."""
        given: dict[str, Any] = {"dataset": dataset, "experiment": experiment, "seed": seed}
        if self.data_root is not None:
            given["data_root"] = self.data_root
        return given | ({"overrides": self.overrides} if self.overrides else {})

    def config(self, dataset: str, experiment: str, seed: int) -> Config:
        """Resolve the configuration of one run.

        Raises:
            InputError: As :func:`hgadlib.config.load_config`.
        """
        return load_config(self.parameters(dataset, experiment, seed))

    def configs(self) -> Iterator[Config]:
        """Resolve every run: by seed, then dataset, then experiment, so that a first seed is whole early."""
        for seed in self.seeds:
            for dataset in self.datasets:
                for experiment in self.experiments:
                    yield self.config(dataset, experiment, seed)

    def distinct(self) -> list[Config]:
        """List the runs that differ in what they train: rows that several tables share come once."""
        found: dict[str, Config] = {}
        for config in self.configs():
            found.setdefault(training_key(config), config)
        return list(found.values())


def training_key(config: Config, *, seed: bool = True) -> str:
    """Give a text that is equal for two runs exactly if they train the same model on the same settings.

    The experiment's name is not part of it, nor is how scores are made of the model's values: every record
    holds all protocols. So the rows "10 centres", "lambda2 = 10" and "both criteria" share one run.

    Args:
        config: Of the run.
        seed: False to have all seeds of one experiment share a key.
    """
    identity = config.identity()
    del identity["experiment"]
    for name in ("criterion", "normalisation"):
        del identity["score"][name]
    # Looks at the test set do not steer the training.
    del identity["train"]["evaluate_every"]
    if not seed:
        del identity["seed"]
    return json.dumps(identity, sort_keys=True)


def load_grid(name: str, folder: Path | None = None, **changes: Any) -> Grid:
    """Read params/grids/NAME.yaml.

    Args:
        name: Of the file.
        folder: Where the file lies; None for the project's params/grids.
        **changes: Fields to replace, such as ``datasets=["folder"], data_root=PATH``.

    Raises:
        InputError: No such file, an unknown key, or a list that is missing or empty.
    """
    source = f"params/grids/{name}.yaml"
    values = read_params(name, folder or project_dir() / "params" / "grids")
    if surplus := [key for key in values if key not in _KEYS]:
        raise InputError(f"{source}: expected the keys {', '.join(_KEYS)}, found {', '.join(surplus)}")
    values |= {key: value for key, value in changes.items() if value is not None}
    for key in ("datasets", "experiments", "seeds"):
        found = values.get(key)
        if not isinstance(found, list | tuple) or not found:
            raise InputError(f"{source}: expected a list of {key}, found {found!r}")
        values[key] = tuple(found)
    return Grid(name=name, **values)


if __name__ == "__main__":
    import sys

    # The commands need the ledger, which comes later on the street than this module.
    from hgadlib.grid_status import main

    sys.exit(main())
