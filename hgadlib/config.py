"""A run's configuration: frozen dataclasses, read from parameter files and notebook parameters.

Precedence, weakest first: the defaults below, ``params/<dataset>.yaml``, sections injected by
``papermill -f``, ``params/experiments/<experiment>.yaml``, the shortcuts (``-p epochs 24``), and the
dotted ``overrides``. An unknown key or an ill-typed value is one error line that lists what is known.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hgadlib.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """Where the images lie and how they are brought to one size."""

    root: str | None = None
    """Folder of the dataset; None for $HGAD_DATA/NAME, else data/NAME."""
    download: bool = False
    image_size: int = 256
    resize: Literal["stretch", "short_side_center_crop", "pad"] = "stretch"
    strict: bool = True
    """False leaves bad images out and lists them in the run record."""
    num_workers: int | None = None
    """Decoding threads; None for one per core."""


@dataclass(frozen=True)
class FeaturesConfig:
    """The frozen backbone and which of its maps become levels."""

    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = None
    """A weights file; None for the bundled ones, or timm's own."""
    out_indices: tuple[int, ...] = (2, 3, 4)
    pyramid: tuple[int, ...] | None = None
    """Image sizes of a pyramid: then one stage, at each size, is a level."""
    dtype: Literal["float16", "float32"] = "float16"
    storage: Literal["auto", "device", "host", "file"] = "auto"
    batch_size: int = 16


@dataclass(frozen=True)
class FlowConfig:
    """The flow of each level (paper App. C)."""

    kind: Literal["positional", "convolutional"] = "positional"
    layers: int = 12
    position_dim: int = 256
    hidden_ratio: float = 2.0
    """Hidden width of a subnet over its number of inputs (positions included)."""
    clamp: float = 1.9
    normalise: Literal["none", "standardise", "whiten"] = "none"
    """A fixed affine map in front of the flow, set from the training features."""


@dataclass(frozen=True)
class PriorConfig:
    """The prior of the latents (paper Sec. 3.3)."""

    kind: Literal["mixture", "single"] = "mixture"
    n_centers: int = 10
    init: Literal["index", "normal", "tiled_identity", "class_means"] = "index"
    delta_std: float = 1.0
    learn_centers: bool = True
    learn_weights: bool = True


@dataclass(frozen=True)
class LossConfig:
    """Weights and switches of the training loss (paper Eq. 11)."""

    lambda1: float = 1.0
    lambda2: float = 100.0
    lambda_e: float = 1.0
    lambda_in: float = 1.0
    lambda_z: float = 0.0
    per_dimension: bool = False
    label_smoothing: float = 0.0
    detach_class_weights: bool = False
    extended: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The two-stage fit."""

    epochs: int = 100
    batch_size: int = 8
    first_stage: float = 0.08
    """Share of the epochs without intra-class terms; 0 for one-stage optimisation."""
    entropy_in_first_stage: bool = False
    lr: float = 2e-4
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[float, ...] = (0.48, 0.57, 0.88)
    """Shares of the epochs at which a step schedule drops the rate tenfold."""
    final_lr_ratio: float = 1e-3
    warmup: float = 0.0
    """Share of the epochs in which the rate rises linearly to lr."""
    warmup_start_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay_prior: bool = True
    step_per_level: bool = False
    """One optimiser step per level, as the released code does; otherwise one for all."""
    gradient_clip: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the subnets under autocast; densities stay in float32."""
    evaluate_every: int = 0
    """Epochs between evaluations on the test set; they never steer the training. 0 for the end only."""


@dataclass(frozen=True)
class ScoreConfig:
    """From log-likelihood and entropy to maps and scores (paper Sec. 3.4)."""

    criterion: Literal["likelihood", "entropy", "both"] = "both"
    normalisation: Literal["inductive", "transductive"] = "inductive"
    per_dimension: bool = True
    """Divide log-likelihoods by D before the exponential, as the released code does."""
    map_size: int = 256
    sigma: float = 4.0
    """Standard deviation of the Gaussian blur, in pixels of the map."""


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run."""

    dataset: str = "demo"
    experiment: str = "hgad"
    seed: int = 0
    device: str = "auto"
    run_dir: str | None = None
    """None for runs/<dataset>/<experiment>/seed<k> in the project's folder."""
    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def to_dict(self) -> dict[str, Any]:
        """Give plain nested values, as YAML and JSON hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """Give what the run computes: all values but where it reads, writes and executes."""
        values = self.to_dict()
        for key in ("run_dir", "device"):
            del values[key]
        for key in ("root", "download", "num_workers"):
            del values["data"][key]
        for key in ("storage", "batch_size"):
            del values["features"][key]
        return values

    @property
    def digest(self) -> str:
        """Hash of :meth:`identity`: the same for two runs that compute the same."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if f.name in typing.get_type_hints(Config) and
                 dataclasses.is_dataclass(typing.get_type_hints(Config)[f.name]))  # fmt: skip

SHORTCUTS: dict[str, str] = {
    "data_root": "data.root",
    "download": "data.download",
    "image_size": "data.image_size",
    "num_workers": "data.num_workers",
    "backbone": "features.backbone",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
}
"""Notebook parameters that stand for one key of a section."""

PLAIN = tuple(f.name for f in dataclasses.fields(Config) if f.name not in SECTIONS)
PARAMETERS = (*PLAIN, *SHORTCUTS, *SECTIONS, "overrides")
"""Every name that ``papermill -p``, ``-y`` or ``-f`` may set."""

# Values outside these ranges have no meaning: (least, most), both allowed.
_RANGES: dict[str, tuple[float, float]] = {
    "data.image_size": (16, 8192),
    "data.num_workers": (1, 1024),
    "features.batch_size": (1, 65536),
    "flow.layers": (1, 1024),
    "flow.position_dim": (0, 65536),
    "flow.hidden_ratio": (1e-3, 1e3),
    "flow.clamp": (1e-6, 1e3),
    "prior.n_centers": (1, 65536),
    "prior.delta_std": (0, 1e6),
    "loss.label_smoothing": (0, 1),
    "train.epochs": (1, 10**6),
    "train.batch_size": (1, 10**6),
    "train.first_stage": (0, 1),
    "train.warmup": (0, 1),
    "train.lr": (0, 1e3),
    "train.evaluate_every": (0, 10**6),
    "score.map_size": (1, 8192),
    "score.sigma": (0, 1e3),
}


def _unknown(name: str, known: tuple[str, ...] | list[str], what: str) -> InputError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return InputError(f"unknown {what} {name!r}{hint}; expected one of: {', '.join(known)}")


def _type_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type_text(a) for a in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"a list of {_type_text(typing.get_args(annotation)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(annotation, str(annotation))


def _coerce(value: Any, annotation: Any) -> Any:
    """Give value in the annotated type, or raise TypeError; nothing is guessed from text."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if args[-1] is not Ellipsis and len(value) != len(args):
                raise TypeError
            return tuple(_coerce(v, args[0]) for v in value)
    elif annotation is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                raise TypeError from None
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif annotation is str and isinstance(value, Path):
        return str(value)
    elif isinstance(value, annotation):
        return value
    raise TypeError


def _set(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set one dotted key in the nested values, checked for name, type and range."""
    section, _, name = key.rpartition(".")
    if section not in ("", *SECTIONS):
        raise _unknown(key, SECTIONS, f"section in {source}")
    owner = typing.get_type_hints(Config)[section] if section else Config
    hints = typing.get_type_hints(owner)
    if name not in hints or name in SECTIONS:
        known = [f"{section}.{n}" if section else n for n in hints if n not in SECTIONS]
        raise _unknown(key, known, f"parameter in {source}")
    try:
        value = _coerce(value, hints[name])
    except TypeError:
        raise InputError(
            f"ill-typed parameter {key} in {source}: expected {_type_text(hints[name])}, found {value!r}"
        ) from None
    low, high = _RANGES.get(key, (-float("inf"), float("inf")))
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value <= high:
        raise InputError(
            f"parameter {key} in {source}: expected a value from {low:g} to {high:g}, found {value!r}"
        )
    (tree.setdefault(section, {}) if section else tree)[name] = value


def _merge(tree: dict[str, Any], values: Mapping[str, Any], source: str) -> None:
    """Merge a parameter file's contents: sections of keys, and the plain names and shortcuts."""
    for key, value in values.items():
        if key in SECTIONS:
            if not isinstance(value, Mapping):
                raise InputError(
                    f"ill-typed section {key} in {source}: expected keys with values, found {value!r}"
                )
            for name, item in value.items():
                _set(tree, f"{key}.{name}", item, source)
        elif key in SHORTCUTS:
            _set(tree, SHORTCUTS[key], value, source)
        elif key in PLAIN:
            _set(tree, key, value, source)
        elif key == "overrides":
            _override(tree, value, source)
        else:
            raise _unknown(key, PARAMETERS, f"parameter in {source}")


def _override(tree: dict[str, Any], values: Any, source: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(
            f"ill-typed overrides in {source}: expected {{section.key: value}}, found {values!r}"
        )
    for key, value in values.items():
        if key in SECTIONS and isinstance(value, Mapping):
            for name, item in value.items():
                _set(tree, f"{key}.{name}", item, f"overrides of {source}")
        else:
            _set(tree, key, value, f"overrides of {source}")


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
    path = folder / f"{name}.yaml"
    if not path.is_file():
        what = "experiment" if folder.name == "experiments" else "dataset"
        raise _unknown(name, sorted(p.stem for p in folder.glob("*.yaml")), what)
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise InputError(f"{path.name}: expected YAML, found a syntax error: {where}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path.name}: expected keys with values, found {type(values).__name__}")
    return values


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
            raise _unknown(name, PARAMETERS, "parameter")
    folder = project_dir() / "params"
    tree: dict[str, Any] = {}
    dataset = given.get("dataset", Config.dataset)
    if not isinstance(dataset, str):
        raise InputError(f"ill-typed parameter dataset: expected text, found {dataset!r}")
    _merge(tree, read_params(dataset, folder), f"params/{dataset}.yaml")
    _merge(tree, {k: v for k, v in given.items() if k in SECTIONS}, "the parameter file")
    experiment = given.get("experiment")
    if experiment is not None and experiment != Config.experiment:
        if not isinstance(experiment, str):
            raise InputError(f"ill-typed parameter experiment: expected text, found {experiment!r}")
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
    return Config(**tree, **sections)


def config_from_notebook(namespace: Mapping[str, Any], **defaults: Any) -> Config:
    """Resolve a notebook's variables, as papermill has set them, to a configuration.

    Papermill only warns of a parameter that the notebook does not know; here it is an error. Names
    that start with an underscore, modules, functions and IPython's own are not parameters.

    Args:
        namespace: ``globals()`` of the notebook, right after the parameters cell.
        **defaults: Parameters to use where the notebook sets none.

    Raises:
        InputError: As :func:`load_config`.
    """
    plain = (str, int, float, bool, list, tuple, dict, type(None), Path)
    names = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and name not in ("In", "Out") and isinstance(value, plain)
    }
    return load_config({**defaults, **{k: v for k, v in names.items() if v is not None}})


def run_dir(config: Config) -> Path:
    """Give the run's directory: as configured, else runs/<dataset>/<experiment>/seed<k> in the project."""
    if config.run_dir is not None:
        return Path(os.path.expanduser(config.run_dir))
    return project_dir() / "runs" / config.dataset / config.experiment / f"seed{config.seed}"
