"""A run's configuration, read from parameter files and notebook parameters.

Precedence, weakest first: the defaults of :mod:`hgadlib.config`, ``params/<dataset>.yaml``, sections
injected by ``papermill -f``, ``params/experiments/<experiment>.yaml``, the shortcuts (``-p epochs 24``), and
the dotted ``overrides``. An unknown key or an ill-typed value is one error line that lists what is known.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
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
    image_size: int = 512
    """Pixels a side after resizing; with a pyramid, those of its largest image."""
    resize: Literal["stretch", "short_side_center_crop", "pad"] = "stretch"
    classes: Literal["folders", "discovered"] = "folders"
    """Where classes come from: the folders' names, or clusters of the images' features (App. A.2)."""
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
    out_indices: tuple[int, ...] = (4,)
    pyramid: tuple[int, ...] | None = (512, 256)
    """Image sizes of a pyramid: then one stage, at each size, is a level."""
    dtype: Literal["float16", "float32"] = "float16"
    storage: Literal["auto", "device", "host", "file"] = "auto"
    batch_size: int = 16


@dataclass(frozen=True)
class FlowConfig:
    """The flow of each level (paper App. C)."""

    kind: Literal["positional", "convolutional"] = "positional"
    layers: int = 8
    position_dim: int = 64
    hidden_ratio: float = 1.0
    """Hidden width of a subnet over its number of inputs (positions included)."""
    clamp: float = 1.9
    normalise: Literal["none", "standardise", "whiten"] = "whiten"
    """A fixed affine map in front of the flow, set from the training features."""


@dataclass(frozen=True)
class PriorConfig:
    """The prior of the latents (paper Sec. 3.3)."""

    kind: Literal["mixture", "single"] = "mixture"
    n_centers: int = 10
    init: Literal["index", "normal", "tiled_identity", "class_means"] = "class_means"
    delta_init: Literal["normal", "kmeans"] = "kmeans"
    """How a class's other centres start in the second stage: N(0, delta_std^2) about the main one, or on the
    clusters of its latents."""
    delta_std: float = 1.0
    learn_centers: bool = True
    learn_weights: bool = True


@dataclass(frozen=True)
class LossConfig:
    """Weights and switches of the training loss (paper Eq. 11)."""

    lambda1: float = 1.0
    lambda2: float = 1.0
    lambda_e: float = 1.0
    lambda_in: float = 1.0
    lambda_z: float = 0.0
    per_dimension: bool = True
    label_smoothing: float = 0.0
    detach_class_weights: bool = True
    extended: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The two-stage fit."""

    epochs: int = 24
    batch_size: int = 16
    first_stage: float = 0.08
    """Share of the epochs without intra-class terms; 0 for one-stage optimisation."""
    entropy_in_first_stage: bool = False
    lr: float = 1e-3
    schedule: Literal["step", "cosine", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.48, 0.57, 0.88)
    """Shares of the epochs at which a step schedule drops the rate tenfold."""
    final_lr_ratio: float = 1e-3
    warmup: float = 0.05
    """Share of the epochs in which the rate rises linearly to lr."""
    warmup_start_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay_prior: bool = False
    step_per_level: bool = False
    """One optimiser step per level, as the released code does; otherwise one for all."""
    gradient_clip: float | None = 100.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the subnets under autocast; densities stay in float32."""
    evaluate_every: int = 8
    """Epochs between evaluations on the test set; they never steer the training. 0 for the end only."""


@dataclass(frozen=True)
class ScoreConfig:
    """From log-likelihood and entropy to maps and scores (paper Sec. 3.4)."""

    criterion: Literal["likelihood", "entropy", "both"] = "likelihood"
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
    def criterion(self) -> Literal["likelihood", "entropy", "both"]:
        """The criterion whose figures stand first: one Gaussian for all classes has no entropy over them."""
        return "likelihood" if self.prior.kind == "single" else self.score.criterion

    @property
    def protocol(self) -> str:
        """Name of the protocol whose figures stand first, ``normalisation/criterion``."""
        return f"{self.score.normalisation}/{self.criterion}"

    @property
    def digest(self) -> str:
        """Hash of :meth:`identity`: the same for two runs that compute the same."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data.image_size": (16, 8192),
    "data.num_workers": (1, 1024),
    "features.out_indices": (0, 64),
    "features.pyramid": (16, 8192),
    "features.batch_size": (1, 65536),
    "flow.layers": (1, 1024),
    "flow.position_dim": (0, 65536),
    "flow.hidden_ratio": (1e-3, 1e3),
    "flow.clamp": (1e-6, 1e3),
    "prior.n_centers": (1, 65536),
    "prior.delta_std": (0, 1e6),
    "loss.lambda1": (0, 1e9),
    "loss.lambda2": (0, 1e9),
    "loss.lambda_e": (0, 1e9),
    "loss.lambda_in": (0, 1e9),
    "loss.lambda_z": (0, 1e9),
    "loss.label_smoothing": (0, 1),
    "train.epochs": (1, 10**6),
    "train.batch_size": (1, 10**6),
    "train.first_stage": (0, 1),
    "train.lr": (0, 1e3),
    "train.milestones": (0, 1),
    "train.final_lr_ratio": (0, 1),
    "train.warmup": (0, 1),
    "train.warmup_start_ratio": (0, 1),
    "train.betas": (0, 1 - 1e-9),
    "train.weight_decay": (0, 1e3),
    "train.gradient_clip": (1e-12, 1e12),
    "train.evaluate_every": (0, 10**6),
    "score.map_size": (1, 8192),
    "score.sigma": (0, 1e3),
}
"""Least and most of each setting, both allowed; outside they have no meaning. Of lists, every item."""


_HINTS = typing.get_type_hints(Config)

SECTIONS: tuple[str, ...] = tuple(name for name, hint in _HINTS.items() if dataclasses.is_dataclass(hint))

SHORTCUTS: dict[str, str] = {
    "data_root": "data.root",
    "download": "data.download",
    "classes": "data.classes",
    "image_size": "data.image_size",
    "num_workers": "data.num_workers",
    "backbone": "features.backbone",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
}
"""Notebook parameters that stand for one key of a section."""

PLAIN: tuple[str, ...] = tuple(name for name in _HINTS if name not in SECTIONS)
PARAMETERS: tuple[str, ...] = (*PLAIN, *SHORTCUTS, *SECTIONS, "overrides")
"""Every name that ``papermill -p``, ``-y`` or ``-f`` may set."""

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def unknown(name: str, known: Sequence[str], what: str) -> InputError:
    """Say that a name is not known, which is closest, and list all.

    Example:
        >>> print(unknown("elvp", ["demo", "elpv"], "dataset"))
        unknown dataset 'elvp' (did you mean elpv?); expected one of: demo, elpv
    """
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return InputError(f"unknown {what} {name!r}{hint}; expected one of: {', '.join(known)}")


def check_value(key: str, value: Any, source: str) -> Any:
    """Check a parameter's name, type and range.

    Args:
        key: Dotted name, such as "train.epochs", or a plain one, such as "seed".
        value: As YAML, JSON or a notebook gives it.
        source: Where it was found, for the error.

    Returns:
        The value in its declared type: lists become tuples, whole numbers floats where those are expected.

    Raises:
        InputError: The name is unknown, or the value is ill-typed or out of range.
    """
    section, _, name = key.rpartition(".")
    if section not in ("", *SECTIONS):
        raise unknown(section, SECTIONS, f"section in {source}")
    hints = typing.get_type_hints(_HINTS[section]) if section else {name: _HINTS[name] for name in PLAIN}
    if name not in hints:
        known = [f"{section}.{n}" if section else n for n in hints]
        raise unknown(key, known, f"parameter in {source}")
    try:
        typed = _typed(value, hints[name])
    except TypeError:
        raise InputError(
            f"ill-typed parameter {key} in {source}: expected {_type_text(hints[name])}, found {value!r}"
        ) from None
    low, high = RANGES.get(key, (-math.inf, math.inf))
    numbers = typed if isinstance(typed, tuple) else (typed,)
    if any(isinstance(number, (int, float)) and not low <= number <= high for number in numbers):
        raise InputError(
            f"parameter {key} in {source}: expected a value from {low:g} to {high:g}, found {value!r}"
        )
    return typed


def _type_text(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(option) for option in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"a list of {count}{_type_text(args[0]).removeprefix('a ')}s"
    return _TYPE_NAMES[annotation]


def _typed(value: Any, annotation: Any) -> Any:
    """Give value in the annotated type, or raise TypeError."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _typed(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise TypeError
    if origin is tuple:
        fits = isinstance(value, (list, tuple)) and (len(value) == len(args) or args[-1] is Ellipsis)
        if not fits:
            raise TypeError
        return tuple(_typed(item, args[0]) for item in value)
    if annotation is float:
        return _number(value)
    if annotation is str and isinstance(value, Path):
        return str(value)
    # In Python True is also an int; here it is not.
    if isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    raise TypeError


def _number(value: Any) -> float:
    # YAML 1.1 reads 1e-3 as text, for want of a dot.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    try:
        number = float(value)
    except ValueError:
        raise TypeError from None
    if not math.isfinite(number):
        raise TypeError
    return number


_SEEN = "_parameters_seen"


DATASETS = ("mvtec", "btad", "mvtec3d", "visa", "union", "elpv", "demo", "folder")
"""Names of params/NAME.yaml that :func:`hgadlib.datasets.load_dataset` knows."""


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
