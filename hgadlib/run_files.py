"""What a run has written, read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hgadlib.config import Config, config_from_dict
from hgadlib.errors import InputError


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose values differ, with both values."""
    found = []
    for key in one:
        if isinstance(one[key], dict):
            found += differences(one[key], other[key], f"{prefix}{key}.")
        elif one[key] != other[key]:
            found.append(f"{prefix}{key}: {one[key]}, now {other[key]}")
    return found


def read_config(path: Path) -> Config:
    """Read a run's configuration.

    Raises:
        InputError: No config.yaml there, or one that this version does not understand.
    """
    stored = path / "config.yaml"
    if not stored.is_file():
        raise InputError(f"{path}: expected a run with config.yaml, found none")
    try:
        values = yaml.safe_load(stored.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{stored}: expected YAML, found: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{stored}: expected keys with values, found {type(values).__name__}")
    return config_from_dict(values, source=str(stored))


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a whole run's metrics.json.

    Raises:
        InputError: The run is not whole.
    """
    file = path / "metrics.json"
    if not file.is_file():
        raise InputError(
            f"{path}: expected a finished run with metrics.json, found none; run it to its end first"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def read_history(path: Path) -> pd.DataFrame:
    """Read a run's history.csv, a row per epoch.

    Raises:
        InputError: There is none.
    """
    file = path / "history.csv"
    if not file.is_file():
        raise InputError(f"{path}: expected a run with history.csv, found none; train first")
    return pd.read_csv(file)


def read_coupling(path: Path) -> pd.DataFrame:
    """Read a run's coupling.csv, a row per evaluated epoch, level, block and group of positions.

    Raises:
        InputError: There is none.
    """
    file = path / "coupling.csv"
    if not file.is_file():
        raise InputError(
            f"{path}: expected a run with coupling.csv, found none; train with train.evaluate_every above 0"
        )
    return pd.read_csv(file)
