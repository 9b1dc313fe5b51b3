"""A run's configuration, read from parameter files and notebook parameters.

Precedence, weakest first: the defaults of :mod:`hgadlib.settings`, ``params/<dataset>.yaml``, sections
injected by ``papermill -f``, ``params/experiments/<experiment>.yaml``, the shortcuts (``-p epochs 24``), and
the dotted ``overrides``. An unknown key or an ill-typed value is one error line that lists what is known.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from hgadlib.errors import InputError
from hgadlib.parameters import PARAMETERS, PLAIN, SECTIONS, SHORTCUTS, check_value, unknown
from hgadlib.settings import (
    Config,
    DataConfig,
    FeaturesConfig,
    FlowConfig,
    LossConfig,
    PriorConfig,
    ScoreConfig,
    TrainConfig,
)

__all__ = [
    "PARAMETERS", "PLAIN", "SECTIONS", "SHORTCUTS",
    "Config", "DataConfig", "FeaturesConfig", "FlowConfig", "LossConfig", "PriorConfig", "ScoreConfig",
    "TrainConfig", "config_from_dict", "config_from_notebook", "load_config", "project_dir", "read_params",
    "run_dir",
]  # fmt: skip

_SEEN = "_parameters_seen"


def load_config(parameters: Mapping[str, Any] | None = None, **more: Any) -> Config:
    """Resolve parameters to a configuration.

    Args:
        parameters: Names out of :data:`PARAMETERS`; None counts as not given.
        **more: The same, as keywords.

    Returns:
        The configuration.

    Raises:
        InputError: An unknown name, an ill-typed or meaningless value, an unknown dataset or experiment.
    """
    given = {k: v for k, v in {**(parameters or {}), **more}.items() if v is not None}
    for name in given:
        if name not in PARAMETERS:
            raise unknown(name, PARAMETERS, "parameter")
    folder = project_dir() / "params"
    dataset = check_value("dataset", given.get("dataset", Config.dataset), "the parameters")
    tree: dict[str, Any] = {"dataset": dataset}
    _merge(tree, read_params(dataset, folder), f"params/{dataset}.yaml")
    _merge(tree, {k: v for k, v in given.items() if k in SECTIONS}, "the parameter file")
    experiment = given.get("experiment", tree.get("experiment", Config.experiment))
    experiment = check_value("experiment", experiment, "the parameters")
    # The default experiment is the one whose settings are the dataset's own.
    if experiment != Config.experiment:
        _merge(tree, read_params(experiment, folder / "experiments"), f"params/experiments/{experiment}.yaml")
    _merge(tree, {k: v for k, v in given.items() if k in PLAIN or k in SHORTCUTS}, "the parameters")
    _override(tree, given.get("overrides", {}), "the parameters")
    return config_from_dict(tree)


def config_from_dict(values: Mapping[str, Any], source: str = "the parameters") -> Config:
    """Build a configuration from nested values, as ``config.yaml`` of a run holds them.

    Raises:
        InputError: As :func:`load_config`.
    """
    tree: dict[str, Any] = {}
    _merge(tree, values, source)
    hints = typing.get_type_hints(Config)
    sections = {name: hints[name](**tree.pop(name, {})) for name in SECTIONS}
    config = Config(**tree, **sections)
    if config.flow.kind == "positional" and config.flow.position_dim % 4:
        raise InputError(
            f"parameter flow.position_dim in {source}: expected a multiple of 4 (sine and cosine of row and "
            f"column), found {config.flow.position_dim}"
        )
    return config


def config_from_notebook(
    namespace: Mapping[str, Any], *, own: Collection[str] = (), **defaults: Any
) -> Config:
    """Resolve a notebook's variables, as papermill has set them, to a configuration.

    Papermill only warns of a parameter that the notebook does not know; here it is an error. Names
    that start with an underscore, modules, functions and IPython's own are not parameters. When the cell is
    run again, variables that later cells have made by then are not parameters either, unless
    one is so close to a parameter's name that it must be a slip.

    Args:
        namespace: ``globals()`` of the notebook, right after the parameters cell; the first call notes
            in it that it was there.
        own: Names of parameters that are the chapter's own and none of the configuration's.
        **defaults: Parameters to use where the notebook sets none.

    Raises:
        InputError: As :func:`load_config`.
    """
    plain = (str, int, float, bool, list, tuple, dict, Path)
    names = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in ("In", "Out", *own) and isinstance(value, plain)
    }
    if namespace.get(_SEEN):
        names = {name: value for name, value in names.items() if _is_parameter(name)}
    config = load_config({**defaults, **names})
    if isinstance(namespace, dict):
        namespace[_SEEN] = True
    return config


def _is_parameter(name: str) -> bool:
    # A slip adds, drops or swaps a letter or two; "epoch" and "dataset_" are slips, "metrics" is not.
    return name in PARAMETERS or bool(difflib.get_close_matches(name, PARAMETERS, n=1, cutoff=0.85))


def project_dir() -> Path:
    """Find the folder that holds params/: the current one, one above it, or the source checkout's."""
    here = Path.cwd()
    for folder in (here, *here.parents[:2], Path(__file__).resolve().parents[1]):
        if (folder / "params").is_dir():
            return folder
    raise InputError(f"found no params folder at or above {here}; run from a checkout of the project")


def read_params(name: str, folder: Path) -> dict[str, Any]:
    """Read params/NAME.yaml.

    Raises:
        InputError: No such file (the known names are listed), or it is not YAML.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        kinds = {"experiments": "experiment", "grids": "grid"}
        raise unknown(name, known, kinds.get(folder.name, "dataset"))
    path = folder / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"{path.name}: expected YAML, found a syntax error: {where}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path.name}: expected keys with values, found {type(values).__name__}")
    return values


def run_dir(config: Config) -> Path:
    """Give the run's directory: as configured, else runs/<dataset>/<experiment>/seed<k> in the project."""
    if config.run_dir is not None:
        return Path(config.run_dir).expanduser()
    return project_dir() / "runs" / config.dataset / config.experiment / f"seed{config.seed}"


def _set(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set one dotted key in the nested values, once it is checked."""
    value = check_value(key, value, source)
    section, _, name = key.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[name] = value


def _set_section(tree: dict[str, Any], section: str, values: Any, source: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(
            f"ill-typed section {section} in {source}: expected keys with values, found {values!r}"
        )
    for name, value in values.items():
        _set(tree, f"{section}.{name}", value, source)


def _merge(tree: dict[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Merge a parameter file's contents: sections of keys, and the plain names and shortcuts."""
    for key, value in values.items():
        if key in SECTIONS:
            _set_section(tree, key, value, source)
        elif key in SHORTCUTS or key in PLAIN:
            _set(tree, SHORTCUTS.get(key, key), value, source)
        elif key == "overrides":
            _override(tree, value, source)
        else:
            raise unknown(str(key), PARAMETERS, f"parameter in {source}")


def _override(tree: dict[str, Any], values: Any, source: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(
            f"ill-typed overrides in {source}: expected {{section.key: value}}, found {values!r}"
        )
    for key, value in values.items():
        if key in ("dataset", "experiment"):
            raise InputError(
                f"{key} in overrides of {source}: it names a parameter file; give it as a parameter"
            )
        if key in SECTIONS:
            _set_section(tree, key, value, f"overrides of {source}")
        else:
            _set(tree, SHORTCUTS.get(key, str(key)), value, f"overrides of {source}")
